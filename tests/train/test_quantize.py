"""A base packed as it is loaded: its numbers, its name, and the whole way of an adapter trained on it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils
from rich.console import Console

from serve.adapters.formats.manifest import read_config, read_tensors
from serve.config import ServeConfig
from serve.engine.engine import Engine
from serve.engine.generate import generate
from serve.errors import AdapterError, ConfigError, ModelError
from serve.model.loading import load
from serve.model.quantization import Quantization
from train.after.export import Form, export, load_adapted
from train.recipe.recipe import load_recipe
from train.run import run

SPECS = [{"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)] + [
    {"mode": "mxfp4"},
    {"mode": "nvfp4"},
    {"mode": "mxfp8"},
]
TOKENS = mx.array([[5, 90, 17, 200, 33, 8]])
RECIPE = """
num_layers: -1
batch_size: 4
iters: 4
learning_rate: 1e-2
lora_parameters: {rank: 4, scale: 4.0}
steps_per_eval: 4
"""


def logits(module: nn.Module) -> np.ndarray:
    return np.array(module(TOKENS).astype(mx.float32))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture
def make_recipe(tmp_path, model_folder):
    """name, *overrides → a tiny recipe with `quantize`, writing to tmp_path/name."""
    rows = [{"prompt": f"{i}?", "completion": f"no {i % 3}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def make(name: str, *overrides: str):
        places = (f"model={model_folder}", f"adapter_path={tmp_path / name}", "val_set_size=3")
        data = f"datasets=[{{path: {tmp_path / 'rows.jsonl'}}}]"
        return load_recipe(tmp_path / "recipe.yaml", (*places, data, *overrides))

    return make


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_numbers_are_those_of_the_base_that_mlx_lm_packs(model_folder, spec):
    how = Quantization(**spec)
    theirs, config = mlx_lm_utils.load_model(Path(model_folder))
    with contextlib.redirect_stdout(None):
        mlx_lm_utils.quantize_model(theirs, config, how.group_size, how.bits, mode=how.mode)
    expected = logits(theirs)
    unpacked, packed = (load(str(model_folder), quantize=how, dequantize=d) for d in (True, False))
    # Small floats dequantize exactly; affine ones round once more on their way.
    for loaded in (unpacked, packed):
        assert np.abs(logits(loaded.network.module) - expected).max() < 1e-3 * np.abs(expected).max()
    plain = logits(load(str(model_folder)).network.module)
    assert np.abs(plain - expected).max() > 5e-3 * np.abs(expected).max(), "packing must show"
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    assert any(isinstance(m, kinds) for m in packed.network.module.modules())
    assert not any(isinstance(m, kinds) for m in unpacked.network.module.modules())
    assert any("computed with in full precision" in note for note in unpacked.notes)


def test_packed_weights_have_a_name_of_their_own(model_folder):
    names = {load(str(model_folder), quantize=Quantization(**spec)).fingerprint for spec in SPECS}
    names.add(load(str(model_folder)).fingerprint)
    assert len(names) == len(SPECS) + 1


def test_what_cannot_be_packed_is_left_and_said(model_folder):
    loaded = load(str(model_folder), quantize=Quantization(bits=4, group_size=64), dequantize=False)
    assert loaded.notes == ("quantize: 2 of 16 layers stay as they are, model.layers.0.mlp.down_proj first",)
    assert isinstance(loaded.network.layers[0].mlp.down_proj, nn.Linear)
    with pytest.raises(ModelError, match=r"no layer of .* can be packed in groups of 128"):
        load(str(model_folder), quantize=Quantization(bits=4, group_size=128))


def test_a_packed_base_is_not_packed_again(model_folder, tmp_path):
    theirs, config = mlx_lm_utils.load_model(Path(model_folder))
    with contextlib.redirect_stdout(None):
        theirs, config = mlx_lm_utils.quantize_model(theirs, config, 32, 4)
    mlx_lm_utils.save_model(tmp_path, theirs)
    mlx_lm_utils.save_config(config, tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"is quantized already; leave it out"):
        load(str(tmp_path), quantize=Quantization())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("quantize={bits: 7}", "found 7; mode affine takes 2 or 3 or 4 or 5 or 6 or 8"),
        ("quantize={mode: mxfp4, bits: 8}", "found 8; mode mxfp4 takes 4"),
        ("quantize={mode: nvfp4, group_size: 32}", "found 32; mode nvfp4 takes 16"),
        ("quantize={mode: int4}", "quantize.mode"),
    ],
)
def test_what_mlx_has_no_kernel_for_is_refused(make_recipe, line, said):
    with pytest.raises(ConfigError) as caught:
        make_recipe("x", line)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_trained_on_a_packed_base_is_served_and_exported_on_just_that(
    make_recipe, model_folder, make_request, tmp_path, kind, assert_drawn
):
    recipe = make_recipe("out", "quantize={mode: mxfp4}", f"fine_tune_type={kind}")
    console = quiet()
    run(recipe, console=console)
    assert "quantize: the weights are rounded to 4 bit mxfp4" in console.file.getvalue()
    folder = tmp_path / "out"
    config = read_config(folder)
    assert config.lineage.quantize == {"mode": "mxfp4", "bits": 4, "group_size": 32}

    with pytest.raises(
        AdapterError, match=r"packed to 4 bit mxfp4 in groups of 32 as it was loaded \(serve it"
    ):
        Engine(load(str(model_folder))).registry.load("a", folder)
    serving = ServeConfig(model=str(model_folder), quantize={"mode": "mxfp4"})
    engine = Engine(load(serving.model, quantize=serving.quantize))
    request = make_request("r", adapter=engine.registry.load("a", folder))
    answer = generate(engine, [request])[0].token_ids
    assert_drawn(request, answer, load_adapted(folder, config, str(model_folder)).network.module)

    report = export(folder, tmp_path / "fused", Form(dtype="float32"), console=quiet())
    assert report.top1_agreement > 0.9, "but for near-ties"
    assert report.kl_max < 1e-6


@pytest.mark.parametrize(
    ("overrides", "kind", "rank", "scale"),
    [
        (("fine_tune_type=dora",), "dora", 4, 4.0),
        (("lora_parameters={rank: 4, alpha: 8, use_rslora: true}",), "lora", 4, 4.0),
        (("lora_parameters={rank: 4, alpha: 8, init_lora_weights: pissa}",), "lora", 8, 2.0),
        (("loraplus_lr_ratio=16", "lora_parameters={rank: 4, keys: [q_proj, lm_head]}"), "lora", 4, 20.0),
    ],
    ids=["dora", "rslora", "pissa", "lora+ and head"],
)
def test_a_run_of_every_method_resumes_bit_for_bit_and_says_what_it_made(
    make_recipe, tmp_path, overrides, kind, rank, scale
):
    short = (*overrides, "learning_rate=1e-3", "save_every=2")
    run(make_recipe("whole", *short), console=quiet())
    half = tmp_path / "whole" / "checkpoints" / "step-000002"
    run(make_recipe("resumed", *short), resume=half, console=quiet())
    whole, resumed = (read_tensors(tmp_path / name) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(np.array(whole[name]), np.array(resumed[name])) for name in whole)
    config = read_config(tmp_path / "whole")
    assert (config.fine_tune_type, config.rank, config.scale) == (kind, rank, scale)
    tensors = {name.rsplit(".", 1)[-1]: value for name, value in whole.items()}
    assert tensors["lora_a"].shape[1] == rank
