"""What is exported is what was trained, and the number that says so is right."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from rich.console import Console

from serve.adapters.lora import LoRALinear
from serve.adapters.manifest import AdapterConfig, Lineage, read_config, read_tensors, write_adapter
from serve.errors import AdapterError, ConfigError, DataError
from serve.model.loading import load
from train.adapters.adapt import AdapterSettings, add_lora, trainable_tensors
from train.after.export import compare, export, fuse, log_probabilities
from train.loop.loss import find_targets

FAMILIES = ("qwen3", "llama", "gemma3_text", "gemma2", "phi3", "olmo2", "qwen3_moe")
NEARLY_ALL = 0.9
"""Fused weights and an adapter beside its base round otherwise, so the two likeliest tokens of a near-tie may change
places; how far the distributions are apart is what the divergence says."""


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "rows.jsonl"
    turns = [("what?", "that"), ("where is it?", "over there"), ("when " * 9, "soon")]
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in turns * 3
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def adapter(make_adapter, model_folder, tmp_path) -> Path:
    """A random adapter of the lively model that knows its base."""
    made = make_adapter(1, size=0.1)
    lineage = Lineage(str(model_folder), load(str(model_folder)).fingerprint, "", "", "", "", "")
    config = AdapterConfig("lora", -1, 4, 2.0, lineage=lineage)
    write_adapter(tmp_path / "adapter", read_tensors(made), config)
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_weights_answer_as_the_adapter_does(tiny_network, make_batch, family):
    network, batch = tiny_network(family), make_batch([9, 17, 5])
    plain = np.array(network.module(mx.array(batch.tokens)))
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    for name, tensor in trainable_tensors(network).items():
        network.module.load_weights([(name, tensor + 0.05)], strict=False)
    adapted = np.array(network.module(mx.array(batch.tokens)))
    fuse(network)
    assert not any(isinstance(module, LoRALinear) for _, module in network.module.named_modules())
    fused = np.array(network.module(mx.array(batch.tokens)))
    assert np.abs(fused - adapted).max() < 1e-4 * np.abs(adapted).max()
    assert np.abs(adapted - plain).max() > 1e-2 * np.abs(plain).max()


def test_a_small_update_on_a_quantized_base_survives_the_fuse(tiny_network):
    """Re-quantizing loses it: the realised update then points nearly elsewhere."""
    network = tiny_network()
    nn.quantize(network.module, group_size=32, bits=4)
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    layer = network.layers[0].mlp.up_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 1e-3
    wanted = np.array((2.0 * layer.lora_a @ layer.lora_b).T)
    base = layer.linear
    before = np.array(mx.dequantize(base.weight, base.scales, base.biases, base.group_size, base.bits))
    assert np.linalg.norm(wanted) < 0.02 * np.linalg.norm(before)
    fuse(network)
    assert type(network.layers[0].mlp.up_proj) is nn.Linear
    realised = np.array(network.layers[0].mlp.up_proj.weight) - before
    cosine = (wanted * realised).sum() / np.linalg.norm(wanted) / np.linalg.norm(realised)
    assert cosine > 0.999


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"bits": 8}, {"bits": 4}])
def test_an_export_opens_in_mlx_lm_and_reports_its_own_loss(
    adapter, model_folder, rows_file, tmp_path, options
):
    if "bits" in options:
        options = {**options, "group_size": 32}
    report = export(adapter, tmp_path / "out", data=rows_file, console=quiet(), **options)
    assert json.loads((tmp_path / "out" / "fidelity.json").read_text())["kl_mean"] == report.kl_mean
    assert (report.num_rows, report.split) == (9, "train")
    assert report.num_tokens == sum(len(a.encode()) + 1 for a in ("that", "over there", "soon")) * 3
    bounds = {None: (NEARLY_ALL, 1e-5), 8: (NEARLY_ALL, 1e-2), 4: (0.3, math.inf)}
    agreement, kl = bounds[options.get("bits")]
    assert report.top1_agreement >= agreement
    assert 0 <= report.kl_mean <= report.kl_max
    assert report.kl_mean < kl
    module, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    messages = [{"role": "user", "content": "what?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    theirs, _ = mlx_lm.load(str(model_folder), adapter_path=str(adapter))
    logits, wanted = (np.array(m(mx.array([prompt])).astype(mx.float32)) for m in (module, theirs))
    if "bits" in options:
        assert any(isinstance(m, nn.QuantizedLinear) for _, m in module.named_modules())
    else:
        assert np.abs(logits - wanted).max() < (1e-2 if options else 1e-4) * np.abs(wanted).max()


def test_coarser_exports_agree_less(adapter, rows_file, tmp_path):
    kl = [
        export(
            adapter, tmp_path / f"{bits}", bits=bits, group_size=32, data=rows_file, console=quiet()
        ).kl_mean
        for bits in (None, 8, 4)
    ]
    assert kl[0] < kl[1] < kl[2]


def test_the_divergence_is_that_of_the_textbook(tiny_network, make_batch):
    one, other, batch = tiny_network(seed=0), tiny_network(seed=1), make_batch([9, 12])
    found = find_targets(batch.tokens, batch.is_target)
    tokens, positions = mx.array(batch.tokens), mx.array(found.positions)
    p, q = (np.exp(np.array(log_probabilities(n, tokens, positions), np.float64)) for n in (one, other))
    kl = (p * np.log(p / q)).sum(-1)
    measured = compare(one, other, [batch])
    assert measured["kl_mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert measured["kl_max"] == pytest.approx(kl.max(), rel=1e-4)
    assert measured["num_tokens"] == batch.num_targets
    itself = compare(one, one, [batch])
    assert (itself["top1_agreement"], itself["kl_max"]) == (1.0, 0.0)


def test_a_full_fine_tune_from_random_weights_becomes_an_ordinary_folder(
    tiny_network, model_folder, rows_file, tmp_path
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    weights = mx.load(str(model_folder / "model.safetensors"))
    write_adapter(tmp_path / "full", weights, AdapterConfig("full", -1))
    report = export(tmp_path / "full", tmp_path / "out", base=str(bare), data=rows_file, console=quiet())
    assert (report.top1_agreement >= NEARLY_ALL, report.dtype) == (True, "float32")
    assert report.kl_max < 1e-6
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert written.keys() == weights.keys()
    assert all(np.array_equal(np.array(written[name]), np.array(weights[name])) for name in weights)


def test_refusals_name_the_reason_and_leave_what_was_there(adapter, rows_file, tmp_path):
    def attempt(out="out", **options):
        return export(adapter, tmp_path / out, data=rows_file, console=quiet(), **options)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ConfigError, match="not empty and not an export"):
            attempt("mine", force=force)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ConfigError, match=r"group_size: 64 does not divide all layers: .* has 96 inputs"):
        attempt(bits=4, group_size=64)
    with pytest.raises(ConfigError, match="group_size: found 48"):
        attempt(bits=4, group_size=48)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".new-*"))
    first = attempt()
    with pytest.raises(ConfigError, match="holds an export already"):
        attempt()
    assert attempt(force=True).kl_mean == first.kl_mean
    with pytest.raises(DataError, match=r"has no recipe\.yaml"):
        export(adapter, tmp_path / "other", console=quiet())


def test_an_adapter_of_another_base_is_refused_unless_forced(adapter, rows_file, tmp_path):
    config = read_config(adapter)
    lineage = Lineage(config.lineage.base_model, "sha256:" + "0" * 64, "", "", "", "", "")
    write_adapter(adapter, read_tensors(adapter), AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    with pytest.raises(AdapterError, match="holds other weights"):
        export(adapter, tmp_path / "out", data=rows_file, console=quiet())
    report = export(adapter, tmp_path / "out", data=rows_file, force=True, console=quiet())
    assert report.top1_agreement >= NEARLY_ALL
    assert report.kl_max < 1e-5


def test_an_adapter_that_does_not_say_its_base_needs_one(make_adapter, model_folder, rows_file, tmp_path):
    with pytest.raises(ConfigError, match="does not say what its base is"):
        export(make_adapter(1), tmp_path / "out", data=rows_file, console=quiet())
    report = export(
        make_adapter(1), tmp_path / "out", base=str(model_folder), data=rows_file, console=quiet()
    )
    assert report.top1_agreement >= NEARLY_ALL
    assert report.kl_max < 1e-5
