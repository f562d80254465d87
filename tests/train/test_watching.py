"""What a run shows of itself: boards, samples, the learning curve, and the list of runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from serve.adapters.formats.manifest import read_config, read_tensors
from serve.errors import ConfigError, NotFoundError, TrainingError
from serve.model.loading import load
from serve.tables import show
from train.foresee.preflight import prepare
from train.loop.optim import rates_of, schedule_of
from train.loop.wired import recommended_bytes, wired
from train.recipe.recipe import load_recipe
from train.run import run
from train.watch import curve, panels, record, runs, summary
from train.watch.metrics import MetricsLog, rows_of

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
RECIPE = """
num_layers: -1
batch_size: 2
iters: 6
learning_rate: 1e-2
lora_parameters: {rank: 4, scale: 4.0, dropout: 0.1}
steps_per_report: 2
steps_per_eval: 3
save_every: 3
"""


@pytest.fixture(scope="module")
def rows_folder(make_rows) -> Path:
    return make_rows(train=9, valid=3)


@pytest.fixture
def train(tmp_path, model_folder, rows_folder):
    """train(name, *overrides) → (folder, what was printed)"""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)

    def start(name: str, *overrides: str, resume: bool = False, overwrite: bool = False) -> tuple[Path, str]:
        folder = tmp_path / name
        places = (f"model={model_folder}", f"data={rows_folder}", f"adapter_path={folder}")
        console = Console(file=io.StringIO(), width=200)
        recipe = load_recipe(path, (*places, *overrides))
        run(recipe, resume=resume, overwrite=overwrite, console=console)
        return folder, console.file.getvalue()

    return start


def board_of(folder: Path) -> dict[str, dict[int, object]]:
    """TensorBoard's event files as tag → step → number or text."""
    found: dict[str, dict[int, object]] = {}
    for file in sorted((folder / "tensorboard").glob("events*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                text = value.tensor.string_val
                shown = text[0].decode() if text else value.simple_value
                found.setdefault(value.tag, {})[event.step] = shown
    return found


def test_tensorboard_gets_every_number_and_the_samples_as_text(train):
    folder, printed = train("out", "samples={prompts: [hello there], max_tokens: 6}")
    board = board_of(folder)
    wanted = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "padding_frac", "memory_bytes")
    assert {f"train/{name}" for name in wanted} <= board.keys()
    assert list(board["train/loss"]) == [2, 4, 6]
    assert list(board["valid/loss"]) == [0, 3, 6]
    rows = [row for row in rows_of(folder) if row["kind"] == "sample"]
    texts = next(values for tag, values in board.items() if tag.startswith("sample/0"))
    assert list(texts) == [row["step"] for row in rows] == [0, 3, 6]
    assert all("hello there" in text for text in texts.values())
    for row in rows:
        assert all(line in texts[row["step"]] for line in row["answer"].splitlines())
    assert "hello there →" in printed


def test_samples_change_nothing_of_the_training_and_show_that_it_learns(train):
    plain, _ = train("plain")
    sampled, _ = train("sampled", "samples={rows: 2, max_tokens: 8, temperature: 1.0, seed: 3}")
    ours, theirs = read_tensors(plain), read_tensors(sampled)
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    answers = [row["answer"] for row in rows_of(sampled) if row["kind"] == "sample" and row["number"] == 0]
    assert len(answers) == 3
    assert len(set(answers)) > 1


def test_sample_prompts_may_be_conversations_and_a_bad_one_is_named(train):
    folder, _ = train(
        "out", "samples.prompts=[[{role: user, content: a}, {role: user, content: b}], c]", "iters=2"
    )
    prompts = {row["number"]: row["prompt"] for row in rows_of(folder) if row["kind"] == "sample"}
    assert prompts == {0: "user: a\nuser: b", 1: "c"}
    with pytest.raises(ConfigError, match=r"samples\.prompts\.1"):
        train("bad", "samples.prompts=[a, [{role: user, content: [{type: image_url}]}]]")


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)"
)
def test_weights_and_biases_gets_the_same_offline_and_a_continuation_the_same_run(
    tmp_path, model_folder, rows_folder
):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    script = (
        "import sys; from train.recipe.recipe import load_recipe; from train.run import run\n"
        "for iters, resume in ((3, None), (6, True)):\n"
        "    run(load_recipe(sys.argv[1], [*sys.argv[2:], f'iters={iters}']), resume=resume)"
    )
    words = [f"model={model_folder}", f"data={rows_folder}", f"adapter_path={tmp_path / 'out'}"]
    words += ["report_to=wandb", "project_name=tests", "samples={rows: 1, max_tokens: 4}"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "recipe.yaml"), *words],
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = list((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "both processes wrote to one run"
    stored = b"".join(file.read_bytes() for file in files)
    for word in (b"train/loss", b"valid/loss", b"train/tokens_per_s", b"sample/0", b"tests"):
        assert word in stored


def test_wandb_that_is_not_installed_says_how_to_install_it():
    # The packages' folder is hidden after the imports: what a machine without wandb sees.
    script = (
        "import sys; from serve.errors import ConfigError; from train.watch.wandb_log import check_installed\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "try:\n    check_installed()\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "wandb is not installed; `pip install" in done.stdout, done.stderr


def test_the_learning_curve_is_a_picture_of_the_whole_history(train):
    folder, _ = train("out", "iters=3")
    first = Image.open(folder / curve.FILE).size
    train("out", resume=True)
    history = curve.read(folder)
    assert [step for step, _ in history.train_loss] == [2, 3, 4, 6]
    assert [step for step, _ in history.valid_loss] == [0, 3, 6]
    assert history.best == min(history.valid_loss[1:], key=lambda point: point[1])
    picture = np.asarray(Image.open(folder / curve.FILE).convert("RGB")).reshape(-1, 3)
    assert Image.open(folder / curve.FILE).size == first
    for color in (panels.TRAIN, panels.VALID, panels.RATE, panels.NORM):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - np.array(wanted)).max(axis=1) < 30).sum() > 20, color


def steps_of(*values: float, every: int = 5) -> list[tuple[int, float]]:
    return [(every * (number + 1), value) for number, value in enumerate(values)]


FALLING = steps_of(0.693, 0.5, 0.2, 0.06, 0.031)
PAIRS = {
    f"{name}/{which}": FALLING
    for name in ("rewards", "logps")
    for which in ("chosen", "rejected", "margins", "accuracies")
}
COMMON = {
    "learning_rate": steps_of(4e-4, 3e-4, 2e-4, 1e-4, 1e-5),
    "grad_norm": steps_of(1e4, 3.0, 2.0, 1.0, 2e-5),
}
HISTORIES = {
    "sft": curve.History(
        {"loss": FALLING, **COMMON}, {"loss": FALLING, "mean_token_accuracy": FALLING, "exact_match": FALLING}
    ),
    "dpo": curve.History({"loss": FALLING, **PAIRS, **COMMON}, {"loss": FALLING, **PAIRS}),
    "orpo": curve.History(
        {"loss": FALLING, "nll_loss": FALLING, "log_odds_chosen": FALLING, **PAIRS, **COMMON},
        {"loss": [(0, 0.17), *FALLING], "nll_loss": FALLING, "log_odds_chosen": FALLING, **PAIRS},
    ),
    "kto": curve.History({"loss": FALLING, "kl": FALLING, **COMMON}, {"loss": FALLING, "kl": FALLING}),
    "grpo": curve.History(
        {
            "loss": steps_of(-0.2, 0.1, 0.003, -0.001, 0.0),
            "reward": FALLING,
            "reward_std": FALLING,
            "completions/mean_length": steps_of(20, 21, 22, 30, 40),
            "kl": FALLING,
            "completions/clipped_ratio": FALLING,
            "frac_reward_zero_std": FALLING,
            **COMMON,
        },
        {"loss": steps_of(-0.1, -0.5, -0.9), "reward": steps_of(0.1, 0.5, 0.9)},
    ),
    "draft": curve.History(
        {"loss": FALLING, **COMMON},
        {
            "loss": FALLING,
            **{
                f"{name}/{way}": FALLING
                for name in ("acceptance", "accepted_of_4")
                for way in ("coupled", "greedy")
            },
        },
    ),
    "spike": curve.History({"loss": steps_of(123456.0, 3.0, 0.0021, 1e-7)}, {}),
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("title", ["runs/x", "/a/long/path/of/a/run" * 8 + "   ·   Qwen3-0.6B, lora, dpo"])
def test_nothing_that_is_written_in_a_picture_is_cut(name, title):
    figure = curve.figure_of(HISTORIES[name], title, [1e-4] * 25)
    figure.canvas.draw()
    (width, height), drawn = figure.get_size_inches(), figure.get_tightbbox(figure.canvas.get_renderer())
    assert drawn.x0 >= 0, "at the left edge"
    assert drawn.y0 >= 0, "at the bottom"
    assert drawn.x1 <= width, "at the right edge"
    assert drawn.y1 <= height, "at the top"


@pytest.mark.parametrize("name", HISTORIES)
def test_panels_are_read_side_by_side(name):
    """The same steps stand at the same place, and what is written stands on one line."""
    figure = curve.figure_of(HISTORIES[name], "runs/x", [1e-4] * 25)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    rows: dict[int, set[int]] = {}
    for axes in figure.axes:
        assert axes.yaxis.get_offset_text().get_text() == ""
        low, high = axes.get_ylim()
        labels = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
        assert len(labels) == len(set(labels)) >= 3, labels
        height = round(axes._left_title.get_window_extent(renderer).y0)
        rows.setdefault(axes.get_subplotspec().rowspan.start, set()).add(height)
    assert all(len(heights) == 1 for heights in rows.values()), rows


def test_a_number_beside_an_axis_is_whole():
    numbers = {
        0: "0",
        0.25: "0.25",
        5e-4: "5e-4",
        2.5e-5: "2.5e-5",
        -0.2: "-0.2",
        99_999: "99999",
        1.2e5: "1.2e5",
    }
    assert {number: curve.written(number) for number in numbers} == numbers
    assert curve.written(0.1 + 0.2) == "0.3"


def test_each_objective_shows_what_a_person_asks_of_it():
    asked = {
        "sft": ["loss", "accuracy of validation"],
        "dpo": ["loss", "accuracy: the better answer ahead", "margin of rewards", "rewards"],
        "orpo": [
            "loss",
            "accuracy: the better answer ahead",
            "margin of rewards",
            "likelihood: loss of chosen answers",
            "log odds of the better answer",
        ],
        "kto": ["loss", "KL from the reference"],
        "draft": ["loss", "share of tokens that are guessed", "guesses accepted, of 4 in a row"],
        "grpo": [
            "reward",
            "tokens of an answer",
            "KL from the reference",
            "share of answers",
            "surrogate loss",
        ],
    }
    for name, titles in asked.items():
        history = HISTORIES[name]
        shown = panels.panels_of(history.train, history.valid)
        assert [panel.title for panel in shown][: len(titles)] == titles
        assert [panel.title for panel in shown][-2:] == ["learning rate", "gradient norm"]
    reward, *_ = panels.panels_of(HISTORIES["grpo"].train, HISTORIES["grpo"].valid)
    assert reward.star == ((15, 0.9), "highest validation reward: 0.9 at step 15")
    everything = [line.points for line in reward.lines]
    assert everything == [FALLING, steps_of(0.1, 0.5, 0.9)], "and no loss on the same axis"


def test_a_warm_up_shorter_than_a_report_is_drawn(train):
    folder, _ = train("out", "iters=6", "steps_per_report=6", "lr_schedule={name: cosine_decay, warmup: 3}")
    reported = curve.read(folder).train["learning_rate"]
    schedule = schedule_of(load_recipe(folder / "recipe.yaml"), 6)
    rates = rates_of(schedule, 6)
    assert rates[0] == 0.0
    assert rates[:4] == sorted(rates[:4])
    assert rates[5] == pytest.approx(reported[0][1], rel=1e-5)
    rate = panels.panels_of({"loss": FALLING, "learning_rate": reported}, {}, rates)[-1]
    assert [step for step, _ in rate.lines[0].points] == [1, 2, 3, 4, 5, 6]


def test_validation_says_how_many_tokens_are_the_likeliest(train, model_folder):
    folder, printed = train("out", "iters=2")
    shares = [share for _, share in curve.read(folder).valid["mean_token_accuracy"]]
    assert len(shares) == 2
    assert all(0 <= share <= 1 for share in shares)
    assert "mean_token_accuracy" in printed
    network = load(str(model_folder)).network
    recipe = load_recipe(folder / "recipe.yaml")
    right = count = 0
    for batch in prepare(recipe).valid_batches():
        likeliest = np.array(network.module(mx.array(batch.tokens)).argmax(-1))[:, :-1]
        counted = batch.is_target[:, 1:]
        right += int((likeliest == batch.tokens[:, 1:])[counted].sum())
        count += int(counted.sum())
    assert shares[0] == pytest.approx(right / count, abs=1.5 / count)


def test_a_running_mean_forgets_by_half_over_a_twentieth():
    means = curve.running_mean([1.0] * 100)
    assert means == pytest.approx([1.0] * 100)
    step = curve.running_mean([0.0] * 1000 + [1.0] * 50)
    assert step[-1] == pytest.approx(0.5, abs=0.03)


def test_a_picture_is_not_drawn_again_at_once(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("valid", 0, loss=1.0)
        drawn = curve.LearningCurve(tmp_path, "x")
        drawn.refresh()
        assert not (tmp_path / curve.FILE).exists()
        drawn.draw()
        assert (tmp_path / curve.FILE).exists()
        (tmp_path / curve.FILE).unlink()
        drawn.refresh()
        assert not (tmp_path / curve.FILE).exists()


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("valid", 1, loss=float("nan"), other=float("inf"))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert next(rows_of(tmp_path))["loss"] is None


def test_runs_are_listed_with_where_they_came_from(train, tmp_path):
    parent, _ = train("all/first")
    warm, _ = train("all/deeper/warm", f"resume_adapter_file={parent}", "metric={rows: 2, max_tokens: 4}")
    train("all/cut", "iters=3")
    train("all/cut", resume=True)
    (parent / "checkpoints" / "step-000003" / "run.json").write_text("{}")  # nothing inside a run is a run
    found = {run.name: run for run in runs.find([tmp_path / "all", parent])}
    assert found.keys() == {"first", "warm", "cut"}
    assert {run.status for run in found.values()} == {"finished"}
    told = summary_of(parent)
    assert (found["first"].judged_by, found["first"].best_value) == ("loss", told["best_valid_loss"])
    assert found["first"].steps == told["steps"] == 6
    assert found["warm"].parent_hash == found["first"].content_hash == told["content_hash"]
    assert read_config(warm).lineage.parent_hash == told["content_hash"]
    assert found["warm"].metric == "exact_match"
    assert Path(found["cut"].resumed_from).name == "step-000003"
    assert len({run.base_fingerprint for run in found.values()}) == 1
    drawn = Console(file=io.StringIO(), width=250)
    show(drawn, *runs.tables(list(found.values())))
    result, origin = (line for line in drawn.file.getvalue().splitlines() if "deeper/warm" in line)
    assert "exact_match" in result
    assert "lora sft" in origin
    assert f"first {told['content_hash'][7:15]}" in origin
    summary = json.loads((warm / "summary.json").read_text())
    summary["metric_after"] = summary.pop("exact_match")  # as earlier versions wrote it
    (warm / "summary.json").write_text(json.dumps(summary))
    assert runs.describe(warm).metric_value == found["warm"].metric_value is not None


def test_a_list_of_runs_is_whole_in_80_columns():
    run = runs.Run(
        "runs/support-tickets-large", "support-tickets-large", "interrupted", steps=12_000, best_step=11_900
    )
    run = replace(run, best_value=1.2345, created="2026-11-21T17:46:00+00:00", seconds=5400.0)
    drawn = Console(file=io.StringIO(), width=80)
    show(drawn, *runs.tables([run]))
    shown = drawn.file.getvalue()
    assert "…" not in shown
    for words in ("interrupted", "12,000", "1.2345 @11,900", "2026-11-21 17:46"):
        assert words in shown
    narrow = Console(file=io.StringIO(), width=40)
    show(narrow, *runs.tables([run]))
    assert narrow.file.getvalue().count("runs/support-tickets-large") == 2


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "adapters.safetensors").unlink(), "adapters.safetensors is missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: os.truncate(folder / "adapters.safetensors", 300), "truncated"),
        (lambda folder: os.truncate(folder / "adapters.safetensors", 0), "truncated"),
        (
            lambda folder: (folder / "adapter_config.json").write_text(
                (folder / "adapter_config.json")
                .read_text()
                .replace('content_hash": "sha256:', 'content_hash": "sha256:0')
            ),
            "is of another adapter",
        ),
    ],
)
def test_a_run_whose_adapter_is_missing_or_torn_is_not_finished(train, damage, told):
    folder, _ = train("out", "iters=1")
    assert runs.describe(folder).status == "finished"
    damage(folder)
    found = runs.describe(folder)
    assert found.status == "broken"
    assert told in found.problem


