"""The loop to read and the loop to run take the same steps."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from train.recipe.recipe import load_recipe
from train.run import run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "recipes" / "plain_loop.py"


def test_the_example_is_a_page():
    assert len(EXAMPLE.read_text().splitlines()) <= 66


@pytest.mark.parametrize("clip", ["null", "0.5", "1000"])
def test_the_example_has_the_losses_of_the_trainer(clip, tmp_path):
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    keys = ("iters=6", "steps_per_report=1", "val_batches=0", f"max_grad_norm={clip}")
    recipe = load_recipe(ROOT / "recipes" / "tickets-all.yaml", (*keys, f"adapter_path={tmp_path / 'run'}"))
    plain = list(example.train(recipe, 6))
    run(recipe, console=Console(file=io.StringIO()))
    reports = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [report["loss"] for report in reports if report["kind"] == "train"]
    assert plain == pytest.approx(losses, rel=1e-4)
    assert len({round(loss, 3) for loss in losses}) == 6
