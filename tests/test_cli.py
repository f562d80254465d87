"""The front door: what it loads, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lathe
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.store import Exposure, Store

ROOT = Path(lathe.__file__).parent
COMMANDS = (
    "train",
    "runs",
    "serve",
    "chat",
    "ab",
    "ab report",
    "ab runs",
    "ab drop",
    "export",
    "bench",
    "bench serve",
    "bench compare",
    "bench train",
    "demo",
    "doctor",
)


def run_lathe(*words: str, cwd: Path = ROOT, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lathe", *words]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=False)


def test_help_loads_neither_mlx_nor_our_packages():
    script = (
        "import sys, lathe\n"
        "sys.argv = ['lathe', '--help']\n"
        "try:\n    lathe.main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'mlx', 'serve', 'train', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "doctor" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(lathe.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_the_list_of_commands_here_is_complete():
    groups = {"": lathe.app, "ab ": lathe.ab_app, "bench ": lathe.bench_app}
    named = {
        prefix + (command.name or command.callback.__name__)
        for prefix, group in groups.items()
        for command in group.registered_commands
    }
    assert named | {"ab", "bench"} == set(COMMANDS)


BROKEN_RECIPE = "model: nowhere/at-all/here\nlerning_rate: 1e-4\ndata: rows\niters: many\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train {tmp}/missing.yaml", ("missing.yaml",)),
        ("train {tmp}/broken.yaml", ("lerning_rate", "learning_rate", "iters")),
        ("train {tmp}/broken.yaml --set batch_size", ("batch_size",)),
        ("serve {tmp}/no-such-model", ("no-such-model",)),
        ("serve {tmp}/missing.yaml", ("missing.yaml",)),
        ("serve {tmp}/no-such-model --adapter nameless", ("NAME=PATH",)),
        ("chat --url http://127.0.0.1:1", ("http://127.0.0.1:1", "lathe serve")),
        ("chat", ("--url",)),
        ("chat {tmp}/no-such-model", ("no-such-model",)),
        ("chat {tmp}/no-such-model --url http://127.0.0.1:1", ("--url",)),
        ("ab report nothing --store sqlite:///{tmp}/none.sqlite", ("none.sqlite",)),
        ("ab runs nothing --store sqlite:///{tmp}/none.sqlite", ("none.sqlite",)),
        ("ab drop nothing --outcome x --store sqlite:///{tmp}/none.sqlite", ("none.sqlite",)),
        ("export {tmp}/no-such-adapter {tmp}/out", ("no-such-adapter",)),
        ("export {tmp}/no-such-adapter {tmp}/out --bits 3", ("--bits", "4 or 8")),
        ("bench serve --url http://127.0.0.1:1", ("http://127.0.0.1:1",)),
        ("bench serve --concurrency 1,none", ("--concurrency", "1,4,16")),
        ("bench train --batch-size 0", ("--batch-size", "found 0", "1 or more")),
        ("bench train --iters 1", ("--iters", "found 1", "2 or more")),
        ("bench train --model nowhere/at-all", ("nowhere/at-all",)),
        ("bench train --json /dev/null/numbers.json", ("/dev/null/numbers.json", "cannot be written")),
        ("bench serve --endpoint mail", ("--endpoint", "completions")),
        ("demo --folder {tmp}", ("another folder",)),
        ("no-such-command", ("no-such-command",)),
    ],
)
def test_bad_input_ends_with_status_2_and_one_clear_message(words, said, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text(BROKEN_RECIPE)
    with pytest.raises(SystemExit) as stop:
        lathe.main([word.format(tmp=tmp_path) for word in words.split()])
    assert stop.value.code == 2
    out, told = capsys.readouterr()
    assert not out
    flat = " ".join(told.replace("│", " ").split())
    for word in said:
        assert word in flat


def test_the_installed_command_ends_the_same_way(tmp_path):
    done = run_lathe("train", "missing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_messages_keep_their_brackets(tmp_path, capsys):
    """Rich markup in a message would swallow `[…]`."""
    with pytest.raises(SystemExit):
        lathe.main(["train", f"{tmp_path}/[bold]x[bold].yaml"])
    assert "[bold]x[bold].yaml" in capsys.readouterr().err


def test_doctor_measures_the_machine_and_writes_every_number(tmp_path):
    done = run_lathe("doctor", "--json", str(tmp_path / "deep" / "doctor.json"))
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "deep" / "doctor.json").read_text())
    assert numbers["matmul_gflops"] > 0
    assert numbers["device"]["memory_bytes"] > 2**28
    assert numbers["packages"]["mlx-lm"]
    for shown in (numbers["device"]["mlx_version"], f"{numbers['matmul_gflops']:.1f} GFLOP/s"):
        assert shown in done.stdout


def test_a_json_file_that_cannot_be_written_is_a_foreseen_failure(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_lathe("doctor", "--json", str(tmp_path / "file" / "doctor.json"))
    assert done.returncode == 1
    assert "doctor.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def experiment_store(tmp_path):
    """The URL of a store with two runs of `tickets`: slow answers, long names, and a misspelled outcome."""
    url = f"sqlite:///{tmp_path}/e.sqlite"
    store = Store(url)
    variants = (
        Variant("customer-support-router-rank-8", "a"),
        Variant("customer-support-router-rank-64", "b"),
    )
    for salt in ("old", "new"):
        run = store.begin_run(Experiment("tickets", salt, variants)).id
        for i in range(60):
            arm, completion = i % 2, f"{salt}-{i}"
            model = f"{variants[arm].model}@1"
            store.expose(
                Exposure(completion, run, variants[arm].name, f"u{i}", model, "abc", float(i), 1.276)
            )
            store.complete(completion, latency_s=12.345 if arm else 123.456, num_tokens=5, finish="stop")
            store.record_outcome(completion, "exact_match", float(arm))
    store.record_outcome("new-7", "exct_match", 1.0)
    store.close()
    return url


def run_at(width: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A command with its output in a pipe, told that a line has so many columns."""
    command = [sys.executable, "-P", "-m", "lathe", *words]
    environment = {**os.environ, "COLUMNS": str(width)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_report_in_a_pipe_cuts_no_digit_and_no_name(width, experiment_store):
    done = run_at(width, "ab", "report", "tickets", "--outcome", "exact_match", "--store", experiment_store)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split()
    for word in (
        "1,276",
        "12,345",
        "123,456",
        "customer-support-router-rank-8",
        "customer-support-router-rank-64",
    ):
        assert word in shown, done.stdout
    assert "better, difference +1.000" in done.stdout
    assert "exct_match 1." in done.stdout


def test_runs_are_listed_and_reported_on_by_number(experiment_store):
    listed = run_at(200, "ab", "runs", "tickets", "--store", experiment_store).stdout
    newest, *_, oldest = [line.split() for line in listed.splitlines()[2:] if line[0] != " "]
    assert (newest[0], oldest[0]) == ("2", "1")
    assert (
        "run 1 (exposures: 60" in run_at(200, "ab", "report", "tickets", "--store", experiment_store).stdout
    )
    first = run_at(200, "ab", "report", "tickets", "--run", "1", "--store", experiment_store)
    assert first.stdout.startswith("tickets, run 1,")
    assert "better" in first.stdout
    assert run_at(200, "ab", "report", "tickets", "--run", "3", "--store", experiment_store).returncode == 2


def test_an_outcome_is_dropped_only_if_somebody_says_yes(experiment_store):
    words = ("ab", "drop", "tickets", "--outcome", "exct_match", "--store", experiment_store)
    unasked = run_at(200, *words)
    assert unasked.returncode == 2
    assert "--yes" in unasked.stderr
    unclear = run_at(200, "ab", "report", "tickets", "--store", experiment_store)
    assert unclear.returncode == 0
    assert "exact_match 60, exct_match 1; nothing is compared" in unclear.stdout
    assert run_at(200, *words, "--yes").stdout == "deleted 1 of outcome exct_match in run 2 of tickets\n"
    clear = run_at(200, "ab", "report", "tickets", "--store", experiment_store).stdout
    assert "better, difference +1.000" in clear
    assert "Dropped by hand: 1 of outcome exct_match" in clear
    again = run_at(200, *words, "--yes")
    assert again.returncode == 2
    assert "exact_match 60" in again.stderr
