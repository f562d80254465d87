"""What `lathe adapters convert`, `merge` and `extract` write: adapters or models in, a folder out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.adapters.fitting.fit import fit
from serve.adapters.fitting.own import EXPERT, STACKS
from serve.adapters.formats.config import AdapterConfig, Layout
from serve.adapters.formats.files import PEFT_TENSORS_FILE
from serve.adapters.formats.layouts import OF_MLX, OF_PEFT, FolderContents, OfPeft, as_mlx, of_peft, restored
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import TENSORS_FILE, content_hash, write_files
from serve.adapters.formats.peft.writing import as_peft, our_names
from serve.adapters.formats.tensors import check_distinct, paths_of, without_containers
from serve.adapters.sums.expression import WEIGHT
from serve.adapters.tools import merging
from serve.adapters.tools.extraction import Extraction
from serve.adapters.tools.factors import Factors, tensors_of
from serve.adapters.tools.merged_lineage import merged_lineage
from serve.adapters.tools.opened import Opened, open_adapter
from serve.errors import AdapterError, ConfigError, StorageError
from serve.model.loading import LoadedModel
from serve.model.template_rules import make_template
from serve.model.vocabulary import vocabulary_hash

LAYOUTS: Mapping[str, Layout] = {"mlx": "mlx-lm", "peft": "peft"}
"""What --to takes."""
TENSORS_FILES: Mapping[Layout, tuple[str, str]] = {
    "mlx-lm": (TENSORS_FILE, "mlx"),
    "peft": (PEFT_TENSORS_FILE, "pt"),
}
"""Of each layout, its file of tensors, and the framework that this names."""

WEIGHTS = (".weight", ".base_weight")


@dataclass(frozen=True)
class Written:
    """A folder that a tool has made. `notes`: what a person should know of how."""

    out: str
    layout: Layout
    num_modules: int
    notes: tuple[str, ...] = ()


def convert(path: Path, out: Path, layout: Layout, base: LoadedModel | None = None) -> Written:
    """The adapter in another layout; and back, the same bytes.

    base  needed where the names, or the experts, of one library are not the other's
    """
    check_out(out)
    opened = open_adapter(path, base.network if base else None)
    if opened.files.format == layout:
        raise ConfigError(f"{path} is in {layout}'s layout already")
    if layout == "peft":
        return _save(out, _to_peft(opened, base.name if base else ""), opened.config.lineage)
    return _save(out, _to_mlx(opened, base), opened.config.lineage)


def merge(
    parts: Sequence[str],
    out: Path,
    how: merging.Merge,
    layout: Layout | None,
    base: LoadedModel | None = None,
) -> Written:
    """Adapters, `PATH:WEIGHT` each, as one.

    layout  None: the first part's
    """
    check_out(out)
    how.check()
    named = [parse_part(part) for part in parts]
    opened = [open_adapter(Path(name), base.network if base else None) for name, _ in named]
    for each in opened:
        each.check_finite()
        if each.others:
            raise AdapterError(
                f"{each.name} brings {', '.join(each.others)}; updates of low rank alone are merged"
            )
    names = [f"{each.name} (part {number})" for number, each in enumerate(opened, 1)]
    modules = _by_one_name(opened)
    weights = [weight for _, weight in named]
    made = merging.merge(modules, weights, how, names)
    text = "+".join(f"{name}:{weight:g}" for name, weight in named)
    lineages = {name: each.config.lineage for name, each in zip(names, opened, strict=True)}
    lineage = merged_lineage(lineages, parent=text, created=_now())
    config = AdapterConfig("lora", -1, scale=1.0)
    to: Layout = layout or opened[0].files.format
    if to == "mlx-lm" and base is None:
        for each in opened:
            _check_names(each)
    return _save(
        out, _contents(tensors_of(made), config, to, base.name if base else _base_of(opened)), lineage
    )


def parse_part(text: str) -> tuple[str, float]:
    """'PATH:WEIGHT' or 'PATH' → path and weight. ConfigError for a weight that is no finite number."""
    if Path(text).exists():
        return text, 1.0
    path, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    if not path or not WEIGHT.fullmatch(weight) or not math.isfinite(float(weight)):
        raise ConfigError(f"{text!a:.200}: expected PATH:WEIGHT, the weight a finite number like 0.5 or -1")
    return path, float(weight)


def save_extraction(
    found: Extraction, out: Path, layout: Layout, tuned: LoadedModel, base: LoadedModel
) -> Written:
    """The adapter that `extract` made of two models."""
    check_out(out)
    config = AdapterConfig("lora", -1, scale=1.0)
    lineage = Lineage(
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        template_hash=make_template(base.tokenizer).hash,
        vocabulary_hash=vocabulary_hash(base.tokenizer),
        recipe_hash="",
        data_hash="",
        created=_now(),
        lathe_version=metadata.version("mlx-lathe"),
        parent=tuned.name,
        parent_hash=tuned.fingerprint,
        objective="extract",
    )
    return _save(out, _contents(tensors_of(found.modules), config, layout, base.name), lineage)


def check_out(out: Path) -> None:
    """ConfigError where something is there already: files of two layouts in one folder would be taken for one."""
    try:
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error}") from error
    if not is_free:
        raise ConfigError(f"{out} is there already; name a folder that is not, or an empty one")


def _by_one_name(opened: Sequence[Opened]) -> list[dict[str, Factors]]:
    """Each part's modules, by the path that the first part with such a module has for it."""
    by_end = [each.modules_by_end() for each in opened]
    paths: dict[str, str] = {}
    for modules in by_end:
        for end, (path, _) in modules.items():
            paths.setdefault(end, path)
    return [{paths[end]: module for end, (_, module) in modules.items()} for modules in by_end]


