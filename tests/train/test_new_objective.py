"""What a new objective takes: the files that are its own, and its line in the registry. Nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = Path("train/recipe/objectives.py")
ENTRY = '''"""What a recipe knows of objective focal."""

from __future__ import annotations

from pydantic import Field

from train.recipe.objective import ObjectiveConfig, ObjectiveEntry


class FocalConfig(ObjectiveConfig):
    """Answers, the unlikely tokens weighed more. Lin et al. 2017, arXiv 1708.02002."""

    gamma: float = Field(default=2.0, ge=0)
    """0 is the plain likelihood."""
    sharp: bool
    """Has no default, so a recipe must write the block."""


ENTRY = ObjectiveEntry(
    "answers, unlikely tokens first", ("completion",), "train.objectives.focal:build", FocalConfig, ("confidence",)
)
'''
LOSS = '''"""Focal loss."""

from __future__ import annotations

import mlx.core as mx

from train.loop.loss import target_logprobs
from train.objectives.sft import SFT
from train.recipe.focal import FocalConfig


class Focal(SFT):
    def __init__(self, config):
        super().__init__("focal")
        self.gamma = config.gamma

    def loss(self, network, inputs, *, trains=True):
        weights = inputs["weights"]
        logprobs = target_logprobs(network, inputs["tokens"], inputs["positions"], inputs["token_ids"])
        p = mx.exp(logprobs)
        measures = {"confidence": mx.stop_gradient((p * weights).sum())}
        return (-((1 - p) ** self.gamma) * logprobs * weights).sum(), measures


def build(recipe, reference):
    assert isinstance(recipe.block, FocalConfig)
    return Focal(recipe.block)
'''
CHILD = """
import sys
sys.path.insert(0, {root!r})
import train.recipe.recipe
assert train.__file__.startswith({root!r}), train.__file__
assert "mlx.core" not in sys.modules, "a recipe was read with mlx"
import lathe
lathe.main({words!r})
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The sources with objective focal added to them."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("train", "serve"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "lathe.py", root)
    registry = root / REGISTRY
    text = registry.read_text()
    added = text.replace(
        "OBJECTIVES: dict[str, ObjectiveEntry] = {\n",
        'OBJECTIVES: dict[str, ObjectiveEntry] = {\n    "focal": focal.ENTRY,\n',
    ).replace("from train.recipe import dpo, ", "from train.recipe import dpo, focal, ")
    assert len(added.splitlines()) == len(text.splitlines()) + 1
    registry.write_text(added)
    (root / "train/recipe/focal.py").write_text(ENTRY)
    (root / "train/objectives/focal.py").write_text(LOSS)
    return root


@pytest.fixture
def lathe_train(checkout, model_folder, tmp_path):
    """lathe_train(*lines of the recipe) → the run's output and status; its folder is tmp_path / "run"."""

    def train(*lines: str) -> tuple[int, str]:
        rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(8)]
        for split in ("train", "valid"):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = (f"model: {model_folder}", f"data: {tmp_path}", f"adapter_path: {tmp_path / 'run'}")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("\n".join((*head, "iters: 1", "learning_rate: 0.01", "num_layers: -1", *lines)))
        done = subprocess.run(
            [sys.executable, "-c", CHILD.format(root=str(checkout), words=["train", str(recipe)])],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200"},
        )
        return done.returncode, done.stdout + done.stderr

    return train


def test_a_new_objective_trains_by_its_own_files_and_one_line_in_the_registry(lathe_train, tmp_path):
    status, output = lathe_train(
        "objective: focal", "focal: {gamma: 1.5, sharp: true}", "metric_for_best_model: confidence"
    )
    assert status == 0, output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if row["kind"] == "valid")
    assert after["confidence"] > before["confidence"] > 0
    (trained,) = (row for row in rows if row["kind"] == "train")
    assert trained["confidence"] > 0
    assert "focal" in (tmp_path / "run" / "recipe.yaml").read_text()


REFUSED = {
    "objective: focal\nfocal: {gama: 1, sharp: true}": "focal.gama: unknown key; did you mean gamma?",
    "objective: focal\nfocal: {gamma: -1, sharp: true}": "focal.gamma: found -1; expected",
    "objective: focal": "focal: missing; objective focal needs a block focal with sharp, Has no default",
    "focal: {sharp: true}": "focal: has no effect with objective: sft; write objective: focal",
    "objective: focl": "did you mean focal?",
    "objective: focal\nfocal: {sharp: true}\nsample_packing: true": "packing is for sft and cpt",
    "metric_for_best_model: confidence": "found confidence, which objective sft does not measure",
}
REFUSALS = """
import json, sys
sys.path.insert(0, {root!r})
from serve.errors import ConfigError
from serve.settings import load_yaml
from train.recipe.recipe import Recipe
told = {{}}
for text in {texts!r}:
    try:
        load_yaml("model: m\\ndata: d\\n" + text, Recipe)
    except ConfigError as error:
        told[text] = str(error)
print(json.dumps(told))
"""


def test_its_recipes_are_as_strict_as_all_others(checkout):
    code = REFUSALS.format(root=str(checkout), texts=list(REFUSED))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    for text, words in REFUSED.items():
        assert words in told.get(text, ""), text
