"""How much one engine may take: rows, tokens, and bytes shared out between rows, prefixes and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve import device
from serve.cache.precision import PLAIN, KvPrecision
from serve.engine.shares import Shares

SHARE_OF_FREE_MEMORY = 0.8
KV_SHARE = 0.75
"""Of the memory budget; the rest is for adapters."""
ROW_CHUNK = 256
HOST_SHARE = 0.25
"""Of the host's memory that is free, where the device has its own: for adapters that have no slot."""


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine."""

    max_rows: int = 64
    max_waiting: int = 256
    max_tenant_requests: int | None = None
    """Of one tenant, running or waiting; None: no bound of its own."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Weights of adapters by name, of the base by ""; see serve/engine/shares.py."""
    tenant_shares: Mapping[str, float] = field(default_factory=dict)
    prefill_chunk_tokens: int = 2048
    """Of prompts in one step, padding included. Beside decoding rows a step has as many as `max_gap_ms` allows."""
    row_chunk_tokens: int | None = None
    """Of one prompt among them. None: all; ROW_CHUNK on CPU, where long chunks are no faster, and in models with
    sliding windows, whose buffers have room for a chunk beside the window."""
    max_gap_ms: float | None = None
    """What decoding rows wait for prompts in one step; None: see serve/engine/pace.py."""
    max_context: int | None = None
    """Tokens; None: what the model was made for."""
    memory_budget_bytes: int | None = None
    """Rows, prefixes, features and adapters together. None: what the other two allow; 0.8 of the memory that is free
    when the engine is made, where they say nothing."""
    kv_budget_bytes: int | None = None
    """Rows, prefixes and features. None: three quarters of the memory budget."""
    prefix_cache_bytes: int | None = None
    """None: what rows leave; 0: no prefixes are kept."""
    prefix_cache_dir: Path | None = None
    prefix_cache_disk_bytes: int | None = None
    encode_patches: int = 1024
    """Of pictures, encoded between two decode steps: the longest a running stream is held up, but for one picture."""
    feature_cache_bytes: int | None = None
    """Of pictures that were encoded. None: an eighth of the rows' and prefixes' memory, as far as rows leave it."""
    feature_cache_dir: Path | None = None
    feature_cache_disk_bytes: int | None = None
    precision: KvPrecision = PLAIN
    """Of rows whose request names none."""
    ahead: bool | None = None
    """Build a step before the one before it is read; None: where the backend is not cpu."""
    adapter_budget_bytes: int | None = None
    """On the device. None: a quarter of the memory budget."""
    adapter_host_bytes: int | None = None
    """Of adapters in host memory, for when they have no slot. None: what those on the device leave of their budget; a
    quarter of what is free, where host and device have each their own memory."""
    adapter_file_bytes: int = 4 << 30
    """Of adapters that left memory and are nowhere else, in files of the engine's own."""
    max_adapters: int = 64
    """That have a slot at once. Names there may be many more."""
    adapter_versions: int = 8
    """Of a name, that are known beside the current one."""
    max_rank: int = 256
    allow_other_base: bool = False
    """Load adapters whose manifest names other base weights, or another tokenizer."""

    def make_shares(self) -> Shares:
        """What rows are shared out by."""
        return Shares(self.shares, self.tenant_shares)

    @property
    def window_chunk_tokens(self) -> int:
        """Of a prompt, in one step of a model with sliding windows."""
        return min(self.row_chunk_tokens or ROW_CHUNK, self.prefill_chunk_tokens)

    def row_chunk(self, *, has_windows: bool, on_cpu: bool) -> int:
        """Of a prompt, in one step."""
        if has_windows or (on_cpu and self.row_chunk_tokens is None):
            return self.window_chunk_tokens
        return min(self.row_chunk_tokens or self.prefill_chunk_tokens, self.prefill_chunk_tokens)


@dataclass(frozen=True)
class MemoryBudget:
    """Who may take how many bytes. Rows come first; features and then prefixes have what rows leave. Adapters in host
    memory count like those on the device, unless the device's memory is another."""

    total: int
    kv: int
    """Rows, prefixes and features."""
    adapters: int
    """On the device, and in host memory too where `host` is None."""
    host: int | None = None
    """Adapters in host memory, if they have a budget of their own."""
    is_host_apart: bool = False
    """Host memory is not the device's."""

    @classmethod
    def of(cls, limits: EngineLimits) -> MemoryBudget:
        """As the limits say, or in shares of what is free now."""
        total = limits.memory_budget_bytes
        free = total if total is not None else int(device.free_memory_bytes() * SHARE_OF_FREE_MEMORY)
        kv = limits.kv_budget_bytes if limits.kv_budget_bytes is not None else int(free * KV_SHARE)
        adapters = limits.adapter_budget_bytes or int(free * (1 - KV_SHARE))
        is_apart = device.backend() == "cuda"
        host = limits.adapter_host_bytes
        if host is None and is_apart:
            host = int(device.free_host_bytes() * HOST_SHARE)
        if total is None:
            total = kv + adapters + (0 if is_apart else host or 0)
        return cls(total, kv, adapters, host, is_apart)

    def max_row_bytes(self, adapter_bytes: int, host_bytes: int) -> int:
        """What rows may take beside adapters of that size, on the device and in host memory."""
        taken = adapter_bytes + (0 if self.is_host_apart else host_bytes)
        return max(min(self.kv, self.total - taken), 0)
