"""`lathe bench train --pictures`: what it is measured on, and what the losses are held against."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from serve.bench.standin import TINY
from serve.tables import show
from train.bench import sighted
from train.bench.compare import MLX_VLM_CHILD, Run, Step
from train.bench.pictures import Pictures, write_rows
from train.bench.sighted_compare import (
    LATHE,
    LOOPS,
    MASKED,
    THEIRS,
    TIMED,
    SightedBench,
    notes,
    run,
    tables,
    tokens_per_cpu_s,
)

pytestmark = pytest.mark.long

FEW = Pictures(sides=(2, 5))


def test_rows_show_pictures_of_many_shapes_and_are_the_same_for_a_seed(tmp_path):
    for name in ("first", "again"):
        write_rows(tmp_path / name / "train.jsonl", 20, FEW, seed=3)
    files = [sorted((tmp_path / name).rglob("*.*")) for name in ("first", "again")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    rows = [
        json.loads(line)["messages"] for line in (tmp_path / "first" / "train.jsonl").read_text().splitlines()
    ]
    shown = [row[0]["content"][0]["image"] for row in rows]
    assert len(rows) == 20
    assert sorted(np.unique(shown, return_counts=True)[1].tolist()) == [2] * 10
    sizes = {Image.open(tmp_path / "first" / name).size for name in shown}
    assert len(sizes) > 4
    assert all(row[0]["content"][1]["text"] and row[1]["content"] for row in rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(family, batch_size) → (mlx-vlm's steps, [(loss, targets, tokens)] of each row by the reference)."""

    def run(family: str, batch_size: int) -> tuple[list[dict], np.ndarray]:
        folder = tmp_path_factory.mktemp(family)
        rows = folder / "train.jsonl"
        write_rows(rows, 6, FEW)
        sighted.write_model(family, folder / "model", mx.float32, TINY, sighted.SMALL)
        recipe = {
            "model": str(folder / "model"),
            "datasets": [{"path": str(rows)}],
            "lora_parameters": {"rank": 2, "scale": 2.0},
            "batch_size": batch_size,
            "iters": 6 // batch_size,
            "learning_rate": 1e-4,
            "max_seq_length": 512,
            "adapter_path": str(folder / "theirs"),
            "seed": 0,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        found = [_child(folder, *words) for words in (("train", "as_is"), ("reference",))]
        return found[0]["steps"], np.array(found[1]["rows"])

    return run


def _child(folder: Path, mode: str, *more: str) -> dict:
    out = folder / f"{mode}.json"
    command = [sys.executable, "-P", str(MLX_VLM_CHILD), mode, str(folder / "recipe.yaml"), str(out), *more]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return json.loads(out.read_text())


def _by_reference(step: dict, rows: np.ndarray) -> float:
    losses, targets, _ = rows[step["rows"]].sum(0)
    return losses / targets


@pytest.mark.large
def test_mlx_vlms_trainer_meets_every_row_once_and_starts_at_the_reference_where_its_mask_is_causal(trained):
    steps, rows = trained("qwen2_5_vl", 3)
    assert sorted(row for step in steps for row in step["rows"]) == list(range(6))
    assert sum(step["data_tokens"] for step in steps) == rows[:, 2].sum()
    assert all(step["places"] > step["data_tokens"] for step in steps)
    assert steps[0]["loss"] == pytest.approx(_by_reference(steps[0], rows), rel=1e-4)


@pytest.mark.large
def test_the_reference_sees_no_later_token_where_mlx_vlms_trainer_does(trained):
    steps, rows = trained("smolvlm", 1)
    assert abs(steps[0]["loss"] - _by_reference(steps[0], rows)) > 1e-3


def test_a_rate_of_cpu_time_counts_what_the_process_used_between_steps():
    steps = tuple(Step(float(time), 1.0, 100, 200) for time in (10, 20, 40))
    clock = [(0.0, 1.0), (10.0, 3.0), (20.0, 4.0), (30.0, 6.0), (50.0, 10.0)]
    assert tokens_per_cpu_s(Run(steps, 0, warmup=1), clock) == pytest.approx(200 / (8 - 3))
    assert tokens_per_cpu_s(Run(steps, 0, warmup=1), []) is None


@pytest.mark.large
def test_both_loops_meet_the_same_rows_and_ours_starts_at_the_reference(tmp_path):
    bench = SightedBench(
        num_batches=3, batch_size=2, size=TINY, tower=sighted.SMALL, pictures=FEW, masked_steps=3
    )
    outcome = run(bench, tmp_path, lambda message: None)
    said = outcome.as_json(bench)
    assert json.loads(json.dumps(said)) == json.loads(json.dumps(said, allow_nan=False))
    assert len({said[name]["data_tokens"] for name in LOOPS}) == 1
    for model, loops in outcome.losses.items():
        assert loops[LATHE].first == pytest.approx(loops[LATHE].first_reference, rel=1e-4), model
    assert outcome.losses[TIMED][THEIRS].first == pytest.approx(
        outcome.losses[TIMED][THEIRS].first_reference, rel=1e-4
    )
    masked = outcome.losses[MASKED][THEIRS]
    assert abs(masked.first - masked.first_reference) > 1e-3
    console = Console(width=110, record=True, file=io.StringIO())
    show(console, *tables(outcome), *notes(outcome))
    shown = console.export_text()
    assert all(name in shown for name in (*LOOPS, MASKED))
