"""Folders of models that see: what opens them, what of them is packed, and what is left when a tower is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from vision_rows import away, prompt_of
from vlm_families import Reference, picture

from serve.errors import ModelError
from serve.model.loading import LoadedModel, build_random, load
from serve.model.quantization import Quantization
from serve.model.weights import QUANTIZED


def packed_layers(model: LoadedModel) -> set[str]:
    return {path for path, layer in model.network.module.named_modules() if isinstance(layer, QUANTIZED)}


def test_a_text_models_folder_is_opened_without_mlx_vlm(model_folder: Path):
    """Importing it takes seconds."""
    code = (
        f"import sys; from serve.model.loading import load; m = load({str(model_folder)!r}); "
        "assert m.vision is None and not [n for n in sys.modules if n.startswith('mlx_vlm')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "smolvlm", "qwen3_vl_moe"])
def test_quantize_packs_the_language_part_and_leaves_towers_as_they_are(
    family: str, vlm_folder: Callable[[str], Path], vlm_reference: Callable[..., Reference]
):
    folder = vlm_folder(family)
    plain, packed = (
        load(str(folder), quantize=quantize, dequantize=False)
        for quantize in (None, Quantization(bits=8, group_size=32))
    )
    found = packed_layers(packed)
    assert len(found) >= 14
    assert all(path.startswith(f"{packed.network.text_path}.") for path in found)
    assert plain.vision is not None
    assert packed.vision is not None
    _, prompt = prompt_of(vlm_reference(family), plain.vision, picture(0), "what?")
    one, other = (model.vision.encode(prompt.media[0]).embeddings for model in (plain, packed))
    assert away(one, other) < 1e-6
    tokens = mx.array([[9, 8, 7, 6]])
    assert 0 < away(packed.network.hidden(tokens), plain.network.hidden(tokens)) < 0.2
    assert packed.config["quantization"]["bits"] == 8


@pytest.mark.parametrize("is_unpacked", [False, True])
def test_a_folder_whose_towers_are_packed_too_is_opened(
    is_unpacked: bool,
    vlm_folder: Callable[[str], Path],
    vlm_reference: Callable[..., Reference],
    tmp_path: Path,
):
    """As mlx-vlm's conversion leaves them, or not: the weights say what is packed."""
    source = vlm_folder("qwen2_vl")
    folder = Path(shutil.copytree(source, tmp_path / "packed"))
    module = load(str(source)).network.module
    how = {"group_size": 32, "bits": 8}
    nn.quantize(module, **how, class_predicate=lambda _, layer: isinstance(layer, nn.Linear))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(module.parameters())), metadata={"format": "mlx"}
    )
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": how}))
    model = load(str(folder), dequantize=is_unpacked)
    assert any("vision_tower" in path for path in packed_layers(model)) != is_unpacked
    assert model.vision is not None
    _, prompt = prompt_of(vlm_reference("qwen2_vl"), model.vision, picture(0), "what?")
    expected = load(str(source)).vision
    assert expected is not None
    one, other = (eyes.encode(prompt.media[0]).embeddings for eyes in (model.vision, expected))
    assert 0 < away(one, other) < 0.1


def test_a_folder_whose_tower_has_no_weights_runs_on_text_and_says_so(
    vlm_folder: Callable[[str], Path], model_folder: Path, tmp_path: Path
):
    """Text conversions of such models keep the tower's part of config.json."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "blind"))
    config = json.loads((folder / "config.json").read_text())
    tower = json.loads((vlm_folder("qwen3_vl") / "config.json").read_text())["vision_config"]
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": tower}))
    model = load(str(folder))
    assert model.vision is None
    assert any("text alone" in note for note in model.notes)


@pytest.mark.parametrize("is_of_tower", [True, False])
def test_a_folder_that_cannot_be_opened_whole_says_what_is_missing(
    is_of_tower: bool, vlm_folder: Callable[[str], Path], tmp_path: Path
):
    """Where mlx-lm can run its text alone, in a note."""
    folder = Path(shutil.copytree(vlm_folder("qwen2_vl"), tmp_path / "short"))
    weights = dict(mx.load(str(folder / "model.safetensors")))
    missing = "vision_tower.merger.mlp.0.weight" if is_of_tower else "language_model.model.norm.weight"
    del weights[missing]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    if is_of_tower:
        model = load(str(folder))
        assert model.vision is None
        assert any(missing in note for note in model.notes)
    else:
        with pytest.raises(ModelError, match=r"norm\.weight"):
            load(str(folder))


def test_a_model_that_sees_is_built_from_its_config_alone(vlm_folder: Callable[[str], Path]):
    """Another seed, other weights; the same one, the same."""
    one, same, other = (build_random(vlm_folder("qwen2_vl"), seed) for seed in (1, 1, 2))
    assert one.vision is not None
    tokens = mx.array([[9, 8, 7]])
    hidden = [model.network.hidden(tokens) for model in (one, same, other)]
    assert away(hidden[0], hidden[1]) == 0
    assert away(hidden[0], hidden[2]) > 0.1
