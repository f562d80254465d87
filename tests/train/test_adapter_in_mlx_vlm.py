"""An adapter of a model that sees, as it is kept, opens in mlx-vlm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import write_adapter
from serve.model.loading import load
from serve.model.network import Network
from train.adapters.adapt import AdapterSettings, adapter_tensors, add_lora, manifest_keys


def test_mlx_vlm_opens_an_adapter_that_was_kept_and_computes_the_same(
    vlm_folder: Callable[[str], Path], tmp_path: Path
):
    import mlx_vlm

    folder = vlm_folder("qwen2_vl")
    network = load(str(folder)).network
    tokens = mx.array([[9, 8, 7, 6]])
    plain = network.hidden(tokens)
    adapted = add_lora(network, AdapterSettings(rank=3, scale=2.0))
    learned = [
        (path, mx.random.normal(value.shape) * 0.2)
        for path, value in tree_flatten(network.module.trainable_parameters())
        if path.endswith("lora_b")
    ]
    network.module.load_weights(learned, strict=False)
    expected = network.hidden(tokens)
    config = AdapterConfig("lora", -1, 3, 2.0, keys=manifest_keys(network, adapted))
    write_adapter(tmp_path / "adapter", adapter_tensors(network), config)
    theirs, _ = mlx_vlm.load(str(folder), adapter_path=str(tmp_path / "adapter"))
    theirs.eval()
    found = Network(theirs).hidden(tokens)
    size = mx.abs(expected).max()
    assert mx.abs(found - expected).max() < 1e-4 * size
    assert mx.abs(plain - expected).max() > 0.05 * size
