"""A fused model as a Hugging Face folder, in the form that was asked for, with all that its base has beside weights.

Towers and projectors of a model that sees or hears go with it as they are; they are packed only where that is asked.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from serve.adapters.formats.header import check_whole
from serve.errors import AdapterError, ConfigError, StorageError
from serve.model.loading import DTYPES, LOAD_ERRORS, LoadedModel, cast
from serve.model.network import Network
from serve.model.towers import load_with_towers
from serve.model.weights import QUANTIZED
from serve.synced import sync

WEIGHTS_FILES = "model*.safetensors"
COPIED = ("*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "*.json")
COPIED_FOLDERS = ("additional_chat_templates",)
NOT_COPIED = ("config.json", "model.safetensors.index.json", "fidelity.json", "hf_quant_config.json")
"""What speaks of the base's own weights."""
PACKING_KEYS = ("quantization", "quantization_config")
DTYPE_KEYS = ("torch_dtype", "dtype")
GROUP_SIZES = (32, 64, 128)
MLX_VLM_LANES = 64
"""mlx-vlm opens no layer as packed whose weights are no multiple of these in number."""
Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class Form:
    """How an export's weights are stored.

    bits             quantize them (affine, in groups of `group_size`); None: full precision
    dtype            of the weights that are not quantized; None: as the base stores them
    quantize_vision  also the linear layers of towers and projectors
    """

    bits: Literal[4, 8] | None = None
    group_size: int = 64
    dtype: Dtype | None = None
    quantize_vision: bool = False

    def check(self) -> None:
        """ConfigError for a group size that MLX has no kernels for, and for what asks for nothing."""
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"group_size: found {self.group_size}; MLX quantizes in groups of 32, 64 or 128"
            )
        if self.quantize_vision and self.bits is None:
            raise ConfigError("--quantize-vision: without --bits nothing is quantized; name --bits 4 or 8")

    def check_fits(self, network: Network, name: str) -> None:
        """ConfigError where it asks for what the model does not have."""
        if self.quantize_vision and not network.has_towers:
            raise ConfigError(f"--quantize-vision: {name} is a text model: it has no towers")


@dataclass(frozen=True)
class Written:
    """What was stored: the dtype of unquantized weights, and what could not be quantized as asked."""

    dtype: str
    unpacked: tuple[str, ...] = ()
    towers: Literal["plain", "quantized"] | None = None
    """None: there are none."""


def write_model(folder: Path, model: LoadedModel, form: Form) -> Written:
    """Put a model in full precision into a folder that is there and empty. Its network is packed in place.

    ConfigError where nothing can be packed so, StorageError where the weights cannot be written.
    """
    module = model.network.module
    stored = form.dtype or _stored_dtype(model.path)
    cast(module, DTYPES[stored])
    saved = _config(model.config, stored) | {"torch_dtype": stored}
    unpacked: tuple[str, ...] = ()
    if form.bits is not None:
        saved, unpacked = _pack(model.network, saved, form)
    _copy_beside(model.path, folder)
    try:
        mlx_lm_utils.save_model(folder, module)
    except RuntimeError as error:
        raise StorageError(f"{folder}: {error}") from error
    mlx_lm_utils.save_config(saved, folder / "config.json", keep_vision_config=model.network.has_towers)
    for file in folder.glob(WEIGHTS_FILES):
        check_whole(file)
        sync(file)
    if model.network.has_towers:
        _check_read_back(folder, module)
    towers: Literal["plain", "quantized"] = "quantized" if form.quantize_vision else "plain"
    return Written(stored, unpacked, towers if model.network.has_towers else None)


def _check_read_back(folder: Path, module: nn.Module) -> None:
    """AdapterError where mlx-vlm's loader puts other weights in the place of what was written.

    It prepares every checkpoint as if it were Hugging Face's, its own too: some families take the head from the
    embeddings then, and some turn kernels around a second time.
    """
    written: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    try:
        found: dict[str, mx.array] = dict(tree_flatten(load_with_towers(folder).parameters()))
    except LOAD_ERRORS as error:
        raise AdapterError(f"mlx-vlm cannot open what was written: {error}") from error
    others = sorted(
        name
        for name in written.keys() | found.keys()
        if name not in written
        or name not in found
        or written[name].shape != found[name].shape
        or not mx.array_equal(written[name], found[name], equal_nan=True)
    )
    if others:
        raise AdapterError(
            f"mlx-vlm's loader of {type(module).__module__.split('.')[-1]} puts other weights in place of "
            f"{others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}, so no folder can hold this "
            f"fine-tune; train without these weights, or serve the adapter on its base"
        )


