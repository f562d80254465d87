"""`lathe bench adapters` and `lathe bench compare` end to end on a tiny model; their numbers are sane, not fast."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import psutil
import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
from mlx_lm import load as mlx_lm_load
from mlx_lm.models.cache import make_prompt_cache

import lathe
from serve.adapters.formats import manifest
from serve.bench import adapters, bare_child, disturb, lockstep, standin
from serve.bench.bare import BareLoop
from serve.bench.client import Answer
from serve.bench.compare import Comparison, Measuring, outcome_of
from serve.bench.contest import PEERS
from serve.bench.load import Round, TimeLimit
from serve.bench.lockstep import Side
from serve.engine.engine import Engine, EngineLimits
from serve.errors import StoppedError
from serve.model.loading import load

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    standin.write_model(folder, mx.float32, standin.TINY)
    return folder


@pytest.mark.parametrize("num_words", [1, 100_000], ids=["fits a buffer", "fits no pipe"])
def test_a_bare_loop_that_is_gone_is_told_and_leaves_no_process(num_words, tiny, tmp_path):
    with BareLoop(tiny, tmp_path / "bare.log") as loop:
        process = psutil.Process(loop.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and not yet buried
        with pytest.raises(StoppedError, match="bare loop's process has ended"):
            loop.round(["word " * num_words], 2, 1)
    assert not process.is_running()


@pytest.fixture
def run_bench(tmp_path):
    """run_bench(words) → the numbers it wrote; it must end well."""
    out = tmp_path / "numbers.json"

    def run(words: str) -> dict:
        with pytest.raises(SystemExit) as stop:
            lathe.main([*words.split(), "--json", str(out)])
        assert stop.value.code == 0
        return json.loads(out.read_text())

    return run


# Adapters by the hundred.


def test_many_adapters_are_written_whole_each_with_values_of_its_own(tmp_path):
    paths = standin.write_many_adapters(tmp_path / "many", 20, standin.TINY, rank=4)
    assert len(paths) == 20
    hashes = set()
    (plain,) = standin.write_adapters(tmp_path / "plain", 1, standin.TINY, ranks=(4,), seed=9).values()
    expected = manifest.read_tensors(plain)
    for path in paths.values():
        tensors = manifest.read_tensors(path, manifest.read_config(path))
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        for name, tensor in tensors.items():
            assert np.asarray(tensor).std() == pytest.approx(np.asarray(expected[name]).std(), rel=0.35), name
        hashes.add(manifest.content_hash(tensors))
    assert len(hashes) == 20


def test_ranks_take_turns(tmp_path):
    paths = standin.write_adapters(tmp_path, 5, standin.TINY, ranks=(2, 8))
    assert [manifest.read_config(path).rank for path in paths.values()] == [2, 8, 2, 8, 2]


# The bare loop.


def test_the_bare_loop_gives_every_row_its_own_greedy_tokens_whatever_its_length(tiny):
    module, tokenizer = mlx_lm_load(str(tiny))[:2]
    prompts = [list(range(20, 20 + length)) for length in (1, 9, 5)]
    found = bare_child.answers_to(module, prompts, 6)
    assert len(found["arrivals_s"]) == 6
    assert found["arrivals_s"] == sorted(found["arrivals_s"])
    assert found["arrivals_s"][-1] <= found["wall_s"]
    for prompt, row in zip(prompts, found["token_ids"], strict=True):
        cache, tokens, alone = make_prompt_cache(module), mx.array([prompt]), []
        for _ in range(6):
            tokens = mx.argmax(module(tokens, cache=cache)[:, -1], axis=-1)[:, None]
            alone.append(tokens.item())
        assert row == alone
    assert len({tuple(row) for row in found["token_ids"]}) == 3
    assert tokenizer.decode(found["token_ids"][0])


# Engines in lockstep.


def engine_of(model: Path, paths: dict[str, Path], num_rows: int) -> Engine:
    engine = Engine(load(str(model)), EngineLimits(max_rows=num_rows, prefix_cache_bytes=0))
    for name, path in paths.items():
        engine.registry.load(name, path)
    return engine


def test_sides_in_lockstep_answer_everything_and_let_go_of_their_versions(tiny, tmp_path):
    paths = standin.write_adapters(tmp_path, 2, standin.TINY)
    sides = [Side(engine_of(tiny, paths, 4), list(paths)), Side(engine_of(tiny, {}, 4))]
    prompts = [[10 + row, 20, 30 + row] for row in range(5)]
    costs = lockstep.run(sides, prompts, 7)
    assert [cost.num_tokens for cost in costs] == [35, 35]
    assert all(cost.num_steps >= 7 and cost.wall_s > 0 and cost.cpu_s > 0 for cost in costs)
    registry = sides[0].engine.registry
    assert [registry.num_pins(version) for version in registry.versions()] == [0, 0]
    assert not any(side.engine.has_work for side in sides)


def test_a_row_that_fails_ends_the_measurement(tiny):
    """Of a base whose answers are not numbers."""
    engine = engine_of(tiny, {}, 2)
    head = engine.model.network.module.lm_head
    head.weight = head.weight * float("nan")
    with pytest.raises(StoppedError, match=r"a row failed: .* not numbers"):
        lockstep.run([Side(engine)], [[10, 11, 12]], 4)


# Disturbances.


def test_gaps_touch_the_time_they_are_asked_for():
    clock = iter(range(100))
    streams = disturb.Streams(1, lambda: float(next(clock)))
    streams._ticks[0] = [disturb.Tick(wall, cpu) for wall, cpu in ((1, 1), (2, 1.5), (5, 2.5), (6, 3))]
    assert streams.gaps(2.5, 4.0) == [disturb.Tick(3, 1.0)]
    assert streams.gaps(2.5, 5.5) == [disturb.Tick(3, 1.0), disturb.Tick(1, 0.5)]
    assert streams.gaps(7.0, 9.0) == []


def test_loads_beside_streams_are_measured_in_steps_and_leave_nothing_behind(tiny, tmp_path):
    setting = disturb.Setting(num_rows=3, rounds=2, quiet_steps=6, steps_after=3)
    running = standin.write_adapters(tmp_path / "running", 2, standin.TINY)
    news = standin.write_adapters(tmp_path / "news", 4, standin.TINY, seed=50)
    engine = engine_of(tiny, running, 3)
    found = disturb.run(setting, engine, list(running), news, lambda _: None)
    assert [each.what.partition(", ")[2] for each in found] == [
        f"{kind} an adapter, {clock}" for kind in disturb.KINDS for clock in ("by the wall", "in CPU time")
    ]
    assert all(len(each.ratios) == 2 and min(each.ratios) > 0 for each in found)
    assert set(engine.registry.names()) == set(running)
    assert [engine.registry.num_pins(version) for version in engine.registry.versions()] == [0, 0]


def test_a_stream_that_fails_is_told_instead_of_waited_for(tiny):
    setting = disturb.Setting(num_rows=2, rounds=1, quiet_steps=2_000)
    engine = Engine(load(str(tiny)), EngineLimits(max_rows=2, max_context=40))
    with pytest.raises(StoppedError, match=r"row [01] has ended: length"):
        disturb.run(setting, engine, [], {"n": tiny}, lambda _: None)


# The commands.


def test_bench_adapters_measures_each_part_against_what_is_asked(run_bench):
    told = run_bench(
        "bench adapters --parts mixes,unused,ranks,load --size tiny --rounds 2 --rows 4 --ranked 6 --streams 3 "
        "--loads 1 --max-tokens 3 --prompt-tokens 16"
    )
    found = {each["what"]: each for each in told["findings"]}
    asked = {
        "8 adapters mixed, over the base alone": 0.90,
        "32 adapters mixed, over the base alone": 0.85,
        "all rows on one adapter, over the base alone": 0.93,
        "the base with 32 adapters loaded and unused, over without": 0.98,
        "6 adapters of ranks 4 to 128 mixed, over all at 32": 0.9,
    }
    for what, least in asked.items():
        for clock in ("by the wall", "in CPU time"):
            finding = found[f"{what}, {clock}"]
            assert (finding["asked"], finding["sense"], len(finding["ratios"])) == (least, "at least", 2)
            assert all(0.01 < ratio < 100 for ratio in finding["ratios"])
    gaps = [each for what, each in found.items() if what.startswith("longest gap")]
    assert [(each["asked"], each["sense"]) for each in gaps] == [(2.0, "at most")] * 6
    assert told["settings"]["rows"] == 4
    assert told["machine"]


def test_what_is_known_is_told_finding_by_finding(tmp_path):
    setting = adapters.Setting(
        ("mixes",), standin.TINY, rows=2, few=1, many=2, num_prompt_tokens=4, max_tokens=2, rounds=1
    )
    told: list[int] = []
    found = adapters.run(setting, tmp_path, lambda _: None, lambda so_far: told.append(len(so_far)))
    assert told == [1, 2, 3, 4, 5, 6]
    assert len(found) == 6


def test_many_adapters_on_disk_are_served_through_few_slots_without_a_failure(run_bench, tmp_path):
    told = run_bench(
        "bench adapters --parts many --size tiny --many 30 --slots 3 --clients 4 --rounds 2 --max-tokens 3 "
        f"--prompt-tokens 40 --folder {tmp_path}/kept"
    )
    by_wall, by_cpu, failed = told["findings"]
    assert "30 adapters, Zipf(1), 3 slots" in by_wall["what"]
    assert (by_wall["asked"], by_cpu["asked"]) == (0.7, 0.7)
    assert all(0.01 < ratio < 100 for ratio in (*by_wall["ratios"], *by_cpu["ratios"]))
    assert (failed["ratios"], failed["values"]["requests"]) == ([0.0, 0.0], [16, 16])
    assert min(by_wall["values"]["adapters asked for"]) > 3
    assert len(list((tmp_path / "kept" / "many").iterdir())) == 30


def test_bench_compare_measures_all_in_turns_with_the_same_prompts(run_bench, tmp_path):
    told = run_bench(
        "bench compare --size tiny --only lathe,bare,mlx_lm,mixed8 --concurrency 1,3 --rounds 2 "
        f"--max-tokens 6 --rank 3 --png {tmp_path}/picture.png --folder {tmp_path}/kept"
    )
    labels = {"lathe", "bare loop", "mlx_lm.server", "lathe, 8 adapters mixed"}
    assert {(each["label"], each["concurrency"]) for each in told["results"]} == {
        (label, level) for label in labels for level in (1, 3)
    }
    for each in told["results"]:
        assert each["num_errors"] == 0
        assert each["answer_tokens"] == {"6": 2 * max(2, 2 * each["concurrency"])}
        assert len(each["tokens_per_s_by_round"]) == 2
        assert each["gap_s"]["max"] > 0
    assert {(each["of"], each["to"]) for each in told["ratios"]} == {
        ("lathe", "bare loop"),
        ("lathe", "mlx_lm.server"),
        ("lathe", "the best peer"),
        ("lathe, 8 adapters mixed", "lathe"),
    }
    assert all(each["min"] <= each["median"] <= each["max"] for each in told["ratios"])
    assert min(told["same_text"].values()) >= 0.8  # near-ties aside, equal prompts give equal words
    assert set(told["same_text"]) == {"bare loop", "mlx_lm.server"}
    asked = {label: set() for label in labels}
    for each in told["results"]:
        asked[each["label"]] |= set(each["requests_by_model"])
    assert asked["lathe, 8 adapters mixed"] == {f"adapter-{number}" for number in range(8)}
    assert asked["lathe"] == {"model"}
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "kept/adapters/adapter-31/adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == told["settings"]["rank"] == 3


class Runner:
    """One whose rounds take no time and say that they took `wall_s`."""

    def __init__(self, label: str, wall_s: float, *, kind: str | None = None) -> None:
        self.label = label
        self.wall_s = wall_s
        self.kind = kind
        self.taken: list[tuple[int, int]] = []

    def warm_up(self) -> None:
        """It is."""

    def level(self, concurrency: int, count: int, limit: TimeLimit = TimeLimit()) -> Round:
        self.taken.append((concurrency, count))
        answers = [answer_of(self.kind) for _ in range(count)]
        return Round(concurrency, self.wall_s, tuple(answers))


def answer_of(kind: str | None) -> Answer:
    return Answer("m", 1.0, 2.0, 9, 5, "usage", "", "length", kind and f"{kind}: x", error_kind=kind)


def test_everybody_takes_the_same_rounds_in_an_order_that_turns_round():
    order: list[str] = []
    runners = [Runner("lathe", 1.0), Runner("bare loop", 2.0)]
    asked = Comparison(concurrency=(1, 4), rounds=2)
    rounds = Measuring(runners, asked, order.append).run(lambda _: None)
    assert {key: len(each) for key, each in rounds.items()} == {
        (label, level): 2 for label in ("lathe", "bare loop") for level in (1, 4)
    }
    assert runners[0].taken == runners[1].taken == [(1, 1), (1, 2), (4, 8), (1, 2), (4, 8)]
    told = [line.partition(": ")[2] for line in order if line.startswith("round")]
    assert told == [
        f"{label}, {level} client(s)"
        for labels in (("lathe", "bare loop"), ("bare loop", "lathe"))
        for level in (1, 4)
        for label in labels
    ]


def test_a_time_limit_leaves_out_what_would_not_end_and_says_so():
    """A request of everybody takes 3 s: two of one client 6, of 64 clients 51."""
    measuring = Measuring(
        [Runner("lathe", 1.0), Runner("bare loop", 2.0)],
        Comparison(concurrency=(1, 64), rounds=1, time_limit_s=20.0),
        lambda _: None,
    )
    rounds = measuring.run(lambda _: None)
    assert set(rounds) == {("lathe", 1), ("bare loop", 1)}
    (said,) = measuring.left_out
    assert "64 client(s)" in said
    assert "51 s" in said


def test_a_turn_that_the_time_limit_cut_off_is_no_round_of_anybody():
    measuring = Measuring(
        [Runner("lathe", 0.01), Runner("bare loop", 0.01, kind="cut off")],
        Comparison(concurrency=(1,), rounds=1, time_limit_s=20.0),
        lambda _: None,
    )
    with pytest.raises(StoppedError, match=r"nothing was measured: .*cut it off"):
        measuring.run(lambda _: None)


def test_a_round_of_nothing_but_errors_ends_the_comparison_by_the_name():
    runners = [Runner("lathe", 1.0), Runner("bare loop", 1.0, kind="HTTP 503")]
    with pytest.raises(StoppedError, match="bare loop: all 2 requests failed: HTTP 503"):
        Measuring(runners, Comparison(concurrency=(1,)), lambda _: None).run(lambda _: None)


def test_a_peer_that_fails_is_left_out_from_then_on_and_told():
    peers = [Runner(PEERS[0], 2.0, kind="HTTP 503"), Runner(PEERS[1], 2.0)]
    runners = [Runner("lathe", 1.0), *peers]
    measuring = Measuring(runners, Comparison(concurrency=(1, 4), rounds=2), lambda _: None)
    rounds = measuring.run(lambda _: None)
    assert {label for label, _ in rounds} == {"lathe", PEERS[1]}
    assert len(peers[0].taken) == 2  # the estimate, and the turn that failed
    (said,) = measuring.left_out
    assert said.startswith(f"{PEERS[0]}: all 2 requests failed: HTTP 503")


def test_the_best_peer_is_found_among_those_that_still_had_turns():
    """One peer was dropped after the first of two rounds, in which it was the best."""
    walls = {"lathe": [1.0, 1.0], PEERS[0]: [2.0], PEERS[1]: [4.0, 4.0]}
    rounds = {
        (label, 1): [Round(1, wall_s, (answer_of(None),)) for wall_s in each] for label, each in walls.items()
    }
    outcome = outcome_of(rounds)
    (best,) = (
        each for each in outcome.ratios if each.to == "the best peer" and each.what == "tokens a second"
    )
    assert (best.min, best.max) == (2.0, 4.0)
    assert outcome.same_text == {PEERS[0]: 1.0, PEERS[1]: 1.0}
