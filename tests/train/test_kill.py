"""kill -9 at any instant of a run, then --resume: as if nothing had happened, and nothing left lying about."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from serve import device
from serve.adapters.formats.manifest import read_config, read_tensors
from train.loop import checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        device.backend() != "cpu",
        reason="the runs are forked from one process, which neither Metal nor CUDA survives",
    ),
]

RECIPE = """
num_layers: -1
batch_size: 2
iters: 14
learning_rate: 1e-2
lora_parameters: {rank: 4, scale: 4.0, dropout: 0.1}
lr_schedule: {name: cosine_decay, warmup: 2}
grad_accumulation_steps: 2
steps_per_report: 3
steps_per_eval: 4
save_every: 2
save_total_limit: 2
load_best_model_at_end: true
test: true
metric: {rows: 2, max_tokens: 4}
samples: {rows: 1, max_tokens: 4, temperature: 1.0}
"""

# One process imports everything and computes nothing; each life of a run is forked from it, so that a hundred of them
# take minutes. A life is killed after some seconds, or at its n-th file operation, which Python's audit events count.
SCRIPT = """
import io, json, os, random, select, signal, sys, time, traceback
from pathlib import Path
import matplotlib.backends.backend_agg, matplotlib.figure, matplotlib.ticker, tensorboardX  # when they are used
from rich.console import Console
from train.recipe.recipe import load_recipe
from train.run import run
from serve import device
from serve.adapters.formats.manifest import read_config, read_tensors
from serve.errors import AdapterError, NotFoundError

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}

def die_at(place, folder):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == place:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