def _to_peft(opened: Opened, base: str) -> FolderContents:
    kept = _kept(opened)
    before = restored(opened.tensors, opened.config, kept) if kept else None
    lineage = opened.config.lineage
    base = base or (lineage.base_model if lineage else "")
    if kept is None or before is None:
        contents = as_peft(opened.tensors, opened.config, base)
        settings = contents.settings | {OF_MLX: _without_lineage(opened.files.raw)}
        return dataclasses.replace(contents, settings=settings)
    contents = as_peft(*before, base)
    tensors = {kept.names.get(name, name): tensor for name, tensor in contents.tensors.items()}
    return dataclasses.replace(contents, tensors=tensors, settings=dict(kept.config))


def _kept(opened: Opened) -> OfPeft | None:
    """What the folder says that it was made of; None where it says nothing that can be read."""
    raw = opened.files.raw.get(OF_PEFT)
    try:
        return OfPeft(**raw) if isinstance(raw, dict) else None
    except TypeError:
        return None


def _to_mlx(opened: Opened, base: LoadedModel | None) -> FolderContents:
    copies = [] if base is None else _copies(opened, base)
    tensors = {name: tensor for name, tensor in opened.tensors.items() if name not in copies}
    config = opened.config
    if base is None:
        _check_names(opened)
        tensors = _renamed(tensors)
    contents = as_mlx(tensors, config)
    if copies:
        note = f"{', '.join(copies)}: the base's own, and left out"
        contents = dataclasses.replace(contents, notes=(*contents.notes, note))
    settings = contents.settings
    was = opened.files.raw.get(OF_MLX)
    if isinstance(was, dict) and _is_as(settings, was):
        return dataclasses.replace(contents, settings=dict(was))
    kept = of_peft(tensors, config, _without_lineage(opened.files.raw), contents)
    kept, notes = _way_back(opened, contents, kept)
    settings = settings | {OF_PEFT: dataclasses.asdict(kept)}
    return dataclasses.replace(contents, settings=settings, notes=(*contents.notes, *notes))


def _copies(opened: Opened, base: LoadedModel) -> list[str]:
    """Weights that PEFT saved along and that are the base's: what would be done with them says so."""
    if not any(name.endswith(WEIGHTS) for name in opened.others):
        return []
    updates = fit(opened.name, opened.files.read(), opened.files.config, base.network)
    whole = {path for path, update in updates.items() if update.a is None}
    return [name for name in opened.others if name.endswith(WEIGHTS) and name.rpartition(".")[0] not in whole]


