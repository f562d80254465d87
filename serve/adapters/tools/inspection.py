"""What an adapter on disk is, in numbers and words, and what keeps it from a base. Reads; changes nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.named import naming_notes
from serve.adapters.formats.tensors import paths_of
from serve.adapters.tools.factors import Core, Factors
from serve.adapters.tools.opened import Opened, open_adapter
from serve.errors import AdapterError
from serve.tables import Table, numbers

if TYPE_CHECKING:
    from serve.model.loading import LoadedModel

ANY_RANK = 2**31 - 1
NOT_SHOWN = ("metrics", "chat_template", "chat_template_kwargs", "quantize", "stop_ids")
"""Of a lineage, what is longer than a line, or no text."""


@dataclass(frozen=True)
class Module:
    """One module's update. `norm`: ‖A B‖ with the scale, Frobenius, all experts together; with DoRA of the change of
    direction alone."""

    path: str
    inputs: int
    outputs: int
    experts: int | None
    rank: int
    scale: float
    dtype: str
    norm: float
    has_lengths: bool


@dataclass(frozen=True)
class Inspection:
    """`problems`: what keeps it from being served, each on a line of its own. `notes`: what it says of itself and is
    not so, and changes nothing."""

    path: str
    format: str
    kind: str
    modules: tuple[Module, ...]
    others: tuple[str, ...]
    """Whole weights and biases that it brings, by name."""
    num_values: int
    num_bytes: int
    lineage: Lineage | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self) -> None:
        """AdapterError with all problems, if there are any."""
        if self.problems:
            raise AdapterError("\n  ".join(self.problems))


def inspect(path: Path, model: LoadedModel | None = None) -> Inspection:
    """AdapterError and NotFoundError where it cannot be read at all; what `model` has against it is a problem."""
    opened = open_adapter(path)
    problems = [f"{name} holds NaN or infinite values" for name in opened.broken()]
    if model is not None:
        problems += _against(opened, model)
        if not problems:
            opened = open_adapter(path, model.network)
    tensors = opened.tensors.values()
    return Inspection(
        path=str(path),
        format=opened.files.format,
        kind=opened.config.fine_tune_type,
        modules=tuple(_module(opened, name, each) for name, each in opened.modules.items()),
        others=tuple(opened.others),
        num_values=sum(tensor.size for tensor in tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        lineage=opened.config.lineage,
        problems=tuple(problems),
        notes=naming_notes(opened.files.raw, paths_of(opened.files.specs)),
    )


def _against(opened: Opened, model: LoadedModel) -> list[str]:
    """What the server would say."""
    from serve.adapters.fitting.fit import check_fit, fit  # with mlx-lm and transformers, a second

    problems = []
    lineage = opened.config.lineage
    if lineage is not None and lineage.base_fingerprint not in ("", model.fingerprint):
        problems.append(
            f"was trained on other weights than {model.name}'s: its manifest names {lineage.base_model} "
            f"({lineage.base_fingerprint[:19]}…), these are {model.fingerprint[:19]}…"
        )
    try:
        check_fit(opened.name, opened.files.specs, opened.files.config, model.network, max_rank=ANY_RANK)
        fit(opened.name, opened.tensors, opened.files.config, model.network)
    except AdapterError as error:
        problems.append(str(error))
    return problems


def _module(opened: Opened, path: str, module: Factors) -> Module:
    return Module(
        path=path,
        inputs=module.a.shape[-2],
        outputs=module.b.shape[-1],
        experts=module.a.shape[0] if module.is_experts else None,
        rank=module.rank,
        scale=module.scale,
        dtype=str(opened.tensors[f"{path}.lora_a"].dtype).rpartition(".")[2],
        norm=Core.of([module]).norm,
        has_lengths=module.length is not None,
    )


def tables(found: Inspection) -> list[Table | str]:
    """What to print."""
    drawn = Table("module", *numbers("inputs", "outputs", "rank", "scale", "norm"), "dtype")
    for each in found.modules:
        experts = f"{each.experts} of " if each.experts else ""
        cells = (
            f"{experts}{each.inputs}",
            f"{each.outputs}",
            f"{each.rank}",
            f"{each.scale:g}",
            f"{each.norm:.4g}",
        )
        drawn.add(each.path, *cells, each.dtype)
    return [_headline(found), *_said(found.lineage), *found.notes, drawn]


def _headline(found: Inspection) -> str:
    ranks = sorted({each.rank for each in found.modules})
    scales = sorted({each.scale for each in found.modules})
    parts = [f"{found.path}: {found.format}, {found.kind}", f"{len(found.modules)} modules"]
    parts += [f"rank {_range(ranks)}", f"scale {_range(scales)}"] if found.modules else []
    parts += [f"beside them {', '.join(found.others)}"] if found.others else []
    return ", ".join([*parts, f"{found.num_values:,} values", f"{found.num_bytes / 2**20:.1f} MiB"])


def _range(values: list[float] | list[int]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _said(lineage: Lineage | None) -> list[str]:
    if lineage is None:
        return ["no lineage: nothing says what it was trained on"]
    values = dataclasses.asdict(lineage)
    lines = [f"{name}: {value}" for name, value in values.items() if value and name not in NOT_SHOWN]
    if lineage.stop_ids:
        lines.append(f"stop_ids: {', '.join(map(str, lineage.stop_ids))}")
    if lineage.chat_template:
        lines.append("a chat template of its own")
    return lines