def life(work, *, after_s=None, at=None, folder=None):
    '''"ended", "killed" or "failed"'''
    ended, mine = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ended)
        try:
            if at is not None:
                die_at(at, folder)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(mine)
    if after_s is not None and not select.select([ended], [], [], after_s)[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(ended)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return "killed"
    return "ended" if status == 0 else "failed"

def train(recipe, resume, overwrite=False):
    return lambda: run(recipe, resume=resume, overwrite=overwrite, console=Console(file=io.StringIO()))

def published(folder):
    '''A reader gets a whole adapter or an error; never one half of each of two.'''
    try:
        read_tensors(folder, read_config(folder))
    except (AdapterError, NotFoundError):
        pass

def of(folder):
    return load_recipe(Path(sys.argv[1]), [*sys.argv[2:], *more, f"adapter_path={folder}"])
"""


@pytest.fixture(scope="module")
def rows_folder(make_rows) -> Path:
    return make_rows(train=13, valid=4, test=2)


@pytest.fixture
def lives(tmp_path, model_folder, rows_folder) -> Callable[..., dict]:
    """lives(script, **values) → the JSON object it prints at its end; SCRIPT's functions are there."""

    def run(script: str, **values: object) -> dict:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE)
        settings = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        whole = f"{SCRIPT}\n{settings}\n{textwrap.dedent(script)}"
        words = [str(recipe), f"model={model_folder}", f"data={rows_folder}", "dataset_prepared_path=null"]
        done = subprocess.run(
            [sys.executable, "-c", whole, *words], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


TIMES = {"time", "seconds", "targets_per_s", "tokens_per_s", "memory_bytes", "eta_s", "overhead_frac"}


def metrics_of(folder: Path) -> list[dict]:
    """Without what is a measurement of the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def names_in(folder: Path) -> set[str]:
    """Files and folders of a run; of TensorBoard and W&B, which name files by time, only the folder."""
    paths = {path.relative_to(folder) for path in folder.rglob("*")}
    return {
        str(path) for path in paths if path.parts[0] not in ("tensorboard", "wandb") or len(path.parts) == 1
    }


def assert_same_run(folder: Path, reference: Path) -> None:
    ours, theirs = read_tensors(folder, read_config(folder)), read_tensors(reference)
    assert all(np.array_equal(np.array(ours[name]), np.array(tensor)) for name, tensor in theirs.items())
    last, theirs_last = (checkpoint.load(checkpoint.find(place)) for place in (folder, reference))
    assert all(
        mx.array_equal(last.optimizer[name], tensor).item() for name, tensor in theirs_last.optimizer.items()
    )
    assert metrics_of(folder) == metrics_of(reference)
    assert names_in(folder) == names_in(reference)
    summary, wanted = (json.loads((place / "summary.json").read_text()) for place in (folder, reference))
    same = ("status", "steps", "content_hash", "best_step", "published_step", "valid_loss", "test_loss")
    assert {name: summary[name] for name in same} == {name: wanted[name] for name in same}


def kill_at_random(lives, tmp_path: Path, num_kills: int, seed: int) -> dict:
    """Runs one after the other, each killed at random instants and resumed until it ends."""
    told = lives(
        """
        start = time.perf_counter()
        assert life(train(of(root + "/straight"), None)) == "ended"
        whole_s = time.perf_counter() - start
        random.seed(seed)
        kills, number, folders = 0, 0, []
        while kills < num_kills:
            folder = f"{root}/cut-{number}"
            number += 1
            folders.append(folder)
            while (end := life(train(of(folder), True), after_s=random.uniform(0.05, whole_s))) != "ended":
                assert end == "killed", f"life {kills} of {folder} failed"
                kills += 1
        print(json.dumps({"kills": kills, "folders": folders, "whole_s": whole_s}))
        """,
        root=str(tmp_path),
        more=[],
        num_kills=num_kills,
        seed=seed,
    )
    for folder in told["folders"]:
        assert_same_run(Path(folder), tmp_path / "straight")
    assert told["kills"] >= num_kills
    return told


def test_a_few_kills_at_random_instants_change_nothing(lives, tmp_path):
    kill_at_random(lives, tmp_path, 4, seed=1)


@pytest.mark.large
def test_a_hundred_kills_at_random_instants_change_nothing(lives, tmp_path):
    told = kill_at_random(lives, tmp_path, 100, seed=2)
    print(f"{told['kills']} kills in {len(told['folders'])} runs of {told['whole_s']:.2f} s")


def kill_at_operations(lives, tmp_path: Path, every: int, first: int) -> dict:
    """A run killed at one of its file operations, and resumed; again for the others, `every`-th from `first` on."""
    told = lives(
        """
        assert life(train(of(root + "/straight"), None)) == "ended"
        at, folders = first, []
        while True:
            folder = f"{root}/at-{at}"
            end = life(train(of(folder), None), at=at, folder=folder)
            if end == "ended":
                break
            assert end == "killed", f"operation {at} failed"
            assert life(lambda: published(Path(folder))) == "ended"
            assert life(train(of(folder), True)) == "ended", f"after a kill at operation {at}"
            folders.append(folder)
            at += every
        print(json.dumps({"operations": at, "folders": folders}))
        """,
        root=str(tmp_path),
        more=["iters=6", "save_every=2", "steps_per_eval=2", "save_total_limit=1"],
        every=every,
        first=first,
    )
    for folder in told["folders"]:
        assert_same_run(Path(folder), tmp_path / "straight")
    return told


def test_a_kill_at_a_file_operation_changes_nothing(lives, tmp_path):
    """A sample of them, spread over the whole run; the large test takes all."""
    told = kill_at_operations(lives, tmp_path, every=47, first=11)
    assert len(told["folders"]) >= 2


@pytest.mark.large
def test_a_kill_at_any_file_operation_changes_nothing(lives, tmp_path):
    told = kill_at_operations(lives, tmp_path, every=1, first=1)
    assert len(told["folders"]) > 60
    print(f"{told['operations']} file operations")


def kill_while_replacing(lives, tmp_path: Path, every: int, first: int) -> dict:
    """A new run over an earlier one, killed at one of its file operations: the earlier one, or the new one, is whole.

    And it goes on: what is there in the end is the new run, as if nothing had happened.
    """
    told = lives(
        """
        import shutil
        from train import replace

        def files(folder):
            return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}

        def hash_of(folder):
            return json.loads((folder / "adapter_config.json").read_text())["lineage"]["content_hash"]

        def look(folder):
            new, ended = Path(folder) / "next", Path(folder) / ".next-ended"
            is_settled = hash_of(Path(folder)) == new_hash  # what gave way may be there still
            has_ended = is_settled or ended.exists() or (new / "summary.json").exists()
            if has_ended:
                places = [place for place in (new, ended, Path(folder)) if (place / "adapters.safetensors").exists()]
                hashes = set()
                for place in places:
                    assert life(lambda place=place: published(place)) == "ended"
                    hashes.add(hash_of(place))
                assert new_hash in hashes, "the new run is gone"
            else:
                there = files(folder)
                assert all(there.get(name) == content for name, content in old.items()), "the earlier run was touched"
                assert life(lambda: read_tensors(Path(folder), read_config(Path(folder)))) == "ended"
            return "ended" if has_ended else "begun" if replace.is_begun(Path(folder)) else "old"

        assert life(train(of(root + "/straight"), None)) == "ended"
        new_hash = json.loads(Path(root + "/straight/summary.json").read_text())["content_hash"]
        assert life(train(load_recipe(Path(sys.argv[1]), [*sys.argv[2:], "iters=4", "seed=9",
                                                          f"adapter_path={root}/old"]), None)) == "ended"
        old = files(root + "/old")
        at, folders, seen = first, [], []
        while True:
            folder = f"{root}/at-{at}"
            shutil.copytree(root + "/old", folder)
            end = life(train(of(folder), None, True), at=at, folder=folder)
            if end == "ended":
                break
            assert end == "killed", f"operation {at} failed"
            state = look(folder)
            seen.append(state)
            if state == "old":
                assert life(train(of(folder), None, True)) == "ended", f"after a kill at operation {at}"
            else:
                assert life(train(of(folder), True)) == "ended", f"after a kill at operation {at}"
            folders.append(folder)
            at += every
        print(json.dumps({"operations": at, "folders": folders, "seen": seen}))
        """,
        root=str(tmp_path),
        more=["iters=4", "save_every=2", "steps_per_eval=2", "save_total_limit=1"],
        every=every,
        first=first,
    )
    for folder in told["folders"]:
        assert_same_run(Path(folder), tmp_path / "straight")
    return told


def test_a_kill_while_a_run_is_replaced_leaves_it_or_the_new_one(lives, tmp_path):
    told = kill_while_replacing(lives, tmp_path, every=61, first=3)
    assert {"old", "begun"} <= set(told["seen"])


@pytest.mark.large
def test_a_kill_at_any_file_operation_while_a_run_is_replaced_leaves_it_or_the_new_one(lives, tmp_path):
    told = kill_while_replacing(lives, tmp_path, every=1, first=1)
    assert {"old", "begun", "ended"} == set(told["seen"])
    print(f"{told['operations']} file operations")


SETTLING = """
import json, os, signal, sys
from pathlib import Path
from train import replace

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
OLD = ("adapters.safetensors", "adapter_config.json", "summary.json", "run.json", "metrics.jsonl", "recipe.yaml",
       "checkpoints/step-000002/state.json", "tensorboard/events", "stream.json")