def _config(said: dict[str, Any], stored: str) -> dict[str, Any]:
    """The base's config.json for weights in full precision, of this dtype, in all its parts."""
    made = {name: value for name, value in said.items() if name not in PACKING_KEYS}
    for name, value in made.items():
        if name.endswith("_config") and isinstance(value, dict):
            made[name] = _config(value, stored)
    made |= {key: stored for key in DTYPE_KEYS if key in said}
    return made


def _pack(network: Network, saved: dict[str, Any], form: Form) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(config.json with how it is packed, what could not be packed); the network is packed in place."""
    wanted, layers = _wanted(network, form), _layers(network, form)
    odd = {path for path, layer in layers.items() if layer.weight.shape[-1] % form.group_size}
    if odd and len(odd) == len(layers):
        first = min(odd)
        raise ConfigError(
            f"group_size: {form.group_size} divides no layer's inputs: {first} has "
            f"{layers[first].weight.shape[-1]} ({len(odd)} layers)"
        )
    with contextlib.redirect_stdout(None):  # mlx-lm prints the bits per weight
        _, packed = mlx_lm_utils.quantize_model(
            network.module, saved, form.group_size, form.bits, quant_predicate=wanted
        )
    now = dict(network.module.named_modules())
    left = [path for path in layers if not isinstance(now[path], QUANTIZED)]
    if form.quantize_vision:
        left += _never_packed(network)
    return packed, tuple(sorted(left))


def _wanted(network: Network, form: Form) -> Callable[[str, nn.Module], Any]:
    """Whether, and how, mlx-lm shall pack a layer whose inputs are whole groups."""
    own = getattr(network.module, "quant_predicate", None) or (lambda path, layer: True)
    layers = _layers(network, form)

    def wanted(path: str, layer: nn.Module) -> Any:
        if path not in layers or (network.has_towers and layer.weight.size % MLX_VLM_LANES):
            return False
        return own(path, layer)

    return wanted


def _layers(network: Network, form: Form) -> dict[str, nn.Module]:
    """What is to be packed, where it can be: all there is of the language part, and of towers what is linear.

    Tables of positions are left out: families read them, not through the layer.
    """
    named = {path: m for path, m in network.module.named_modules() if hasattr(m, "to_quantized")}
    return {
        path: layer
        for path, layer in named.items()
        if _is_of_language(network, path) or (form.quantize_vision and isinstance(layer, nn.Linear))
    }


def _is_of_language(network: Network, path: str) -> bool:
    return not network.has_towers or path.startswith(f"{network.text_path}.")


def _never_packed(network: Network) -> Iterator[str]:
    """Matrices and kernels of towers that are no linear layers' (convolutions, tables, bare arrays)."""
    for name, value in tree_flatten(network.module.parameters()):
        if value.ndim > 1 and not _is_of_language(network, name):
            path = name.rpartition(".")[0]
            layer = _at(network.module, path)
            if not isinstance(layer, (nn.Linear, *QUANTIZED)):
                yield path if name.endswith(".weight") else name


def _at(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split(".") if path else ():
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def _stored_dtype(path: Path) -> Dtype:
    """What most of the base's floating weights are stored as; float32 where there are none."""
    sizes = dict.fromkeys(DTYPES, 0)
    for file in path.glob("*.safetensors"):
        for tensor in _lazily(file).values():
            name = str(tensor.dtype).removeprefix("mlx.core.")
            if name in sizes:
                sizes[name] += tensor.size
    best: Any = max(sizes, key=lambda name: sizes[name])
    return best if sizes[best] else "float32"


def _lazily(file: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict), "a safetensors file is a dict of tensors"
    return tensors


def _copy_beside(source: Path, folder: Path) -> None:
    """Tokenizer, processors, chat templates, generation settings and model code, as the base has them."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.name not in NOT_COPIED:
                shutil.copyfile(file, folder / file.name)
    for name in COPIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
