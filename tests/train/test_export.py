"""What is exported is what was trained, and the number that says so is right."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import yaml
from rich.console import Console

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter, write_files
from serve.adapters.layers.lora import LoRALinear
from serve.adapters.tools.writing import convert
from serve.errors import AdapterError, ConfigError, DataError, NotFoundError
from serve.model.loading import load
from train.adapters.adapt import AdapterSettings, add_lora, trainable_tensors
from train.after import place
from train.after.export import Form, export, fuse
from train.after.fidelity import Rows, compare, log_probabilities
from train.loop.loss import find_targets

ROOT = Path(__file__).parents[2]
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
    report = export(adapter, tmp_path / "out", Form(**options), rows=Rows(rows_file), console=quiet())
    assert json.loads((tmp_path / "out" / "fidelity.json").read_text())["kl_mean"] == report.kl_mean
    assert (report.num_rows, report.num_rows_found, report.rows_from) == (9, 9, str(rows_file))
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


def test_an_adapter_in_pefts_layout_is_exported_as_the_same_one_in_mlx_lms(adapter, rows_file, tmp_path):
    convert(adapter, tmp_path / "peft", "peft")
    weights = []
    for source in (adapter, tmp_path / "peft"):
        out = tmp_path / f"of {source.name}"
        report = export(source, out, rows=Rows(rows_file), console=quiet())
        assert report.kl_mean < 1e-5
        weights.append(mx.load(str(out / "model.safetensors")))
    assert weights[0].keys() == weights[1].keys()
    assert all(mx.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


def test_heads_of_pefts_that_trained_whole_are_exported_and_what_has_no_place_is_refused(
    adapter, model_folder, rows_file, tmp_path
):
    convert(adapter, tmp_path / "peft", "peft")
    folder, where = tmp_path / "peft", {"base": str(model_folder), "rows": Rows(rows_file)}
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lineage"]  # whose tensors they are no more
    head = mx.random.normal(load(str(model_folder)).network.module.lm_head.weight.shape)
    with_head = {name: each for name, each in tensors.items() if "lm_head" not in name}
    with_head["base_model.model.lm_head.weight"] = head
    config["target_modules"] = [name for name in config["target_modules"] if name != "lm_head"]
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": ["lm_head"]}
    write_files(folder, with_head, config, tensors_file="adapter_model.safetensors", framework="pt")
    export(folder, tmp_path / "out", console=quiet(), **where)
    assert mx.array_equal(mx.load(str(tmp_path / "out" / "model.safetensors"))["lm_head.weight"], head)
    name = next(name for name in with_head if name.endswith("q_proj.lora_B.weight"))
    biased = with_head | {name.replace(".weight", ".bias"): mx.zeros(with_head[name].shape[:1])}
    config["lora_bias"] = True
    write_files(folder, biased, config, tensors_file="adapter_model.safetensors", framework="pt")
    with pytest.raises(AdapterError, match=r"q_proj\.lora_bias: the model has no weights of that name"):
        export(folder, tmp_path / "other", console=quiet(), **where)
    assert not (tmp_path / "other").exists()


def test_coarser_exports_agree_less(adapter, rows_file, tmp_path):
    kl = [
        export(adapter, tmp_path / f"{bits}", Form(bits, 32), rows=Rows(rows_file), console=quiet()).kl_mean
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
    report = export(
        tmp_path / "full", tmp_path / "out", base=str(bare), rows=Rows(rows_file), console=quiet()
    )
    assert (report.top1_agreement >= NEARLY_ALL, report.dtype) == (True, "float32")
    assert report.kl_max < 1e-6
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert written.keys() == weights.keys()
    assert all(np.array_equal(np.array(written[name]), np.array(weights[name])) for name in weights)


def test_refusals_name_the_reason_and_leave_what_was_there(adapter, rows_file, tmp_path):
    def attempt(out="out", form=None, **options):
        return export(adapter, tmp_path / out, form, rows=Rows(rows_file), console=quiet(), **options)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ConfigError, match="not empty and not an export"):
            attempt("mine", force=force)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ConfigError, match=r"group_size: 128 divides no layer's inputs: .* has 64"):
        attempt(form=Form(4, 128))
    with pytest.raises(ConfigError, match="group_size: found 48"):
        attempt(form=Form(4, 48))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".lathe-*"))
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
        export(adapter, tmp_path / "out", rows=Rows(rows_file), console=quiet())
    report = export(adapter, tmp_path / "out", rows=Rows(rows_file), force=True, console=quiet())
    assert report.top1_agreement >= NEARLY_ALL
    assert report.kl_max < 1e-5


def test_an_adapter_that_does_not_say_its_base_needs_one(make_adapter, model_folder, rows_file, tmp_path):
    with pytest.raises(ConfigError, match="does not say what its base is"):
        export(make_adapter(1), tmp_path / "out", rows=Rows(rows_file), console=quiet())
    report = export(
        make_adapter(1), tmp_path / "out", base=str(model_folder), rows=Rows(rows_file), console=quiet()
    )
    assert report.top1_agreement >= NEARLY_ALL
    assert report.kl_max < 1e-5


def test_every_row_that_was_given_is_used_unless_fewer_are_asked_for_and_it_is_said(adapter, tmp_path):
    rows = tmp_path / "test.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": f"no {i}"}) + "\n" for i in range(75))
    )
    console = quiet()
    report = export(adapter, tmp_path / "all", rows=Rows(rows), console=console)
    assert (report.num_rows, report.num_rows_found) == (75, 75)
    assert f"comparing on 75 rows of {rows}" in console.file.getvalue()
    console = quiet()
    some = export(adapter, tmp_path / "some", rows=Rows(rows, limit=10), console=console)
    assert (some.num_rows, some.num_rows_found) == (10, 75)
    printed = console.file.getvalue()
    assert f"comparing on 10 of 75 rows of {rows}" in printed
    assert f"10 of 75, {rows}" in printed


@pytest.fixture
def run_of(tmp_path, model_folder, adapter):
    """run_of(objective, rows, split="train", **keys) → a run's folder: the adapter, and a recipe for the rows."""

    def make(objective: str, rows: list[dict], split: str = "train", **keys) -> Path:
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        for name in {"train", split}:
            (folder / f"{name}.jsonl").write_text(lines)
        recipe = {
            "model": str(model_folder),
            "objective": objective,
            "datasets": [{"path": str(folder)}],
            **keys,
        }
        (adapter / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return adapter

    return make


PROMPTS = [{"prompt": f"what is {number}?", "wanted": str(number)} for number in range(9)]
GRPO = {
    "batch_size": 4,
    "grpo": {"num_generations": 2, "rewards": [{"kind": "regex", "pattern": "x", "field": None}]},
}


@pytest.mark.parametrize("has_file", [False, True])
def test_prompts_without_answers_are_compared_at_the_models_own_answers(run_of, tmp_path, has_file):
    folder = run_of("grpo", PROMPTS, "test", **GRPO)
    console = quiet()
    asked = Rows(tmp_path / "rows" / "test.jsonl") if has_file else None
    report = export(folder, tmp_path / "out", rows=asked, console=console)
    assert "greedy answers of base + adapter" in console.file.getvalue()
    assert report.num_rows == 9
    assert report.num_tokens > 9
    assert report.top1_agreement >= NEARLY_ALL
    assert report.kl_max < 1e-5


def test_a_grpo_adapter_is_compared_at_right_answers_where_a_file_has_them(run_of, rows_file, tmp_path):
    console = quiet()
    report = export(run_of("grpo", PROMPTS, **GRPO), tmp_path / "out", rows=Rows(rows_file), console=console)
    assert "greedy answers" not in console.file.getvalue()
    assert report.num_tokens == sum(len(a.encode()) + 1 for a in ("that", "over there", "soon")) * 3


def test_a_file_of_pairs_does_for_an_adapter_that_learned_from_pairs(run_of, tmp_path):
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no, never"} for i in range(5)]
    folder = run_of("dpo", pairs, "valid")
    for asked in (None, Rows(tmp_path / "rows" / "train.jsonl")):
        report = export(folder, tmp_path / "out", rows=asked, force=True, console=quiet())
        assert report.num_rows == 5
        assert report.num_tokens == 5 * (4 + 10)


def test_rows_that_are_none_are_told_with_their_file(adapter, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"promt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"empty\.jsonl:1: .*did you mean prompt"):
        export(adapter, tmp_path / "out", rows=Rows(tmp_path / "empty.jsonl"), console=quiet())


def test_layers_that_cannot_be_packed_stay_and_are_listed(adapter, rows_file, tmp_path):
    console = quiet()
    report = export(adapter, tmp_path / "out", Form(8, 64), rows=Rows(rows_file), console=console)
    assert report.unpacked == tuple(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))
    assert "not quantized" in console.file.getvalue()
    module, _ = mlx_lm.load(str(tmp_path / "out"))
    kinds = {path: type(m) for path, m in module.named_modules()}
    assert all(kinds[path] is nn.Linear for path in report.unpacked)
    assert kinds["model.layers.0.mlp.up_proj"] is nn.QuantizedLinear


def test_a_base_with_a_tower_is_refused_before_anything_is_written(
    adapter, model_folder, rows_file, tmp_path
):
    seeing = tmp_path / "seeing"
    shutil.copytree(model_folder, seeing)
    mx.save_safetensors(str(seeing / "vision.safetensors"), {"vision_tower.patch.weight": mx.ones((2, 2))})
    with pytest.raises(
        ConfigError, match=r"1 tensors beside its text part, vision_tower\.patch\.weight first"
    ):
        export(adapter, tmp_path / "out", base=str(seeing), rows=Rows(rows_file), console=quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["beside the run", "above the run", "in the current folder"])
def test_a_relative_base_is_found_around_the_adapter_and_here(
    adapter, model_folder, rows_file, tmp_path, monkeypatch, where
):
    """And of two folders of that name the one with the weights it was trained on."""
    config = read_config(adapter)
    lineage = dataclasses.replace(config.lineage, base_model="bases/lively")
    run = tmp_path / "project" / "runs" / "mine"
    saved = run / "checkpoints" / "step-000001"
    write_adapter(saved, read_tensors(adapter), AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match="name the base with --base"):
        export(saved, tmp_path / "out", rows=Rows(rows_file), console=quiet())
    folders = {
        "beside the run": run.parent,
        "above the run": tmp_path / "project",
        "in the current folder": Path.cwd(),
    }
    for place_of, folder in folders.items():
        shutil.copytree(model_folder, folder / "bases" / "lively")
        if place_of != where:
            weights = mx.load(str(model_folder / "model.safetensors"))
            mx.save_safetensors(
                str(folder / "bases" / "lively" / "model.safetensors"), {n: w + 1 for n, w in weights.items()}
            )
    report = export(saved, tmp_path / "out", rows=Rows(rows_file), console=quiet())
    assert Path(report.base) == folders[where] / "bases" / "lively"


def test_the_folder_one_is_in_is_refused_with_the_reason(adapter, rows_file, tmp_path, monkeypatch):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "deeper")
    for name in (".", "..", str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match="name a folder that it makes"):
            export(adapter, Path(name), rows=Rows(rows_file), console=quiet())
    assert not list(tmp_path.rglob(".lathe-*"))
    export(adapter, Path("../other"), rows=Rows(rows_file), console=quiet())
    (tmp_path / "empty" / "hollow").mkdir()
    export(adapter, Path("../hollow"), rows=Rows(rows_file), console=quiet())
    assert (tmp_path / "empty" / "hollow" / "fidelity.json").exists()


