"""An adapter's tensors → what a folder in mlx-lm's or in PEFT's layout holds. Names, ranks, scales; writes nothing.

Tensors come by mlx-lm's names and orientation: PATH.lora_a [D, R], PATH.lora_b [R, O], PATH.m [O], and of whole heads
PATH.weight and PATH.bias. Each layout keeps, under a key that its library leaves alone, what the other one's config
said, so that the way back gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from serve.adapters.formats.config import AdapterConfig, Layout, config_json
from serve.adapters.formats.tensors import RANK_AXES, others_of, paths_of, rank_in
from serve.errors import AdapterError

OF_PEFT, OF_MLX = "peft", "mlx_lm"
"""In either layout's config, under the other one's name: what the folder said that it was made of."""
IN_LAYER = re.compile(r"(.*?)\b(?:layers|h|blocks)\.\d+\.(.+)")
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32, "float64": mx.float64}


@dataclass(frozen=True)
class FolderContents:
    """What the two files of a folder hold. `notes`: what a person should know of how they were made."""

    layout: Layout
    tensors: dict[str, mx.array]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def num_modules(self) -> int:
        """Modules, or parameters, with an update."""
        return sum(name.endswith((".lora_a", ".lora_A.weight")) for name in self.tensors)


@dataclass(frozen=True)
class OfPeft:
    """What mlx-lm's layout has no words for, in a folder that was made of PEFT's."""

    config: dict[str, Any]
    """As it was written there."""
    rank: int
    scale: float
    ranks: dict[str, int]
    scales: dict[str, float]
    dtypes: dict[str, str]
    """Of lora_b, by module path, where it was another."""
    names: dict[str, str]
    """Of tensors that were called otherwise there than PEFT would call them → as they were called."""


def as_mlx(tensors: Mapping[str, mx.array], config: AdapterConfig) -> FolderContents:
    """In mlx-lm's layout, which has one rank and one scale: smaller ranks are filled up with zeros, and B takes what
    other scales differ by.

    AdapterError names whole weights and biases, which that layout has no place for.
    """
    if others := others_of(tensors):
        raise AdapterError(
            f"mlx-lm's layout has no place for {', '.join(others)}; a PEFT folder holds them, and is served as it "
            f"is. If weights among them are copies of the base's, name it with --base"
        )
    paths = paths_of(tensors)
    ranks = {path: rank_in(tensors, path) for path in paths}
    rank, scale = max(ranks.values()), _commonest(config.scale_of(path) for path in paths)
    made: dict[str, mx.array] = {}
    rounded = 0
    for path in paths:
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        folded, is_exact = _folded(b, config.scale_of(path) / scale)
        rounded += not is_exact
        axis_a, axis_b = RANK_AXES[a.ndim]
        made[f"{path}.lora_a"], made[f"{path}.lora_b"] = _to(a, axis_a, rank), _to(folded, axis_b, rank)
        if f"{path}.m" in tensors:
            made[f"{path}.m"] = tensors[f"{path}.m"]
    notes = []
    if filled := sum(each < rank for each in ranks.values()):
        notes.append(f"{filled} of {len(paths)} modules have a lower rank than {rank}: filled up with zeros")
    if rounded:
        notes.append(f"{rounded} modules have another scale than {scale:g}: B took it, and was rounded once")
    uniform = dataclasses.replace(config, rank=rank, scale=scale, ranks={}, scales={}, keys=keys_of(paths))
    return FolderContents("mlx-lm", made, config_json(uniform), tuple(notes))


def of_peft(
    tensors: Mapping[str, mx.array], config: AdapterConfig, raw: Mapping[str, Any], made: FolderContents
) -> OfPeft:
    """What a folder `made` of these tensors keeps for the way back; names apart, which are found on it."""
    paths = paths_of(tensors)
    before = {path: tensors[f"{path}.lora_b"].dtype for path in paths}
    dtypes = {path: _word(was) for path, was in before.items() if made.tensors[f"{path}.lora_b"].dtype != was}
    ranks = {path: config.rank_of(path) for path in paths if config.rank_of(path) != config.rank}
    scales = {path: config.scale_of(path) for path in paths if config.scale_of(path) != config.scale}
    return OfPeft(dict(raw), config.rank, config.scale, ranks, scales, dtypes, names={})


def restored(
    tensors: Mapping[str, mx.array], config: AdapterConfig, kept: OfPeft
) -> tuple[dict[str, mx.array], AdapterConfig] | None:
    """The inverse of `as_mlx`. None where the tensors have changed meanwhile: what was filled up is zero no more."""
    before = dataclasses.replace(
        config, rank=kept.rank, scale=kept.scale, ranks=kept.ranks, scales=kept.scales
    )
    made = dict(tensors)
    for path in paths_of(tensors):
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        axis_a, axis_b = RANK_AXES[a.ndim]
        rank = before.rank_of(path)
        if rank > config.rank or _is_filled(a, axis_a, rank) or _is_filled(b, axis_b, rank):
            return None
        dtype = DTYPES.get(kept.dtypes.get(path, ""), b.dtype)
        ratio = before.scale_of(path) / config.scale
        made[f"{path}.lora_a"] = _to(a, axis_a, rank)
        made[f"{path}.lora_b"] = (
            _to(b, axis_b, rank) if ratio == 1 else _to(b, axis_b, rank) / ratio
        ).astype(dtype)
    return made, before


def keys_of(paths: Iterable[str]) -> tuple[str, ...]:
    """mlx-lm's `keys`: paths inside a layer, and the head's; whole paths where layers stand in several places."""
    paths = list(paths)
    inside = {path: IN_LAYER.fullmatch(path) for path in paths}
    stacks = {match[1] for match in inside.values() if match}
    if len(stacks) > 1:
        return tuple(sorted(paths))
    return tuple(sorted({match[2] if match else path for path, match in inside.items()}))


def _commonest(scales: Iterable[float]) -> float:
    """The first of them, if several are."""
    return Counter(scales).most_common(1)[0][0]


def _folded(b: mx.array, ratio: float) -> tuple[mx.array, bool]:
    """B times `ratio`, in its own dtype if that can be undone, else in float32; and whether it can be undone."""
    if ratio == 1:
        return b, True
    wide = b if b.dtype == mx.float64 else b.astype(mx.float32)
    for dtype in dict.fromkeys((b.dtype, wide.dtype)):
        folded = (wide * ratio).astype(dtype)
        if bool(mx.array_equal((folded.astype(wide.dtype) / ratio).astype(b.dtype), b)):
            return folded, True
    return folded, False


def _to(array: mx.array, axis: int, size: int) -> mx.array:
    """Cut, or filled up with zeros, to this size of an axis."""
    if array.shape[axis] >= size:
        return mx.take(array, mx.arange(size), axis=axis) if array.shape[axis] > size else array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return mx.pad(array, widths)


def _is_filled(array: mx.array, axis: int, size: int) -> bool:
    """Whether anything but zeros stands beyond this size of an axis."""
    beyond = mx.take(array, mx.arange(size, array.shape[axis]), axis=axis)
    return bool(mx.any(beyond != 0))


def _word(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
