"""Where an adapter's content comes from, now and again: a folder, or others combined. Knows no names and no slots.

Whoever loads a version keeps its source: content that has left memory is read from there again, and is the
version's only if its effect hash is still the same.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from serve.adapters.fitting.fit import check_fit, fit
from serve.adapters.fitting.own import own_layout
from serve.adapters.fitting.update import LowRank, Size
from serve.adapters.formats import manifest
from serve.adapters.formats.files import AdapterFiles, find_files, located, read_adapter
from serve.adapters.formats.header import specs_of
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.named import naming_notes
from serve.adapters.formats.own_tokens import added_tokens
from serve.adapters.formats.tensors import paths_of
from serve.errors import AdapterError, NotFoundError
from serve.model.network import Network


@dataclass(frozen=True)
class Fitting:
    """What adapters are fitted to. Safe to share between threads."""

    network: Network
    max_rank: int
    squared_norms: dict[str, mx.array] = field(default_factory=dict)
    """Of the base's rows, by module path; filled as they are needed."""
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever computes: of several adapters read at once, one takes the time of what runs."""


@dataclass(frozen=True)
class Outline:
    """What can be said of an adapter, and was checked, before any of its tensors is read."""

    sizes: Mapping[str, Size]
    """By the model's own module paths."""
    num_values: int
    """Numbers in its tensors."""
    lineage: Lineage | None = None
    format: str = "mlx-lm"
    parts: tuple[str, ...] = ()
    """Ids of the versions that it adds, if it does."""
    notes: tuple[str, ...] = ()
    """What of its config does not fit its tensors, and changes nothing of what it does."""
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    """Text → id: of the tokenizer beside it, if there is one."""


@dataclass(frozen=True)
class Content:
    """An adapter, read."""

    updates: Mapping[str, LowRank]
    """By the model's own module paths; evaluated."""
    content_hash: str
    """Of the tensors."""
    effect_hash: str
    """Of the tensors and of all that says what they do."""
    tower_hash: str = ""
    """The same of what is done outside the language part; "" where nothing is."""


class Source(Protocol):
    """What a version is made of, and can be made of again. Read from any thread."""

    @property
    def path(self) -> str:
        """Where it is, in words that an operator knows."""

    @property
    def is_intact(self) -> bool:
        """Whether it would give again what it gave last, as far as can be told without reading it."""

    def look(self, name: str, fitting: Fitting) -> Outline:
        """What it says it holds. AdapterError names what does not fit `fitting`, NotFoundError what is not there."""

    def read(self, name: str, fitting: Fitting) -> Content:
        """All of it, checked. AdapterError, NotFoundError."""


class FolderSource:
    """An adapter on disk, of any layout: see `files`."""

    def __init__(self, path: str | Path) -> None:
        """NotFoundError where no path can be."""
        self._path = located(path)
        self._marks: tuple[object, ...] | None = None  # of the files, when they held what was given first
        self._given = ""  # its effect hash

    @property
    def path(self) -> str:
        return str(self._path)

    @property
    def is_intact(self) -> bool:
        return self._marks is not None and self._marks == self._marks_now()

    def look(self, name: str, fitting: Fitting) -> Outline:
        files = read_adapter(self._path)
        sizes = check_fit(name, files.specs, files.config, fitting.network, max_rank=fitting.max_rank)
        num_values = sum(spec.num_values for spec in files.specs.values())
        tokens = added_tokens(self._path) if self._path.is_dir() else {}
        notes = naming_notes(files.raw, paths_of(files.specs))
        return Outline(
            sizes, num_values, files.config.lineage, files.format, notes=notes, added_tokens=tokens
        )

    def read(self, name: str, fitting: Fitting) -> Content:
        marks = self._marks_now()
        files = read_adapter(self._path)
        tensors = files.read()  # from a slow disk, maybe
        with fitting.turn:
            return self._fitted(name, files, tensors, marks, fitting)

    def _fitted(
        self,
        name: str,
        files: AdapterFiles,
        tensors: dict[str, mx.array],
        marks: tuple[object, ...] | None,
        fitting: Fitting,
    ) -> Content:
        network = fitting.network
        # Of what was read, not of the header looked at before: the file may have been replaced meanwhile.
        check_fit(name, specs_of(tensors), files.config, network, max_rank=fitting.max_rank)
        updates = fit(name, tensors, files.config, network, squared_norms=fitting.squared_norms)
        prefix = f"{network.text_path}." if network.text_path else ""
        own, config = own_layout(tensors, files.config, network)
        outside = {path: tensor for path, tensor in own.items() if not path.startswith(prefix)}
        tensors_hash = manifest.content_hash(tensors)
        effect_hash = manifest.effect_hash(tensors_hash, files.config)
        if self._given in ("", effect_hash):
            self._given, self._marks = effect_hash, marks
        return Content(
            updates,
            tensors_hash,
            effect_hash,
            manifest.effect_hash(manifest.content_hash(outside), config) if outside else "",
        )

    def _marks_now(self) -> tuple[object, ...] | None:
        """What changes with the files; None where they are not there."""
        try:
            found = [os.stat(path) for path in find_files(self._path) if path is not None]
        except (OSError, AdapterError, NotFoundError):
            return None
        return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found)
