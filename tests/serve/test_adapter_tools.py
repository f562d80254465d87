"""`lathe adapters inspect, diff, merge, extract`: what they say, what they write, and what they refuse."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

import lathe
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import read_adapter
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_tensors, write_adapter, write_files
from serve.adapters.tools.difference import difference
from serve.adapters.tools.extraction import extract, nearest
from serve.adapters.tools.factors import Core
from serve.adapters.tools.inspection import inspect
from serve.adapters.tools.merging import METHODS, PRUNING, Merge
from serve.adapters.tools.opened import open_adapter
from serve.adapters.tools.writing import convert, merge, parse_part, save_extraction
from serve.errors import AdapterError, ConfigError, LatheError, ModelError
from serve.model.loading import load
from train.adapters.place import place_adapter

QUESTION = mx.array([list(b"what has changed?")])


def run(*words: str | Path) -> tuple[int, str, str]:
    """Status, standard output and standard error of `lathe adapters`."""
    done = CliRunner().invoke(lathe.app, ["adapters", *map(str, words)])
    if isinstance(done.exception, LatheError):  # `main` prints it, and ends with this status
        return 2 if done.exception.status < 500 else 1, done.output, str(done.exception)
    return done.exit_code, done.output, done.output


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model = load(str(folder), dequantize=True)
    if adapter is not None:
        files = read_adapter(adapter)
        place_adapter(model.network, files.read(), files.config, "it")
        model.network.module.eval()
    return np.array(model.network.module(QUESTION)[0].astype(mx.float32))


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def lineage(**changes) -> Lineage:
    words = dict.fromkeys(("base_fingerprint", "template_hash", "recipe_hash", "data_hash", "created"), "x")
    return Lineage(**{"base_model": "some/base", "lathe_version": "0", **words, **changes})


@pytest.fixture
def tuned(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """tuned({part of a weight's name: rank of its change, 0: full}, **further) → a fine-tuned copy of the model."""

    def make(ranks: dict[str, int], **changes: dict) -> Path:
        folder = tmp_path / "tuned"
        shutil.copytree(model_folder, folder)
        weights = mx.load(str(folder / "model.safetensors"))
        random = np.random.default_rng(0)
        for name, weight in weights.items():
            rank = next((rank for part, rank in ranks.items() if part in name), None)
            if rank is None:
                continue
            if rank and weight.ndim == 2:
                change = random.normal(size=(weight.shape[0], rank)) @ random.normal(
                    size=(rank, weight.shape[1])
                )
            else:
                change = random.normal(size=weight.shape)
            weights[name] = weight + 0.02 * mx.array(change.astype(np.float32))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


def test_inspect_says_what_an_adapter_is(make_adapter, model_folder):
    folder = make_adapter(1, rank=3, scale=1.5)
    model = load(str(model_folder), dequantize=True)
    found = inspect(folder, model)
    assert (found.format, found.kind, len(found.modules), found.problems) == ("mlx-lm", "lora", 14, ())
    tensors = read_tensors(folder)
    for module in found.modules:
        a, b = (np.array(tensors[f"{module.path}.{part}"]) for part in ("lora_a", "lora_b"))
        assert (module.inputs, module.rank, module.outputs) == (*a.shape, b.shape[1])
        assert (module.scale, module.dtype, module.experts) == (1.5, "float32", None)
        assert module.norm == pytest.approx(1.5 * np.linalg.norm(a @ b), rel=1e-5)
    assert found.num_values == sum(tensor.size for tensor in tensors.values())


def test_inspect_names_what_keeps_an_adapter_from_a_model(
    make_adapter, make_adapter_of, recurrent_folder, tmp_path
):
    tensors = read_tensors(make_adapter(1))
    name = sorted(tensors)[0]
    broken = {**tensors, name: tensors[name].at[0, 0].add(mx.array(float("nan")))}
    write_adapter(tmp_path / "broken", broken, AdapterConfig("lora", -1, 4, 2.0, lineage=lineage()))
    other = recurrent_folder("mamba2")
    status, output, said = run(
        "inspect", tmp_path / "broken", "--model", other, "--json", tmp_path / "found.json"
    )
    assert status == 2
    assert f"{name} holds NaN or infinite values" in said
    assert "was trained on other weights" in said
    assert "does not fit the base model" in said
    assert "base_model: some/base" in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["problems"]) == 3
    assert len(found["modules"]) == 14
    status, output, _ = run("inspect", make_adapter(1))
    assert status == 0
    assert "14 modules, rank 4, scale 2" in output


def test_diff_measures_updates_however_they_are_factored(make_adapter, tmp_path):
    """The same update in another layout, with other factors, or weighted."""
    folder = make_adapter(1)
    convert(folder, tmp_path / "peft", "peft")
    merge([f"{folder}:1"], tmp_path / "svd", Merge("svd"), None)
    merge([f"{folder}:-0.5"], tmp_path / "half", Merge("cat"), "peft")
    opened = open_adapter(folder)
    same = difference(opened, open_adapter(tmp_path / "peft"))
    assert same.total == 0
    assert {each.cosine for each in same.modules} == {1.0}
    near = difference(opened, open_adapter(tmp_path / "svd"))
    assert 0 < near.total < 1e-5
    half = difference(opened, open_adapter(tmp_path / "half"))
    assert half.total == pytest.approx(1.5, rel=1e-5)
    assert all(each.cosine == pytest.approx(-1, abs=1e-6) for each in half.modules)
    fewer = make_adapter(2, rank=7, keys=("self_attn.q_proj", "mlp.up_proj"))
    other = difference(opened, open_adapter(fewer))
    deltas = [open_adapter(each).modules for each in (folder, fewer)]
    for each in other.modules:
        if each.path in deltas[1]:
            one, two = deltas[0][each.path].delta(), deltas[1][each.path].delta()
            norms = np.linalg.norm(one), np.linalg.norm(two)
            assert each.difference == pytest.approx(np.linalg.norm(one - two) / max(norms), rel=1e-6)
            assert each.cosine == pytest.approx(np.sum(one * two) / (norms[0] * norms[1]), abs=1e-6)
        else:
            assert (each.second_norm, each.difference, each.cosine) == (None, None, None)
    assert sum(each.second_norm is None for each in other.modules) == 10


def test_diff_tells_of_adapters_of_two_bases(make_adapter, make_adapter_of, make_model, tmp_path):
    tensors = read_tensors(make_adapter(1))
    narrow = {name: value[:, :-1] if name.endswith("lora_b") else value for name, value in tensors.items()}
    write_adapter(tmp_path / "narrow", narrow, AdapterConfig("lora", -1, 4, 2.0))
    status, _, said = run("diff", make_adapter(1), tmp_path / "narrow")
    assert status == 2
    assert "these adapters are not of one base" in said
    broken = {**tensors, sorted(tensors)[0]: mx.full(tensors[sorted(tensors)[0]].shape, float("inf"))}
    write_adapter(tmp_path / "broken", broken, AdapterConfig("lora", -1, 4, 2.0))
    assert "hold NaN or infinite values" in run("diff", make_adapter(1), tmp_path / "broken")[2]
    assert "hold NaN or infinite values" in run("merge", tmp_path / "broken", tmp_path / "out")[2]
    status, output, _ = run("diff", make_adapter(1), make_adapter(2), "--json", tmp_path / "apart.json")
    assert status == 0
    assert "all together" in output
    assert len(json.loads((tmp_path / "apart.json").read_text())["modules"]) == 14


@pytest.mark.parametrize("to", ["mlx", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_what_merge_writes_is_served(method, to, make_adapter, model_folder, tmp_path):
    parts = [f"{make_adapter(1)}:0.7", f"{make_adapter(2)}:-0.3"]
    options = ["--density", "0.5"] if method in PRUNING else []
    status, output, _ = run("merge", *parts, tmp_path / "out", "--method", method, "--to", to, *options)
    assert status == 0, output
    files = read_adapter(tmp_path / "out")
    assert files.format == {"mlx": "mlx-lm", "peft": "peft"}[to]
    assert inspect(tmp_path / "out", load(str(model_folder), dequantize=True)).problems == ()
    assert apart(logits(model_folder, tmp_path / "out"), logits(model_folder)) > 0.01


NAMED = {
    "text": ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    "a head": ("lm_head", "lm_head"),
    "with towers": ("language_model.model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"),
    "a head with towers": ("language_model.lm_head", "lm_head"),
}
"""A layer in mlx-lm, and in Hugging Face's model."""


def in_every_layout(folder: Path, names: list[str]) -> dict[str, Path]:
    """The same update of each of these layers of NAMED, as mlx-lm, PEFT, and PEFT in a wrapper more call them."""
    mx.random.seed(0)
    ours, theirs, wrapped = {}, {}, {}
    for name in names:
        mine, hers = NAMED[name]
        a, b = mx.random.normal((24, 3)), mx.random.normal((3, 20))
        ours |= {f"{mine}.lora_a": a, f"{mine}.lora_b": b}
        for prefix, found in (("", theirs), ("base_model.model.", wrapped)):
            found[f"base_model.model.{prefix}{hers}.lora_A.weight"] = mx.contiguous(a.T)
            found[f"base_model.model.{prefix}{hers}.lora_B.weight"] = mx.contiguous(b.T)
    write_adapter(folder / "mlx-lm", ours, AdapterConfig("lora", -1, 3, 2.0))
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
    for layout, tensors in (("peft", theirs), ("wrapped", wrapped)):
        write_files(folder / layout, tensors, config, tensors_file="adapter_model.safetensors")
    return {layout: folder / layout for layout in ("mlx-lm", "peft", "wrapped")}


@pytest.mark.parametrize("to", ["mlx-lm", "peft"])
@pytest.mark.parametrize("names", [["text", "a head"], ["with towers", "a head with towers"]])
def test_parts_that_call_a_layer_otherwise_are_added_up(names, to, tmp_path):
    folders = in_every_layout(tmp_path, names)
    alone = open_adapter(folders["mlx-lm"]).modules
    wanted = {NAMED[name][to == "peft"]: 3.5 * alone[NAMED[name][0]].delta() for name in names}
    for index, parts in enumerate(itertools.permutations(folders.values())):
        weighted = [f"{path}:{weight}" for path, weight in zip(parts, (2, 1, 0.5), strict=True)]
        merge(weighted, tmp_path / f"out{index}", Merge("cat"), to)
        found = open_adapter(tmp_path / f"out{index}").modules
        assert found.keys() == wanted.keys()
        for path, module in found.items():
            assert np.allclose(module.delta(), wanted[path], rtol=1e-4, atol=1e-4), path


def test_two_updates_of_one_layer_are_refused_and_neither_is_lost(tmp_path):
    folders = in_every_layout(tmp_path, ["text", "with towers"])
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
    both = {}
    for layout in ("peft", "wrapped"):
        both |= mx.load(str(folders[layout] / "adapter_model.safetensors"))
    write_files(tmp_path / "both", both, config, tensors_file="adapter_model.safetensors")
    tensors = read_tensors(folders["mlx-lm"])
    twice = {**tensors, **{name.replace("model.", "base_model.model.", 1): t for name, t in tensors.items()}}
    write_adapter(tmp_path / "twice", twice, AdapterConfig("lora", -1, 3, 2.0))
    one, out = folders["peft"], tmp_path / "out"
    for words in (
        ("convert", tmp_path / "both", out, "--to", "mlx"),
        ("merge", tmp_path / "both", out, "--to", "mlx"),
        ("merge", one, tmp_path / "both", out, "--to", "peft"),
        ("merge", tmp_path / "twice", out, "--to", "peft"),
        ("diff", one, tmp_path / "both"),
    ):
        status, _, said = run(*words)
        assert status == 2, words
        assert "are the same layer's, and one was expected" in said, words
        assert not out.exists()


def test_merged_lineage_is_what_the_parts_agree_on(make_adapter, tmp_path):
    tensors = read_tensors(make_adapter(1))
    said = {
        "first": lineage(stop_ids=(1, 2), recipe_hash="first's"),
        "second": lineage(stop_ids=(2, 3), metrics={"loss": 1.0}),
        "silent": None,
        "elsewhere": lineage(base_fingerprint="y", chat_template="other"),
    }
    for name, words in said.items():
        write_adapter(tmp_path / name, tensors, AdapterConfig("lora", -1, 4, 2.0, lineage=words))
    parts = [str(tmp_path / name) for name in ("first", "second", "silent")]
    merge([f"{parts[0]}:0.5", f"{parts[1]}:0.25", parts[2]], tmp_path / "out", Merge("cat"), None)
    found = read_adapter(tmp_path / "out").config.lineage
    assert found is not None
    assert (found.base_model, found.stop_ids, found.recipe_hash, found.metrics) == (
        "some/base",
        (1, 2, 3),
        "",
        {},
    )
    assert found.parent == f"{parts[0]}:0.5+{parts[1]}:0.25+{parts[2]}:1"
    with pytest.raises(AdapterError, match="were trained on other weights: x and y") as caught:
        merge([parts[0], str(tmp_path / "elsewhere")], tmp_path / "other", Merge("cat"), None)
    assert "have other chat templates of their own" in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_parts_are_paths_and_weights(tmp_path):
    (tmp_path / "odd:0.5").mkdir()
    assert parse_part(f"{tmp_path}/odd:0.5") == (f"{tmp_path}/odd:0.5", 1.0)
    assert parse_part(f"{tmp_path}/odd:0.5:2") == (f"{tmp_path}/odd:0.5", 2.0)
    assert parse_part("x:-1e-3") == ("x", -0.001)
    assert parse_part("x") == ("x", 1.0)
    for wrong in ("x:nan", "x:inf", "x:1e999", "x:", ":1", "x:half"):
        with pytest.raises(ConfigError, match="expected PATH:WEIGHT"):
            parse_part(wrong)


@pytest.mark.parametrize("to", ["mlx", "peft"])
def test_extract_finds_a_change_of_low_rank_again(to, tuned, model_folder, tmp_path):
    folder = tuned({"q_proj": 3, "down_proj": 5, "lm_head": 2})
    words = ("--base", model_folder, "--rank", "5", "--to", to, "--json", tmp_path / "found.json")
    status, output, _ = run("extract", folder, tmp_path / "out", *words)
    assert status == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["modules"]) == 5
    assert all(each["error"] < 1e-5 for each in found["modules"])
    assert found["left_out"] == {}
    assert apart(logits(model_folder, tmp_path / "out"), logits(folder)) < 1e-4
    assert apart(logits(model_folder), logits(folder)) > 0.01
    found = read_adapter(tmp_path / "out").config.lineage
    base = load(str(model_folder))
    assert found is not None
    assert (found.base_fingerprint, found.objective) == (base.fingerprint, "extract")
    assert inspect(tmp_path / "out", base).problems == ()


def test_extract_keeps_what_is_nearest_and_says_what_it_leaves_out(tuned, model_folder):
    folder = tuned({"q_proj": 0, "layernorm": 0, "embed_tokens": 0})
    tuned_model, base = (load(str(each), dequantize=True) for each in (folder, model_folder))
    found = extract(tuned_model, base, 4)
    weights = [dict(tree_flatten(each.network.module.parameters())) for each in (tuned_model, base)]
    assert {each.path.rpartition(".")[2] for each in found.kept} == {"q_proj"}
    for each in found.kept:
        change = np.array(weights[0][f"{each.path}.weight"] - weights[1][f"{each.path}.weight"], np.float64)
        _, values, _ = np.linalg.svd(change)
        assert each.error == pytest.approx(np.linalg.norm(values[4:]) / np.linalg.norm(values), rel=1e-4)
        whole = np.linalg.norm(np.array(weights[1][f"{each.path}.weight"]))
        assert each.change == pytest.approx(np.linalg.norm(change) / whole, rel=1e-4)
    assert len(found.left_out) == 2 * 2 + 1
    assert all("norm" in name or "embed" in name for name in found.left_out)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 8, 20), (3, 20, 8), (5, 5)])
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_the_nearest_update_is_the_cut_singular_value_decomposition(shape, rank):
    change = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found, error = nearest(change, rank)
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    wanted = ((u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]).swapaxes(-1, -2)
    assert np.abs(found.delta() - wanted).max() < 1e-5
    assert error == pytest.approx(np.linalg.norm(s[..., rank:]) / np.linalg.norm(s), abs=1e-6)
    assert Core.of([found]).norm == pytest.approx(np.linalg.norm(s[..., :rank]), rel=1e-5)


