"""What a prompt takes whose row has one precision, measured in a process of its own, since a process has one peak.

    python -m serve.bench.precision_child '{"model": …, "precision": {…}, "num_tokens": …}'

Prints one line of JSON: Measured.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.cache.precision import KvPrecision
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.model.loading import load
from serve.model.prompt import Prompt

KV_BYTES = 8 << 30
"""What rows may take: the same on every machine, and more than they need."""
PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Measured:
    """Bytes."""

    held_bytes: int
    """What the rows held when the prompt had been computed."""
    prefill_peak_bytes: int
    """The most that all arrays took while the prompt was computed, over what they took before."""
    resident_peak_bytes: int
    """Of the process, by the kernel's count; 0 where it does not say."""
    prefill_s: float


def measure(model: str, precision: Mapping[str, Any], num_tokens: int) -> Measured:
    """Load `model` and compute one prompt of `num_tokens`."""
    form = KvPrecision(**precision)
    limits = EngineLimits(precision=form, prefix_cache_bytes=0, kv_budget_bytes=KV_BYTES)
    engine = Engine(load(model), limits)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start_s = time.perf_counter()
    held = _prefill(engine, num_tokens)
    return Measured(
        held_bytes=held,
        prefill_peak_bytes=max(0, mx.get_peak_memory() - before),
        resident_peak_bytes=_resident_peak(),
        prefill_s=time.perf_counter() - start_s,
    )


def _prefill(engine: Engine, num_tokens: int) -> int:
    """Until the first token is drawn; bytes of the rows then."""
    tokens = tuple(10 + index * 7919 % 1000 for index in range(num_tokens))
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.add(engine.check(Request("prefill", Prompt(tokens), sampling)))
    while not any(event.token_ids for event in engine.step()):
        pass
    held = engine.stats().kv_bytes
    engine.cancel("prefill")
    return held


def _resident_peak() -> int:
    """Linux's own high-water mark; getrusage's would start from what the parent held when it forked."""
    try:
        found = PEAK.search(Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    print(json.dumps(asdict(measure(**json.loads(sys.argv[1])))))