def summary_of(folder: Path) -> dict:
    return json.loads((folder / summary.FILE).read_text())


def test_a_broken_folder_is_listed_as_such_and_breaks_nothing(train, tmp_path):
    train("all/good", "iters=2")
    for name, file, text in (
        ("no-json", record.FILE, "{"),
        ("list", summary.FILE, "[1]"),
        ("empty", record.FILE, "{}"),
        ("odd", record.FILE, json.dumps({"created": 7, "error": ["x"], "pid": "me"})),
    ):
        folder = tmp_path / "all" / name
        folder.mkdir()
        (folder / file).write_text(text)
        (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": 0.5}\n[1]\n{"kind": "va')
    found = runs.find([tmp_path / "all"])
    status = {run.name: run.status for run in found}
    assert status == {
        "good": "finished",
        "no-json": "broken",
        "list": "broken",
        "empty": "interrupted",
        "odd": "failed",
    }
    assert found[0].name == "good"
    assert {run.steps for run in found if run.name != "good"} == {3}
    assert "run.json" in next(run.problem for run in found if run.name == "no-json")
    show(Console(file=io.StringIO()), *runs.tables(found))
    with pytest.raises(NotFoundError, match="no folder"):
        runs.find([tmp_path / "nowhere"])


def test_a_manifest_of_another_version_is_read(train):
    folder, _ = train("out", "iters=2")
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    for name in ("parent", "parent_hash", "objective"):
        del raw["lineage"][name]
    raw["lineage"]["of_a_later_version"] = 1
    path.write_text(json.dumps(raw))
    assert read_config(folder).lineage.objective == ""
    assert runs.describe(folder).objective == "sft"


RECORD = record.RunRecord("x", "2026-01-01T00:00:00+00:00", "m", "", "", "", "sft", "lora", 3)


def test_a_failed_run_says_why_and_a_process_that_trains_is_not_disturbed(train, tmp_path):
    folder = tmp_path / "busy"
    with pytest.raises(TrainingError, match="nan"), record.running(RECORD, folder):
        raise TrainingError("step 3: the loss is nan")
    failed = runs.describe(folder)
    assert (failed.status, failed.problem) == ("failed", "step 3: the loss is nan")
    parent = psutil.Process(os.getppid())
    theirs = dataclasses.replace(
        RECORD, host=socket.gethostname(), pid=parent.pid, process_started=parent.create_time()
    )
    record.write(theirs, folder)
    assert runs.describe(folder).status == "running"
    with pytest.raises(ConfigError, match=f"another run, process {parent.pid}"):
        train("busy")
    record.write(
        dataclasses.replace(theirs, process_started=1.0), folder
    )  # that number is another process's now
    assert runs.describe(folder).status == "interrupted"
    train("busy", "iters=2", resume=True)
    assert runs.describe(folder).status == "finished"


def test_a_step_that_is_not_finite_is_in_metrics_and_the_run_is_listed_as_failed(train, tmp_path):
    with pytest.raises(TrainingError, match="10 steps in a row"):
        train("out", "optimizer=sgd", "learning_rate=1e38", "nonfinite_policy=skip", "iters=20")
    rows = [row for row in rows_of(tmp_path / "out") if row["kind"] == "nonfinite"]
    assert [row["action"] for row in rows] == ["skip"] * 9 + ["stop"]
    assert all("train.jsonl:" in row["rows"] for row in rows)
    failed = runs.describe(tmp_path / "out")
    assert failed.status == "failed"
    assert "10 steps in a row" in failed.problem


def test_resume_without_a_checkpoint_starts_over_but_never_over_a_finished_run(train, tmp_path):
    _, printed = train("out", "iters=2", resume=True)
    assert "no checkpoint in" in printed
    assert "starts from the beginning" in printed
    for checkpoint in (tmp_path / "out" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(ConfigError, match="is finished and has no checkpoint"):
        train("out", "iters=2", resume=True)


def test_a_checkpoint_continued_in_another_folder_leaves_its_own_run_alone(train, tmp_path):
    first, _ = train("first")
    before = sorted(path.name for path in (first / "checkpoints").iterdir())
    second, _ = train("second", f"resume_from_checkpoint={first / 'checkpoints' / 'step-000003'}")
    assert sorted(path.name for path in (first / "checkpoints").iterdir()) == before
    assert [step for step, _ in curve.read(second).valid_loss] == [0, 3, 6]
    ours, theirs = read_tensors(second), read_tensors(first)
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)


def test_a_recipe_that_does_not_fit_a_checkpoint_removes_no_later_one(train):
    folder, _ = train("out")
    checkpoint = folder / "checkpoints" / "step-000003"
    with pytest.raises(ConfigError, match="cannot be continued"):
        train("out", f"resume_from_checkpoint={checkpoint}", "seed=5", overwrite=True)
    assert (folder / "checkpoints" / "step-000006").is_dir()


@pytest.mark.skipif(sys.platform == "darwin", reason="there is a wired limit here")
def test_without_metal_there_is_no_wired_limit():
    assert recommended_bytes() is None
    with wired() as limit:
        assert limit is None


@pytest.mark.metal
@pytest.mark.skipif(not mx.metal.is_available(), reason="needs a Mac")
def test_the_wired_limit_is_raised_while_training_and_put_back():
    before = mx.set_wired_limit(0)
    with wired() as limit:
        assert limit == mx.device_info()["max_recommended_working_set_size"]
        assert mx.set_wired_limit(limit) == limit
    assert mx.set_wired_limit(before) == 0