def test_two_exports_to_one_name_are_kept_apart(tmp_path):
    """Processes, each with a descriptor of its own, as two commands have."""
    script = (
        "import sys; from pathlib import Path; from train.after import place\n"
        "with place.writing(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'mine').write_text('x'); print(partial, flush=True); sys.stdin.readline()\n"
        "    if len(sys.argv) > 2: place.publish(partial, Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), "publish"]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    partial = Path(first.stdout.readline().strip())
    with (
        pytest.raises(ConfigError, match="out is being written by another export"),
        place.writing(tmp_path / "out"),
    ):
        pass
    with place.writing(tmp_path / "another") as mine:  # which clears what is left over, but not what is held
        assert not any(mine.iterdir())
    assert (partial / "mine").exists()
    first.communicate("\n", timeout=60)
    assert (tmp_path / "out" / "mine").exists()
    second = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    second.stdout.readline()
    second.kill()
    second.wait()
    assert partial.exists(), "killed: it is left over"
    with place.writing(tmp_path / "another"):
        assert not partial.exists(), "and cleared by whoever exports next"
    assert (tmp_path / "out" / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# One process imports, and each export is forked from it: of its file operations the at-th kills it.
EXPORTS = """
import os, signal, sys
from pathlib import Path
from train.after import place

def write(root, at):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        watched = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if watched and str(arguments[0]).startswith(str(root)):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    with place.writing(root / "out") as partial:
        (partial / "a").write_text("new"), (partial / "b").write_text("new")
        place.publish(partial, root / "out")

at = 0
while True:
    at += 1
    root = Path(sys.argv[1]) / f"at-{at}"
    (root / "out").mkdir(parents=True)
    for name in "ab":
        (root / "out" / name).write_text("old")
    pid = os.fork()
    if pid == 0:
        try:
            write(root, at)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    with place.writing(root / "another"):
        pass
    assert {path.name for path in root.iterdir()} == {"out"}, at
    assert {(root / "out" / name).read_text() for name in "ab"} in ({"old"}, {"new"}), at
    assert len(list((root / "out").iterdir())) == 2, at
print(at)
"""


def test_a_kill_at_any_file_operation_of_an_export_leaves_the_earlier_or_the_new_one(tmp_path):
    command = [sys.executable, "-c", EXPORTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 6
