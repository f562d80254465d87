"""`lathe bench train`: every loop meets the same tokens, and its numbers are there. What they are is no test."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from serve.tables import show
from train.bench.chats import Lengths, write_chats
from train.bench.compare import LOOPS, PEER, Run, Step, TrainBench, installed, notes, overhead_of, run, tables

pytestmark = pytest.mark.long

SHORT = Lengths(median=60.0, sigma=0.6, longest=160)


def test_chats_have_the_lengths_that_were_drawn(model_folder, tmp_path):
    template = ChatTemplate(load_tokenizer(str(model_folder)))
    lengths = Lengths(median=200.0, sigma=0.5, longest=500)
    for name in ("first", "again"):
        write_chats(tmp_path / name, 200, lengths, template, seed=3)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "first").read_text().splitlines()]
    found = np.array([len(template.render(row, add_generation_prompt=False)) for row in rows])
    assert np.median(found) == pytest.approx(200, rel=0.15)
    assert np.log(found).std() == pytest.approx(0.5, rel=0.3)
    assert {len(row) for row in rows} == {2, 4, 6}
    assert all(turn["content"] for row in rows for turn in row)


def test_rates_leave_the_warm_up_out_and_count_everything_after_it():
    steps = tuple(Step(float(time), 1.0, 100, 200, 0.9, 0.8) for time in (5, 6, 8))
    measured = Run(steps, 0, warmup=1)
    assert measured.seconds == 3.0
    assert measured.data_tokens_per_s == pytest.approx(200 / 3)
    assert measured.outside_s == [pytest.approx((0.1, 0.1)), pytest.approx((0.1, 1.1))]


def test_overhead_is_what_reports_and_batches_take_beside_the_updates():
    lines = [
        {"step": 10, "time": 5.0, "seconds": 4.0, "overhead_frac": 0.5},
        {"step": 20, "time": 7.0, "seconds": 1.9, "overhead_frac": 0.0},
        {"step": 30, "time": 9.0, "seconds": 2.0, "overhead_frac": 0.1},
    ]
    found = overhead_of(lines)
    assert found.steps == 20
    assert found.step_ms == pytest.approx(1e3 * 3.7 / 20)
    assert found.outside_ms == pytest.approx(1e3 * 0.3 / 20)
    assert found.frac == pytest.approx(0.3 / 4)


def test_all_loops_meet_the_same_tokens_and_report_every_number(model_folder, tmp_path):
    bench = TrainBench(num_batches=3, batch_size=3, model=str(model_folder), lengths=SHORT)
    outcome = run(bench, tmp_path, lambda message: None)
    said = outcome.as_json(bench)
    assert json.loads(json.dumps(said)) == json.loads(json.dumps(said, allow_nan=False))
    loops = [name for name in LOOPS if name in said]
    assert len({said[name]["data_tokens"] for name in loops if name != PEER}) == 1
    assert (PEER in said) == (installed("mlx-lm-lora") is not None)
    for name in loops:
        loop = said[name]
        assert loop["data_tokens_per_s"] > 0
        assert loop["peak_memory_bytes"] > 50_000_000
        assert 0 <= loop["padding_frac"] < 1
        assert loop["steps"] >= 2
        assert math.isfinite(loop["loss_first"])
    assert said["mlx_lm_lora"]["padding_frac"] > said["lathe_packed"]["padding_frac"]
    assert said["lathe"]["loss_first"] == pytest.approx(said["mlx_lm_lora"]["loss_first"], abs=0.5)
    assert 0 <= said["overhead"]["frac"] < 1
    assert said["overhead"]["steps"] == 90
    assert said["overhead"]["step_ms"] > 0
    assert all(math.isfinite(ratio["data_tokens_per_s"]) for ratio in said["ratios"])
    console = Console(width=80, record=True, file=io.StringIO())
    show(console, *tables(outcome), *notes(outcome))
    shown = console.export_text()
    assert all(name in shown for name in LOOPS)
    assert ("not installed" in shown) == (PEER not in said)
