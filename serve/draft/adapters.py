"""Which adapter of the draft model guesses for which adapter of the target: names in, slots of its own bank out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from serve.adapters.bank.bank import Bank
from serve.adapters.registry.registry import Registry
from serve.adapters.versions.version import AdapterVersion
from serve.errors import AdapterError, AdapterMemoryError, NotFoundError
from serve.model.loading import LoadedModel

MAX_RANK = 256


class DraftAdapter(NamedTuple):
    """What guesses under one of the target's adapters."""

    slot: int
    effect_hash: str


BASE = DraftAdapter(0, "")
"""The draft model alone."""


class DraftAdapters:
    """Loaded at start, each with a slot for good. A name of the target's keeps its draft adapter whatever version it
    stands for."""

    def __init__(self, model: LoadedModel, paths: Mapping[str, str | Path], max_bytes: int) -> None:
        """paths: by the target's names. AdapterError, NotFoundError and AdapterMemoryError as where the target's are
        loaded, with the draft model's name."""
        self.bank = Bank(model.network)
        registry = Registry(
            model, self.bank, max_bytes=max_bytes, host_bytes=0, max_slots=len(paths) + 1, max_rank=MAX_RANK
        )
        self._by_name: dict[str, DraftAdapter] = {}
        for name, path in paths.items():
            try:
                version = registry.load(name, path)
                registry.pin(name)
            except (AdapterError, AdapterMemoryError, NotFoundError) as error:
                raise type(error)(f"for draft model {model.name}: {error}") from error
            slot = registry.slot_of(version)
            if slot is None:
                raise AdapterMemoryError(
                    f"adapter {name!r} of draft model {model.name} has no room beside the others in {max_bytes} bytes"
                )
            self._by_name[name] = DraftAdapter(slot, version.effect_hash)
        registry.close()

    @property
    def num_bytes(self) -> int:
        """Memory held. From any thread."""
        return self.bank.num_bytes

    def of(self, version: AdapterVersion | None) -> DraftAdapter:
        """What guesses for requests under that version; None is the target alone."""
        return BASE if version is None else self._by_name.get(version.name, BASE)
