"""Whole runs of a tiny model: what they leave behind, and how they continue."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.console import Console

from serve.adapters.formats.manifest import read_config, read_tensors
from serve.errors import ConfigError
from serve.model.loading import load
from serve.model.template import ChatTemplate
from serve.model.vocabulary import vocabulary_hash
from train.foresee.preflight import prepare
from train.loop import checkpoint
from train.recipe.recipe import load_recipe
from train.run import run

pytestmark = pytest.mark.long

RECIPE = """
num_layers: -1
batch_size: 4
iters: 8
learning_rate: 1e-2
lora_parameters: {rank: 4, scale: 4.0, dropout: 0.1}
lr_schedule: {name: cosine_decay, warmup: 2}
max_grad_norm: 1.0
steps_per_report: 2
steps_per_eval: 4
save_every: 4
"""
# As in mlx-lm's examples/lora_config.yaml; only the places and the length are ours.
STOCK = """
model: "{model}"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "{data}"
seed: 0
num_layers: 16
batch_size: 4
iters: 4
val_batches: 25
learning_rate: 1e-5
report_to: null
project_name: null
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "{out}"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory) -> Path:
    """Conversations of different lengths, with train, valid and test files."""
    folder = tmp_path_factory.mktemp("rows")
    for split, count in (("train", 22), ("valid", 5), ("test", 3)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{split} {'ab' * (i % 5)} {i}?"},
                    {"role": "assistant", "content": f"no {i % 3}"},
                ]
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_recipe(tmp_path, model_folder, rows_folder):
    """name, *overrides → the tiny recipe, writing to tmp_path/name."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)

    def make(name: str, *overrides: str):
        places = (f"model={model_folder}", f"data={rows_folder}", f"adapter_path={tmp_path / name}")
        return load_recipe(path, (*places, *overrides))

    return make


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def target_logits(module, recipe) -> np.ndarray:
    batch = prepare(recipe).valid_batches()[0]
    return np.array(module(mx.array(batch.tokens)).astype(mx.float32))[batch.is_target]


def test_a_run_leaves_an_adapter_that_mlx_lm_loads_with_the_same_logits(make_recipe, model_folder, tmp_path):
    recipe = make_recipe("out", "test=true", "metric={rows: 3, max_tokens: 8}")
    summary = run(recipe, console=quiet())
    out = tmp_path / "out"
    assert (summary.status, summary.steps, summary.published_step, summary.exit_code) == ("finished", 8, 8, 0)
    assert summary.valid_loss < summary.first_valid_loss
    assert summary.test_loss > 0
    assert summary.exact_match_before is not None
    assert summary.exact_match is not None
    assert json.loads((out / "summary.json").read_text())["content_hash"] == summary.content_hash
    assert load_recipe(out / "recipe.yaml") == recipe
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [0, 4, 8]
    assert list((out / "tensorboard").glob("events*"))
    lineage = read_config(out).lineage
    base = load(str(model_folder))
    assert lineage.base_fingerprint == base.fingerprint
    assert lineage.vocabulary_hash == vocabulary_hash(base.tokenizer)
    assert lineage.template_hash == ChatTemplate(base.tokenizer).hash
    assert lineage.metrics["valid_loss"] == summary.valid_loss
    theirs, _ = mlx_lm.load(str(model_folder), adapter_path=str(out))
    plain, _ = mlx_lm.load(str(model_folder))
    ours = load(str(model_folder))
    from train.after.export import load_adapted

    adapted = load_adapted(out, read_config(out), str(model_folder))
    logits = target_logits(theirs, recipe)
    assert np.allclose(logits, target_logits(adapted.network.module, recipe), atol=1e-4)
    assert np.allclose(target_logits(plain, recipe), target_logits(ours.network.module, recipe), atol=1e-4)
    assert np.abs(logits - target_logits(plain, recipe)).max() > 0.1


def test_a_resumed_run_publishes_the_same_bytes(make_recipe, tmp_path):
    overrides = ("grad_accumulation_steps=2", "metric={rows: 3, max_tokens: 8}", "save_every=4")
    straight = run(make_recipe("straight", *overrides), console=quiet())
    shutil.copytree(tmp_path / "straight", tmp_path / "half")
    checkpoint.remove(tmp_path / "half" / "checkpoints" / "step-000004")
    (tmp_path / "half" / "adapters.safetensors").unlink()
    mx.random.seed(1234)
    resumed = run(make_recipe("half", *overrides), resume=True, console=quiet())
    assert resumed.steps == straight.steps == 4
    assert resumed.content_hash == straight.content_hash
    assert resumed.exact_match_before == straight.exact_match_before
    optimizers = [
        checkpoint.load(checkpoint.find(tmp_path / name)).optimizer for name in ("straight", "half")
    ]
    assert all(np.array_equal(np.array(v), np.array(optimizers[1][k])) for k, v in optimizers[0].items())
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [json.loads(line)["step"] for line in (tmp_path / "straight/metrics.jsonl").open()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_can_be_continued(make_recipe, tmp_path, number, code):
    recipe = make_recipe("cut", "iters=400", "steps_per_report=1", "save_every=1000", "val_batches=0")
    script = (
        "import sys; from train.recipe.recipe import load_recipe; from train.run import run\n"
        "sys.exit(run(load_recipe(sys.argv[1], sys.argv[2:])).exit_code)"
    )
    arguments = [f"{name}={getattr(recipe, name)}" for name in ("model", "data", "adapter_path", "iters")]
    arguments += ["steps_per_report=1", "save_every=1000", "val_batches=0"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", script, str(tmp_path / "recipe.yaml"), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    for line in child.stdout:
        if line.startswith("iter 3/"):
            child.send_signal(number)
            break
    child.stdout.read()
    assert child.wait(300) == code
    saved = checkpoint.existing(tmp_path / "cut")
    assert len(saved) == 1
    step = checkpoint.step_of(saved[0])
    assert 3 <= step < 400
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["signal"]) == ("interrupted", step, number)
    with pytest.raises(ConfigError, match="holds an unfinished run, last saved at step-"):
        run(recipe, console=quiet())
    longer = make_recipe("cut", f"iters={step + 2}", "val_batches=0", "lr_schedule={name: constant}")
    assert run(longer, resume=True, console=quiet()).steps == step + 2


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_has_ended_is_replaced_only_when_asked_and_by_one_that_has_ended(make_recipe, tmp_path):
    first = run(make_recipe("out", "iters=2"), console=quiet())
    (tmp_path / "out" / "notes.txt").write_text("a person's own")
    before = files_of(tmp_path / "out")
    for recipe in (make_recipe("out", "iters=2"), make_recipe("out", "iters=3", "seed=1")):
        with pytest.raises(ConfigError, match=r"holds a run that is finished\. --overwrite"):
            run(recipe, console=quiet())
    assert files_of(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="expected one of them"):
        run(make_recipe("out"), resume=True, overwrite=True, console=quiet())
    console = quiet()
    second = run(make_recipe("out", "iters=3", "seed=1"), overwrite=True, console=console)
    plain = run(make_recipe("plain", "iters=3", "seed=1"), console=quiet())
    assert (first.steps, second.steps) == (2, 3)
    assert "out holds a run that is finished, which stays until" in console.file.getvalue()
    assert [p.name for p in checkpoint.existing(tmp_path / "out")] == ["step-000003"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "a person's own"
    assert read_config(tmp_path / "out").lineage.content_hash == plain.content_hash == second.content_hash
    names = {name for name in files_of(tmp_path / "out") if not name.startswith("tensorboard")}
    theirs = {name for name in files_of(tmp_path / "plain") if not name.startswith("tensorboard")}
    assert names == theirs | {"notes.txt"}
    for file in ("recipe.yaml", "summary.json", "run.json"):
        assert "next" not in (tmp_path / "out" / file).read_text()
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == make_recipe("out", "iters=3", "seed=1")


def test_an_adapter_of_another_tool_is_not_trained_over(make_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapters.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(ConfigError, match="out holds an adapter; --overwrite"):
        run(make_recipe("out", "iters=1"), console=quiet())
    run(make_recipe("out", "iters=1"), overwrite=True, console=quiet())
    assert read_config(tmp_path / "out").lineage is not None


def test_ctrl_c_in_a_new_run_leaves_the_earlier_one_whole_and_it_can_go_on(make_recipe, tmp_path):
    overrides = ("iters=6", "steps_per_report=1", "seed=1")
    run(make_recipe("out", "iters=2"), console=quiet())
    before = files_of(tmp_path / "out")
    interrupt_at(3, make_recipe("out", *overrides), tmp_path, overrides)
    after = files_of(tmp_path / "out")
    assert {name: after.get(name) for name in before} == before
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"next"}
    with pytest.raises(
        ConfigError, match=r"next holds an unfinished run, last saved at step-00000[34], .* delete"
    ):
        run(make_recipe("out", *overrides), overwrite=True, console=quiet())
    resumed = run(make_recipe("out", *overrides), resume=True, console=quiet())
    plain = run(make_recipe("plain", *overrides), console=quiet())
    assert resumed.steps == 6
    assert read_config(tmp_path / "out").lineage.content_hash == plain.content_hash
    assert not (tmp_path / "out" / "next").exists()


def interrupt_at(step: int, recipe, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """A new run over what is there, told to stop by itself as Ctrl-C would."""
    script = (
        "import io, os, signal, sys; from rich.console import Console\n"
        "from train.recipe.recipe import load_recipe; from train.run import run\n"
        "class Pipe(io.StringIO):\n"
        "    def write(self, text):\n"
        f"        if 'iter {step}/' in text: os.kill(os.getpid(), signal.SIGINT)\n"
        "        return len(text)\n"
        "recipe = load_recipe(sys.argv[1], sys.argv[2:])\n"
        "sys.exit(run(recipe, overwrite=True, console=Console(file=Pipe(), width=200)).exit_code)"
    )
    arguments = [f"{name}={getattr(recipe, name)}" for name in ("model", "data", "adapter_path")]
    command = [sys.executable, "-c", script, str(tmp_path / "recipe.yaml"), *arguments, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 130, done.stderr[-3000:]


def test_going_back_to_an_earlier_checkpoint_of_a_run_that_has_ended_must_be_asked_for(make_recipe, tmp_path):
    recipe = make_recipe("out", "save_every=2", "iters=4")
    run(recipe, console=quiet())
    before = files_of(tmp_path / "out")
    back = tmp_path / "out" / "checkpoints" / "step-000002"
    again = make_recipe("out", "save_every=2", "iters=4", f"resume_from_checkpoint={back}")
    with pytest.raises(ConfigError, match="holds a run that is finished"):
        run(again, console=quiet())
    assert files_of(tmp_path / "out") == before
    console = quiet()
    run(again, overwrite=True, console=console)
    assert f"continuing {back} after step 2" in console.file.getvalue()
    assert [p.name for p in checkpoint.existing(tmp_path / "out")] == ["step-000004"]


@pytest.mark.parametrize("place", ["a-file", "a-file/out", "no" * 200, "locked/out"])
def test_an_adapter_path_that_cannot_be_written_is_told_before_anything_is_read(make_recipe, tmp_path, place):
    (tmp_path / "a-file").write_text("x")
    (tmp_path / "locked").mkdir(mode=0o500)
    if place.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("nothing is locked for this user")
    for dry_run in (False, True):
        with pytest.raises(ConfigError, match=r"adapter_path: .* cannot be written"):
            run(make_recipe(place, "data=no/such/rows/here"), dry_run=dry_run, console=quiet())
    assert {path.name for path in tmp_path.iterdir()} == {"a-file", "locked", "recipe.yaml"}


def test_a_stock_mlx_lm_yaml_runs(tmp_path, model_folder, rows_folder):
    path = tmp_path / "lora_config.yaml"
    path.write_text(STOCK.format(model=model_folder, data=rows_folder, out=tmp_path / "stock"))
    summary = run(load_recipe(path), console=quiet())
    assert (summary.status, summary.iterations) == ("finished", 4)
    names = {name.split(".", 3)[3].rsplit(".", 1)[0] for name in read_tensors(tmp_path / "stock")}
    assert names == {"self_attn.q_proj", "self_attn.v_proj"}


def test_an_adapter_mlx_lm_made_is_a_warm_start(make_recipe, model_folder, tmp_path):
    module, _ = mlx_lm.load(str(model_folder))
    module.freeze()
    parameters = {"rank": 4, "scale": 4.0, "dropout": 0.0}
    linear_to_lora_layers(module, -1, parameters)
    made = tmp_path / "made"
    made.mkdir()
    tensors = {n: t + 0.02 for n, t in tree_flatten(module.trainable_parameters())}
    mx.save_safetensors(str(made / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (made / "adapter_config.json").write_text(json.dumps(config))
    cold = run(make_recipe("cold", "iters=1"), console=quiet())
    for source in (made, made / "adapters.safetensors"):
        recipe = make_recipe(f"warm-{source.name}", "iters=1", f"resume_adapter_file={source}")
        warm = run(recipe, console=quiet())
        theirs, _ = mlx_lm.load(str(model_folder), adapter_path=str(made))
        assert abs(warm.first_valid_loss - cold.first_valid_loss) > 0.01
        assert warm.first_valid_loss == pytest.approx(mean_valid_loss(theirs, recipe), rel=1e-4)


def mean_valid_loss(module, recipe) -> float:
    """As plainly as it can be said."""
    total, count = 0.0, 0
    for batch in prepare(recipe).valid_batches():
        logits = module(mx.array(batch.tokens)).astype(mx.float32)
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for row, column in zip(*np.nonzero(batch.is_target), strict=True):
            total -= logprobs[row, column - 1, batch.tokens[row, column]]
            count += 1
    return total / count


def test_the_best_weights_are_published_when_asked(make_recipe, tmp_path):
    """A rate that falls below zero climbs the loss again: the best validation is not the last."""
    recipe = make_recipe(
        "best",
        "load_best_model_at_end=true",
        "steps_per_eval=2",
        "save_every=100",
        "lr_schedule={name: linear_schedule, arguments: [0.01, -0.015, 8]}",
        "learning_rate=1e-2",
        "max_grad_norm=null",
        "save_total_limit=1",
    )
    summary = run(recipe, console=quiet())
    assert summary.best_valid_loss < summary.valid_loss
    assert summary.published_step == summary.best_step < 8
    best = checkpoint.load(checkpoint.folder_of(tmp_path / "best", summary.best_step))
    published = read_tensors(tmp_path / "best")
    assert all(np.array_equal(np.array(best.tensors[name]), np.array(published[name])) for name in published)


def test_a_dry_run_ends_by_what_the_run_would_end_by(make_recipe, tmp_path):
    recipe = make_recipe("dry", "lora_parameters.keys=[wq]")
    with pytest.raises(ConfigError, match="wq: no layer has it"):
        run(recipe, dry_run=True, console=Console(quiet=True))


def test_a_dry_run_needs_no_weights_and_writes_nothing(make_recipe, model_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    console = quiet()
    summary = run(make_recipe("dry", f"model={bare}"), dry_run=True, console=console)
    assert summary.status == "dry_run"
    assert not (tmp_path / "dry").exists()
    printed = console.file.getvalue()
    for words in ("resolved recipe", "target share", "tokens up to", "an epoch is 6 batches", "padding"):
        assert words in printed


def test_random_weights_train_whole(make_recipe, model_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = make_recipe(
        "scratch",
        f"model={bare}",
        "init=random",
        "fine_tune_type=full",
        "lora_parameters=null",
        "optimizer=muon",
    )
    summary = run(recipe, console=quiet())
    assert summary.valid_loss < summary.first_valid_loss
    assert "model.embed_tokens.weight" in read_tensors(tmp_path / "scratch")
    assert summary.num_trainable == sum(t.size for t in read_tensors(tmp_path / "scratch").values())


def test_full_fine_tuned_weights_load_in_mlx_lm(make_recipe, model_folder, tmp_path):
    recipe = make_recipe("full", "fine_tune_type=full", "lora_parameters=null", "learning_rate=1e-3")
    summary = run(recipe, console=quiet())
    theirs, _ = mlx_lm.load(str(model_folder), adapter_path=str(tmp_path / "full"))
    assert mean_valid_loss(theirs, recipe) == pytest.approx(summary.valid_loss, rel=1e-4)
    assert summary.valid_loss < summary.first_valid_loss


def test_early_stopping_ends_the_run_and_says_so(make_recipe):
    recipe = make_recipe(
        "early",
        "early_stopping_patience=2",
        "steps_per_eval=1",
        "iters=50",
        "lr_schedule={name: constant}",
        "learning_rate=1.0",
        "max_grad_norm=null",
    )
    summary = run(recipe, console=quiet())
    assert summary.status == "stopped_early"
    assert summary.steps == summary.best_step + 2 < 50
