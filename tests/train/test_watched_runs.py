"""A watched run: at every file operation of real training somebody looks, and sees whole adapters, in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
RECIPE = """
num_layers: -1
batch_size: 2
iters: 6
learning_rate: 1e-2
lora_parameters: {rank: 4, scale: 4.0}
steps_per_report: 3
steps_per_eval: 3
save_every: 1
"""

# Python's audit events tell of each file operation before it is done; the watch looks at that moment, by the code of
# a server, into the registry of one.
SCRIPT = """
import io, json, shutil, sys
from pathlib import Path
from rich.console import Console
import serve
from serve.adapters.registry.copies import Copies
from serve.adapters.formats.manifest import read_config
from serve.adapters.registry.watch import AdapterWatch
from serve.engine.engine import Engine
from serve.model.loading import load
from train.loop import checkpoint
from train.recipe.recipe import load_recipe
from train.run import run

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile"}
recipe, root, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]

class Seen:
    '''What a watch of a folder has loaded, by content hash. So long pass two looks.'''

    def __init__(self, folder, pause_s):
        self.pause_s, self.now = pause_s, 0.0
        self.hashes, self.problems, self.looks = [], set(), 0
        self.registry = Engine(load(words[0].partition("=")[2])).registry
        self.watch = AdapterWatch([folder], self._load, Copies(lambda name, path: False), clock=lambda: self.now)

    def _load(self, name, path):
        version = self.registry.load(name, path, replace=True)
        self.hashes.append(version.content_hash)
        return version

    def look(self):
        self.now += self.pause_s
        self.looks += 1
        self.watch.look()
        self.problems |= {each.problem for each in self.watch.watched() if each.problem}

class Watching:
    '''Two of them: one that looks again at once, and one when whatever is there has stayed the same for long.'''

    def __init__(self, folder):
        self.folder, self.both, self.is_on = folder, (Seen(folder, 0.0), Seen(folder, 100.0)), False
        sys.addaudithook(self._at_each_operation)

    def _at_each_operation(self, event, arguments):
        if self.is_on and event in EVENTS and str(arguments[0]).startswith(str(self.folder)):
            self.look()

    def look(self):
        was_on, self.is_on = self.is_on, False
        for seen in self.both:
            seen.look()
        self.is_on = was_on

    def __enter__(self):
        self.is_on = True
        return self

    def __exit__(self, *_):
        self.is_on = False
        self.look()
        self.look()

    def told(self):
        at_once, later = self.both
        for seen in self.both:
            seen.watch.close()
        return {"hashes": later.hashes, "at_once": at_once.hashes, "looks": later.looks,
                "problems_at_once": sorted(at_once.problems)}

def train(folder, *more, **how):
    settings = load_recipe(recipe, [*words, *more, f"adapter_path={folder}"])
    return run(settings, console=Console(file=io.StringIO()), **how)

def hash_of(folder):
    return read_config(folder).lineage.content_hash

def published(folder):
    '''Of a run that kept everything: its checkpoints, and its adapter if that is another one.'''
    hashes = [hash_of(each) for each in checkpoint.existing(folder)]
    last = hash_of(folder)
    return hashes if hashes[-1] == last else [*hashes, last]

told = {}
"""


@pytest.fixture(scope="module")
def rows_folder(make_rows) -> Path:
    return make_rows(train=9, valid=3)


@pytest.fixture
def looked(tmp_path, model_folder, rows_folder):
    """looked(script) → the JSON object `told` at its end; SCRIPT's names are there."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    places = [f"model={model_folder}", f"data={rows_folder}", "dataset_prepared_path=null"]

    def run(script: str) -> dict:
        whole = f"{SCRIPT}\n{script}\nprint(json.dumps(told))"
        words = [str(tmp_path / "recipe.yaml"), str(tmp_path), *places]
        done = subprocess.run(
            [sys.executable, "-c", whole, *words], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-4000:]
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["problems_at_once"] == [], "what is under way is no problem"
        return told

    return run


def test_every_checkpoint_is_seen_whole_once_and_in_order_while_the_trainer_deletes_old_ones(looked):
    told = looked("""
with Watching(root / "out") as watching:
    train(root / "out", "save_total_limit=1")
    train(root / "out", "save_total_limit=1", "iters=9", resume=True)
train(root / "longer", "iters=9")
told |= {**watching.told(), "left": len(checkpoint.existing(root / "out")), "expected": published(root / "longer")}
""")
    assert told["hashes"] == told["at_once"] == told["expected"]
    assert len(set(told["hashes"])) == 9
    assert told["looks"] > 200
    assert told["left"] <= 2, "the newest, and the best"


def test_the_best_adapter_follows_the_last_checkpoint_and_a_new_run_follows_when_it_has_ended(looked):
    told = looked("""
rising = "lr_schedule={name: linear_schedule, arguments: [1e-2, 30.0, 6]}"
best, other = ("load_best_model_at_end=true", rising, "steps_per_eval=1"), ("seed=1", "iters=4")
told["best_step"] = train(root / "plain", *best).published_step
train(root / "other", *other)
with Watching(root / "out") as watching:
    train(root / "out", *best)
with watching:
    train(root / "out", *other, overwrite=True)
told |= {**watching.told(), "plain": published(root / "plain"), "other": published(root / "other")}
""")
    assert told["best_step"] < 6
    assert told["hashes"] == told["at_once"] == [*told["plain"], told["other"][-1]]
    assert len(told["plain"]) == 7


def test_a_run_that_is_copied_file_by_file_is_seen_whole(looked):
    told = looked("""
train(root / "plain", "iters=3")
train(root / "other", "iters=2", "seed=1")
shelf = root / "shelf"
shelf.mkdir()
with Watching(shelf) as watching:
    shutil.copytree(root / "plain", shelf / "a", copy_function=shutil.copyfile)
    (shelf / "b").mkdir()
    for source in (root / "plain", root / "other"):
        for name in ("adapters.safetensors", "adapter_config.json"):
            shutil.copyfile(source / name, shelf / "b" / name)
told |= {**watching.told(), "plain": published(root / "plain"), "other": hash_of(root / "other")}
""")
    assert told["looks"] > 20
    plain = told["plain"]
    for hashes in (told["hashes"], told["at_once"]):
        of_a, of_b = hashes[:-2], hashes[-2:]
        assert of_b == [plain[-1], told["other"]]
        # Its files come in no order, so a later checkpoint may be whole first; an older one never follows.
        places = [plain.index(each) for each in of_a]
        assert places == sorted(set(places))
        assert of_a[-1] == plain[-1]
