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

ROOT = Path(lathe.__file__).parent
COMMANDS = (
    "train",
    "runs",
    "serve",
    "chat",
    "ab",
    "ab report",
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


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_name_can_be_printed(encoding, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", f"{encoding}:strict")
    names = (":key:", "日", os.fsdecode(b"not-\xff-utf-8"))
    for name in names:
        (tmp_path / name).mkdir()
    command = [sys.executable, "-P", "-m", "lathe", "runs", *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = names[1].encode(encoding, errors="backslashreplace")
    assert done.stdout.replace(b"\n", b" ").startswith(
        b"no runs under :key:, " + shown + b", not-\\udcff-utf-8"
    )


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
