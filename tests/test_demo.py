"""`lathe demo`, whole: the promises of the README's first command, kept on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

import lathe

pytestmark = pytest.mark.long

ROOT = Path(lathe.__file__).parent
TIMEOUT_S = 3600
MOST_OF_BASE = 0.05
LEAST_OF_EACH = 0.9
LEAST_AGREEMENT = 0.99


@pytest.fixture(scope="module")
def demo(tmp_path_factory, demo_runs):
    """One run from another working directory: what it wrote, what it printed."""
    where = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-P", "-m", "lathe", "demo", "--json", "demo.json"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    demo_runs.symlink_to(where / "runs" / "demo")
    return where, json.loads((where / "demo.json").read_text()), done.stdout


def test_the_base_cannot_do_the_task_and_both_adapters_can(demo):
    _, numbers, _ = demo
    assert numbers["base"]["exact_match"] <= MOST_OF_BASE
    assert len(numbers["adapters"]) == 2
    for score in numbers["adapters"].values():
        assert score["num_rows"] >= 100
        assert score["exact_match"] >= LEAST_OF_EACH


def test_an_adapter_got_better_version_by_version_while_it_trained(demo):
    _, numbers, printed = demo
    live = numbers["live"]
    versions = live["versions"]
    assert len(versions) >= 4
    order = [int(each["version"].rpartition("@")[2]) for each in versions]
    assert order == sorted(set(order))
    *steps, end = [each["step"] for each in versions]
    assert end is None, "the adapter that the run came to"
    assert steps == sorted(set(steps))
    first, last = versions[0]["num_exact"], versions[-1]["num_exact"]
    assert first <= live["num_probes"] / 2 < LEAST_OF_EACH * live["num_probes"] <= last
    assert versions[-1]["answer"] == live["wanted"] != versions[0]["answer"]
    shown = " ".join(printed.split())
    assert not [each for each in versions if each["version"] not in shown or each["answer"] not in shown]


def test_a_stream_went_on_all_the_while(demo):
    _, numbers, printed = demo
    live = numbers["live"]
    before = [each["pieces_before"] for each in live["versions"][:-1]]
    assert before[0] > 0
    assert all(earlier < later for earlier, later in pairwise([*before, live["num_pieces"]]))
    assert live["longest_gap_s"] < live["seconds"] / 4
    assert f"longest gap {live['longest_gap_s'] * 1e3:.0f} ms" in printed


def test_going_back_a_version_gives_its_answers_and_going_forward_the_newest(demo):
    _, numbers, _ = demo
    live = numbers["live"]
    back, first, last = live["went_back"], live["versions"][0], live["versions"][-1]
    assert (back["version"], back["forward_to"]) == (first["version"], last["version"])
    assert back["num_exact"] == first["num_exact"]
    assert back["forward_num_exact"] == last["num_exact"]


def test_the_experiment_saw_every_prompt_once_and_agrees_with_the_scores(demo):
    _, numbers, _ = demo
    arms = {arm["name"]: arm for arm in numbers["experiment"]["variants"]}
    assert set(arms) == set(numbers["adapters"])
    num_rows = numbers["base"]["num_rows"]
    assert sum(arm["num_exposures"] for arm in arms.values()) == num_rows
    assert sum(arm["num_units_with_outcome"] for arm in arms.values()) == num_rows
    for name, arm in arms.items():
        assert arm["num_exposures"] > num_rows / 4
        # A variant's share of the same prompts: its score, but for the luck of the draw.
        assert arm["mean"] == pytest.approx(numbers["adapters"][name]["exact_match"], abs=0.2)


def test_the_export_says_what_the_adapter_says(demo):
    where, numbers, _ = demo
    assert numbers["export"]["bits"] == 8
    assert numbers["export"]["top1_agreement"] >= LEAST_AGREEMENT
    assert numbers["export"]["num_rows"] >= 50
    assert (where / "runs" / "demo" / f"{numbers['winner']}-8bit" / "model.safetensors").exists()


def test_the_base_that_sees_cannot_sort_pictures_and_its_adapter_can(demo):
    _, numbers, printed = demo
    pictures = numbers["pictures"]
    assert pictures["scores"]["shapes"]["exact_match"] <= MOST_OF_BASE
    assert pictures["scores"]["shapes-vlm"]["exact_match"] >= LEAST_OF_EACH
    assert pictures["scores"]["shapes-vlm"]["num_rows"] >= 100
    assert pictures["talk"]["exact_match"] == 1.0, "rows of text between them"
    assert pictures["answers"]["shapes-vlm"] in printed


def test_every_number_of_the_result_is_printed(demo):
    _, numbers, printed = demo
    shown = [f"{score['exact_match']:.1%}" for score in (numbers["base"], *numbers["adapters"].values())]
    shown += [f"{numbers['export']['top1_agreement']:.2%}", f"{numbers['seconds']:.0f} s"]
    assert not [number for number in shown if number not in printed]


def test_its_server_is_gone(demo):
    where, _, _ = demo
    url = (where / "runs" / "demo" / "server.log").read_text().split(" at ")[-1].split("/v1")[0]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
