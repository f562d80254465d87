"""An adapter's folder, or a full fine-tune's, and its base → the model that they make, unfused."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import read_adapter
from serve.errors import AdapterError
from serve.model.loading import LoadedModel, build_random, load, resolve
from serve.model.loading import read_config as read_model_config
from serve.model.network import Network
from serve.model.quantization import Quantization
from train.adapters.adapt import set_tensors, train_all
from train.adapters.place import place_adapter


def load_adapted(
    adapter: Path,
    config: AdapterConfig,
    base: str,
    *,
    dequantize: bool | None = None,
    is_other_base_fine: bool = False,
) -> LoadedModel:
    """The base with the adapter in place, unfused. AdapterError if it was trained on other weights."""
    tensors = read_adapter(adapter).read()
    if config.fine_tune_type == "full":
        return _load_full(tensors, config, base, adapter, is_other_base_fine)
    model = load(base, dequantize=dequantize, quantize=packing_of(config, base))
    _check_base(model, config, base, is_other_base_fine)
    place_adapter(model.network, tensors, config, str(adapter))
    model.network.module.eval()
    return model


def packing_of(config: AdapterConfig, base: str) -> Quantization | None:
    """How the base was packed when the adapter was trained; None too where `base` is a packed folder already."""
    how = config.lineage.quantize if config.lineage else None
    return Quantization(**how) if how and "quantization" not in read_model_config(resolve(base)) else None


def _load_full(
    tensors: dict[str, mx.array], config: AdapterConfig, base: str, adapter: Path, is_other_base_fine: bool
) -> LoadedModel:
    path = resolve(base)
    has_weights = any(path.glob("*.safetensors"))
    model = load(base) if has_weights else build_random(path, 0, name=base)
    _check_base(model, config, base, is_other_base_fine)
    own = _in_language_part(tensors, model.network)
    if not has_weights:
        _check_has_towers(own, model.network, adapter)
    train_all(model.network, num_layers=config.num_layers)
    set_tensors(model.network, own, str(adapter), with_frozen=True)
    return model


def _in_language_part(tensors: dict[str, mx.array], network: Network) -> dict[str, mx.array]:
    """By the model's own names: what mlx-lm trained of its text part is named as if that were the whole."""
    there = dict(tree_flatten(network.module.parameters()))
    inside = f"{network.text_path}." if network.has_towers else ""
    return {
        f"{inside}{name}" if name not in there and f"{inside}{name}" in there else name: tensor
        for name, tensor in tensors.items()
    }


def _check_has_towers(tensors: dict[str, mx.array], network: Network, adapter: Path) -> None:
    """AdapterError where neither the base nor the fine-tune has weights for what the model sees with."""
    named = [name for name, _ in tree_flatten(network.module.parameters())]
    outside = [name for name in named if not name.startswith(f"{network.text_path}.")]
    missing = [name for name in outside if name not in tensors] if network.has_towers else []
    if missing:
        raise AdapterError(
            f"{adapter}: the base has no weights, and of its towers the fine-tune has not all: {missing[0]} and "
            f"{len(missing) - 1} more are random; train them too (train_vision), or name a base that has them"
        )


def _check_base(model: LoadedModel, config: AdapterConfig, base: str, is_other_base_fine: bool) -> None:
    lineage = config.lineage
    if is_other_base_fine or lineage is None or lineage.base_fingerprint == model.fingerprint:
        return
    raise AdapterError(
        f"the adapter was trained on {lineage.base_model} ({lineage.base_fingerprint[:19]}…), but {base} holds "
        f"other weights ({model.fingerprint[:19]}…); name the right base with --base, or force it"
    )
