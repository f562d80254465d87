"""An adapter on disk, of whichever layout → its config, what its tensors are, and the tensors, in one form.

FOLDER/adapters.safetensors      mlx-lm's layout, with adapter_config.json
FOLDER/adapter_model.safetensors PEFT's layout, with adapter_config.json
FILE.safetensors                 of either, with adapter_config.json or FILE.json beside it, or PEFT's config inside

Fits nothing to a model. What the form is: PATH.lora_a [D, R], PATH.lora_b [R, O], of stacks of experts [E, R, D] and
[E, O, R], as mlx-lm has them; PATH.m [O]; PATH.weight [O, D] and PATH.bias [O] of what trained whole; PATH.lora_bias
[O], times the scale; PATH.base_weight [O, D], PEFT's copy of the base's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.adapters.formats.config import PEFT_MARK, AdapterConfig, Layout, config_of, is_pefts
from serve.adapters.formats.header import TensorSpec, read_header, read_specs
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE, load_tensors, read_text
from serve.adapters.formats.peft.reading import Piece, arrange, parse_peft
from serve.adapters.formats.values import parse_object
from serve.beside import evaluate
from serve.errors import AdapterError, NotFoundError

PEFT_TENSORS_FILE = "adapter_model.safetensors"
SUFFIX = ".safetensors"
CONFIG_INSIDE = "lora_adapter_metadata"
"""Where a file's metadata holds its config, if it does."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHARDS = ".safetensors.index.json"