NEW = ("adapters.safetensors", "adapter_config.json", "summary.json", "run.json", "metrics.jsonl", "recipe.yaml",
       "checkpoints/step-000004/state.json", "tensorboard/events", "learning_curve.png")

def write(folder, names, word):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"status": "finished", "of": word}))

def contents(folder):
    return {str(p.relative_to(folder)): json.loads(p.read_text())["of"] for p in folder.rglob("*") if p.is_file()}

root, at = Path(sys.argv[1]), 0
while True:
    at += 1
    folder = root / f"at-{at}"
    write(folder, (*OLD, "notes.txt"), "old")
    write(folder / "next", NEW, "new")
    pid = os.fork()
    if pid == 0:
        seen = 0
        def count(event, arguments):
            global seen
            seen += event in EVENTS
            if seen == at and event in EVENTS:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        replace.settle(folder)
        os._exit(0)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        break
    there = contents(folder)
    assert there["adapters.safetensors"] in ("old", "new") and "adapter_config.json" in there, at
    whole = [place for place in (".next-ended/", "next/", "") if there.get(place + "adapters.safetensors") == "new"]
    assert whole, at
    replace.settle(folder)
    assert contents(folder) == {**dict.fromkeys(NEW, "new"), "notes.txt": "old"}, (at, contents(folder))
    assert {path.name for path in folder.iterdir()} == {name.partition("/")[0] for name in (*NEW, "notes.txt")}, at
print(at)
"""


def test_a_kill_at_any_file_operation_of_a_replacement_is_made_good_by_the_next_run(tmp_path):
    command = [sys.executable, "-c", SETTLING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 20