def _check_names(opened: Opened) -> None:
    """AdapterError where only the base can tell what a layer is called in mlx-lm, or is made of."""
    found = {path: EXPERT.fullmatch(path) for path in paths_of(opened.tensors)}
    experts = [path for path, match in found.items() if match and match["leaf"] in STACKS]
    if experts:
        raise AdapterError(
            f"{opened.name} adapts experts ({experts[0]}), which mlx-lm keeps in other forms than Hugging Face; name "
            f"their base with --base"
        )


def _renamed(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """By mlx-lm's names; ranks and scales are found by what all libraries call a module."""
    ours = our_names(tensors)
    check_distinct("in mlx-lm's layout", ours)
    return {ours[name]: tensor for name, tensor in tensors.items()}


def _is_as(settings: Mapping[str, Any], was: Mapping[str, Any]) -> bool:
    """Whether an earlier config still says the same of the tensors."""
    before, now = was.get("lora_parameters"), settings.get("lora_parameters")
    is_same_kind = was.get("fine_tune_type", "lora") == settings.get("fine_tune_type")
    if not isinstance(before, dict) or not isinstance(now, dict) or not is_same_kind:
        return False
    keys = before.get("keys")
    has_all = keys is None or set(now["keys"]) <= {*keys}
    scale = before.get("scale", before.get("alpha", 0) / (before.get("rank") or 1))
    return has_all and before.get("rank") == now["rank"] and math.isclose(scale, now["scale"], rel_tol=1e-12)


def _way_back(opened: Opened, contents: FolderContents, kept: OfPeft) -> tuple[OfPeft, list[str]]:
    """With the names that tensors had in the file, found by going back; and which of them come back otherwise."""
    config = AdapterConfig(
        contents.settings["fine_tune_type"],
        -1,
        contents.settings["lora_parameters"]["rank"],
        contents.settings["lora_parameters"]["scale"],
    )
    before = restored(contents.tensors, config, kept)
    assert before is not None, "zeros that were filled in are zeros"
    raw = opened.files.read_raw()
    by_end = {without_containers(name): name for name in raw}
    try:
        made = as_peft(*before, "").tensors
    except AdapterError as error:
        return kept, [f"there is no way back to PEFT's layout: {error}"]
    names = {name: by_end.get(without_containers(name), name) for name in made}
    others = [
        name
        for name, was in names.items()
        if was not in raw or not bool(mx.array_equal(made[name], raw[was]))
    ]
    notes = [f"{len(others)} of {len(raw)} tensors come back otherwise, {others[0]} first"] if others else []
    if len(set(names.values())) < len(raw):
        notes.append(f"{len(raw) - len(set(names.values()))} tensors do not come back")
    return dataclasses.replace(kept, names={name: was for name, was in names.items() if was != name}), notes


def _contents(
    tensors: Mapping[str, mx.array], config: AdapterConfig, layout: Layout, base: str
) -> FolderContents:
    ours = _renamed(tensors)
    return as_peft(ours, config, base) if layout == "peft" else as_mlx(ours, config)


def _save(out: Path, contents: FolderContents, lineage: Lineage | None) -> Written:
    settings = {name: value for name, value in contents.settings.items() if name != "lineage"}
    if lineage is not None:
        lineage = dataclasses.replace(lineage, content_hash=content_hash(contents.tensors))
        settings["lineage"] = dataclasses.asdict(lineage)
    tensors_file, framework = TENSORS_FILES[contents.layout]
    write_files(out, contents.tensors, settings, tensors_file=tensors_file, framework=framework)
    return Written(str(out), contents.layout, contents.num_modules, contents.notes)


def _without_lineage(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != "lineage"}


def _base_of(opened: Sequence[Opened]) -> str:
    """The name of the first part's base, for PEFT's config."""
    lineage, raw = opened[0].config.lineage, opened[0].files.raw
    return lineage.base_model if lineage else str(raw.get("base_model_name_or_path") or "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