@dataclass(frozen=True)
class AdapterFiles:
    """What was found, before any tensor is read."""

    path: Path
    """As it was named."""
    tensors_path: Path
    config_path: Path
    """The file of tensors where that holds the config too."""
    format: Layout
    config: AdapterConfig
    raw: Mapping[str, Any]
    """The config as it was written."""
    specs: Mapping[str, TensorSpec]
    pieces: Mapping[str, Piece]
    """By our name of a tensor: what in the file it is made of."""
    twice: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the file that are not needed → the ones that they have to be; "" where that is no matter."""

    @property
    def sources(self) -> dict[str, str]:
        """By our name of a tensor, the file's."""
        return {name: piece.raw for name, piece in self.pieces.items()}

    def read(self) -> dict[str, mx.array]:
        """The tensors in our form, evaluated. AdapterError where they are not what was found: torn, or replaced."""
        return self.arranged(self.read_raw())

    def read_raw(self) -> dict[str, mx.array]:
        """The tensors as the file has them, likewise checked."""
        raw = load_tensors(self.tensors_path, self.config.lineage)
        if raw.keys() != {*self.sources.values(), *self.twice}:
            raise AdapterError(f"{self.tensors_path}: holds other tensors than a moment ago; it was replaced")
        return raw

    def arranged(self, raw: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Tensors as the file has them → in our form, evaluated. AdapterError where two that should be one differ."""
        for name, other in self.twice.items():
            if other and not bool(mx.array_equal(raw[name], raw[other])):
                raise AdapterError(f"{self.tensors_path}: {name} and {other} are one, and differ")
        tensors = {name: piece.made(raw[piece.raw]) for name, piece in self.pieces.items()}
        evaluate(tensors)
        return tensors


def read_adapter(path: Path) -> AdapterFiles:
    """Look at an adapter: its config and its tensors' header.

    NotFoundError where nothing is; AdapterError names what is wrong with what is there, all of the config at once.
    """
    tensors_path, config_path = find_files(path)
    if config_path is None:
        config_path, raw = tensors_path, _config_inside(tensors_path)
    else:
        raw = parse_object(read_text(config_path), config_path)
    is_peft = is_pefts(raw)
    _check_one_layout(tensors_path, config_path, is_peft)
    if is_peft:
        peft = parse_peft(raw, config_path)
        specs = _some(tensors_path)
        pieces, config, twice = arrange(specs, peft, tensors_path)
    else:
        config = config_of(raw, config_path)
        specs = _some(tensors_path)
        pieces, twice = {name: Piece(name, "") for name in specs}, {}
    made = {name: _spec(piece, specs[piece.raw]) for name, piece in pieces.items()}
    kind: Layout = "peft" if is_peft else "mlx-lm"
    return AdapterFiles(path, tensors_path, config_path, kind, config, raw, made, pieces, twice)


def _some(path: Path) -> dict[str, TensorSpec]:
    specs = read_specs(path)
    if not specs:
        raise AdapterError(f"{path}: holds no tensors")
    return specs


def located(path: str | Path) -> Path:
    """Where that is, absolute. Links are followed, but for a file's own: its config is beside the link.

    NotFoundError where no path can be.
    """
    try:
        named = Path(path).expanduser()
        resolved = named.resolve()
        return resolved if resolved.is_dir() else named.parent.resolve() / named.name
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, too long, a null byte
        reason = getattr(error, "strerror", None) or error  # without the path once more
        raise NotFoundError(f"no adapter folder at {str(path)!a:.200}: {reason}") from error


def find_files(path: Path) -> tuple[Path, Path | None]:
    """The file of tensors and that of the config, neither opened; None: it is in the file of tensors.

    NotFoundError where nothing is; AdapterError for what is no adapter.
    """
    if os.path.isdir(path):  # unlike Path.is_dir it says no to what is too long, or not allowed
        return _of_folder(path), path / CONFIG_FILE
    if not os.path.isfile(path):
        raise NotFoundError(f"no adapter folder at {str(path)!a:.200}")
    if path.suffix in PICKLES:
        raise AdapterError(_pickled(path))
    if path.suffix != SUFFIX:
        raise AdapterError(f"{path}: a folder or a {SUFFIX} file was expected")
    beside = (path.with_suffix(".json"), path.parent / CONFIG_FILE)
    return path, next((each for each in beside if os.path.exists(each)), None)


def _of_folder(folder: Path) -> Path:
    """Its file of tensors, of one layout."""
    known = [name for name in (TENSORS_FILE, PEFT_TENSORS_FILE) if os.path.lexists(folder / name)]
    if len(known) > 1:
        raise AdapterError(
            f"{folder}: holds {TENSORS_FILE}, mlx-lm's, and {PEFT_TENSORS_FILE}, PEFT's; one of them was expected"
        )
    if known:
        return folder / known[0]
    names = sorted(os.listdir(folder)) if os.access(folder, os.R_OK | os.X_OK) else []
    for name in names:
        if name.endswith(PICKLES) and name.startswith("adapter"):
            raise AdapterError(_pickled(folder / name))
        if name.endswith(SHARDS):
            raise AdapterError(f"{folder / name}: the adapter is in several files; one {SUFFIX} was expected")
    raise AdapterError(
        f"{folder} is not an adapter folder: it has no {TENSORS_FILE}, mlx-lm's, and no {PEFT_TENSORS_FILE}, PEFT's"
    )


def _pickled(path: Path) -> str:
    return (
        f"{path}: is pickled, which runs code of whoever wrote it when it is read, so it is not; save the adapter as "
        f"{PEFT_TENSORS_FILE} (PEFT: safe_serialization=True)"
    )


def _config_inside(path: Path) -> dict[str, Any]:
    _, metadata = read_header(path)
    if CONFIG_INSIDE not in metadata:
        raise AdapterError(
            f"{path}: has no config: neither {path.with_suffix('.json').name} nor {CONFIG_FILE} is beside it, and "
            f"its metadata has no {CONFIG_INSIDE}"
        )
    raw = parse_object(metadata[CONFIG_INSIDE], path)
    return {PEFT_MARK: "LORA", **raw}


def _check_one_layout(tensors_path: Path, config_path: Path, is_peft: bool) -> None:
    mixed = {TENSORS_FILE: is_peft, PEFT_TENSORS_FILE: not is_peft}
    if mixed.get(tensors_path.name, False) and config_path.name == CONFIG_FILE:
        written, expected = ("PEFT", PEFT_TENSORS_FILE) if is_peft else ("mlx-lm", TENSORS_FILE)
        raise AdapterError(
            f"{config_path}: is in {written}'s layout, which goes with {expected}, and beside it is "
            f"{tensors_path.name}"
        )


def _spec(piece: Piece, spec: TensorSpec) -> TensorSpec:
    # Lazy: the shape comes out, and nothing is computed.
    return TensorSpec(tuple(piece.made(mx.zeros(spec.shape)).shape), spec.dtype)
