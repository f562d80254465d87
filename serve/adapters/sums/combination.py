"""`a@1:0.7+b@2:0.3`: versions weighted and added, as the source of another one. Opens no files.

A combination is of versions, not of names: an update of one of them makes another. Its hashes are of its parts'
hashes and weights, whatever their order, and parts that do the same are one, so that prefixes are found again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from serve.adapters.fitting.fit import check_ranges
from serve.adapters.fitting.update import LowRank, Size
from serve.adapters.formats.lineage import Lineage
from serve.adapters.residency.contents import Contents
from serve.adapters.sums.combine import combine
from serve.adapters.versions.source import Content, Fitting, Outline
from serve.adapters.versions.version import AdapterVersion
from serve.errors import AdapterError, RequestError

FORMAT = "combination"


@dataclass(frozen=True)
class Weighted:
    """So much of one version."""

    version: AdapterVersion
    weight: float


def added_up(parts: Iterable[Weighted]) -> tuple[Weighted, ...]:
    """The same sum in the one form that it has: a part for each effect, in order, none of weight 0.

    RequestError for a weight that is too large for a number.
    """
    by_effect: dict[str, Weighted] = {}
    for part in parts:
        known = by_effect.get(part.version.effect_hash)
        weight = part.weight + (known.weight if known else 0)
        if not math.isfinite(weight):
            raise RequestError(f"the weights of adapter {part.version.id!r} add up to {weight}", "model")
        first = part.version if known is None else min(part.version, known.version, key=lambda each: each.id)
        by_effect[part.version.effect_hash] = Weighted(first, weight)
    return tuple(
        sorted((part for part in by_effect.values() if part.weight), key=lambda part: part.version.id)
    )


class Combination:
    """A sum of versions."""

    def __init__(self, parts: Sequence[Weighted], contents: Contents) -> None:
        """`parts`: as `added_up` has them. `contents`: what they are read from."""
        assert parts, "nothing adds up to the base, which is no adapter"
        self.parts = tuple(parts)
        self.name = "+".join(f"{part.version.id}:{part.weight!r}" for part in parts)
        self._contents = contents

    @property
    def path(self) -> str:
        return self.name

    @property
    def is_intact(self) -> bool:
        return all(self._contents.tier(part.version) != "gone" for part in self.parts)

    def look(self, name: str, fitting: Fitting) -> Outline:
        """AdapterError where the ranks add up to more than the server takes, or the parts' chats differ."""
        sizes = self._sizes()
        largest = max(sizes, key=lambda path: sizes[path].rank, default=None)
        if largest is not None and sizes[largest].rank > fitting.max_rank:
            raise AdapterError(
                f"{name!a:.200} adds up to rank {sizes[largest].rank} at {largest}; this server takes up to "
                f"{fitting.max_rank} (max_rank)"
            )
        num_values = sum(part.version.num_values for part in self.parts)
        parts = tuple(part.version.id for part in self.parts)
        return Outline(sizes, num_values, self._lineage(), FORMAT, parts)

    def read(self, name: str, fitting: Fitting) -> Content:
        """AdapterError where the sum has no form, or one that the network's numbers cannot hold.

        AdapterGoneError where a part is gone.
        """
        updates = combine(
            [self._contents.read(part.version) for part in self.parts], [part.weight for part in self.parts]
        )
        _check_held(name, updates, fitting.network.parameters_dtype())
        seeing = [(part.version.tower_hash, part.weight) for part in self.parts if part.version.tower_hash]
        return Content(
            updates,
            _hash([(part.version.content_hash, part.weight) for part in self.parts]),
            _hash([(part.version.effect_hash, part.weight) for part in self.parts]),
            _hash(seeing) if seeing else "",
        )

    def _sizes(self) -> dict[str, Size]:
        by_path: dict[str, list[Size]] = {}
        for part in self.parts:
            for path, size in part.version.sizes.items():
                by_path.setdefault(path, []).append(size)
        return {path: _sum(sizes) for path, sizes in sorted(by_path.items())}

    def _lineage(self) -> Lineage | None:
        """The first part's that says anything, for base and template; answers end where any part's do.

        AdapterError where the parts' chats are written by other templates, or with other variables.
        """
        first = self.parts[0].version
        for part in self.parts:
            if _chats(part.version) != _chats(first):
                raise AdapterError(
                    f"adapters {first.id!r} and {part.version.id!r} cannot be added: they bring other chat "
                    f"templates, or variables for them, and a conversation is written by one"
                )
        said = [part.version.lineage for part in self.parts if part.version.lineage is not None]
        stop_ids = dict.fromkeys(id for lineage in said for id in lineage.stop_ids)
        return dataclasses.replace(said[0], stop_ids=tuple(stop_ids), metrics={}) if said else None


def _sum(sizes: Sequence[Size]) -> Size:
    """What `combine` makes of updates of these sizes."""
    is_dense = any(size.is_dense for size in sizes)
    return Size(
        rank=0 if is_dense else sum(size.rank for size in sizes),
        has_gain=any(size.has_gain for size in sizes) and not is_dense,
        is_dense=is_dense,
        has_bias=any(size.has_bias for size in sizes),
    )


def _chats(version: AdapterVersion) -> tuple[str, str]:
    """What a version says of how its chats are written."""
    lineage = version.lineage
    if lineage is None:
        return "", "{}"
    return lineage.chat_template, json.dumps(lineage.chat_template_kwargs, sort_keys=True)


def _check_held(name: str, updates: Mapping[str, LowRank], dtype: mx.Dtype) -> None:
    """AdapterError where a weight makes an update that no file may hold."""
    problems: list[str] = []
    check_ranges(updates, dict.fromkeys(updates, "weighted so"), dtype, problems)
    if problems:
        raise AdapterError(f"{name!a:.200}: {problems[0]}")


def _hash(parts: Sequence[tuple[str, float]]) -> str:
    """One part of weight 1 is itself."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return f"sha256:{hashlib.sha256(json.dumps(['sum', *sorted(parts)]).encode()).hexdigest()}"