def test_extract_refuses_other_models(tuned, model_folder, make_model, recurrent_folder, tmp_path):
    base = load(str(model_folder))
    narrower = json.loads((model_folder / "config.json").read_text()) | {"intermediate_size": 32}
    cases = {
        "one family was expected": recurrent_folder("mamba2"),
        r"mlp\.down_proj is \(64, 32\) in": make_model("narrower", narrower),
        "there is nothing to extract": model_folder,
        "nothing to extract; changed are model.norm.weight": tuned({"model.norm": 0}),
    }
    for said, folder in cases.items():
        with pytest.raises(ModelError, match=said):
            extract(load(str(folder), name=folder.name), base, 4)
    status, _, said = run("extract", model_folder, tmp_path / "out", "--base", model_folder, "--rank", "0")
    assert status == 2
    assert not (tmp_path / "out").exists()


def test_extraction_is_put_in_a_folder_of_its_own(tuned, model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("somebody's")
    models = [load(str(each), dequantize=True) for each in (tuned({"q_proj": 2}), model_folder)]
    found = extract(models[0], models[1], 2)
    with pytest.raises(ConfigError, match="is there already"):
        save_extraction(found, tmp_path / "out", "mlx-lm", models[0], models[1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inspect {tmp}/nowhere", "no adapter folder at"),
        ("convert {a} {tmp}/out --to gguf", "gguf"),
        ("convert {tmp}/nowhere {tmp}/out --to peft", "no adapter folder at"),
        ("convert {a} {tmp} --to peft", "is there already"),
        ("diff {a} {tmp}/nowhere", "no adapter folder at"),
        ("merge {a}:nan {a} {tmp}/out", "expected PATH:WEIGHT"),
        ("merge {a} {tmp}/nowhere:1 {tmp}/out", "no adapter folder at"),
        ("merge {a} {a} {tmp}/out --method sum", "--method is sum; expected one of linear, cat"),
        ("merge {a} {a} {tmp}/out --method ties", "ties needs --density"),
        ("merge {a} {a} {tmp}/out --rank 4", "--rank means nothing to cat"),
        ("merge {a} {a} {tmp}/out --method ties --density 7", "--density is 7"),
        ("merge {a} {a} {tmp}/out --to onnx", "onnx"),
        ("merge {a} {a} {a}", "is there already"),
        ("extract {tmp}/nowhere {tmp}/out --base {model}", "nowhere"),
    ],
)
def test_mistakes_are_told_with_status_2_and_nothing_is_written(
    words, said, make_adapter, model_folder, tmp_path
):
    keeper = tmp_path / "keeper"
    keeper.write_text("")
    filled = [each.format(tmp=tmp_path, a=make_adapter(1), model=model_folder) for each in words.split()]
    status, output, told = run(*filled)
    assert status == 2, output
    assert said in told
    assert "\n" not in told.strip() or "Usage" in told
    assert [path.name for path in tmp_path.iterdir()] == ["keeper"]


def test_full_fine_tunes_are_no_adapters(tmp_path):
    write_adapter(tmp_path / "full", {"model.norm.weight": mx.ones(8)}, AdapterConfig("full", -1))
    for words in (
        ("inspect", tmp_path / "full"),
        ("convert", tmp_path / "full", tmp_path / "out", "--to", "peft"),
    ):
        status, _, said = run(*words)
        assert status == 2
        assert "is a full fine-tune, not an adapter; `lathe adapters extract` makes one of it" in said
