"""Store and report: what was written is what is counted, per unit, and comes back without a server."""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from serve.errors import ConfigError, DataError, NotFoundError
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.difference import difference_interval
from serve.experiments.records import Exposure
from serve.experiments.report import ExperimentReport, render, report, runs_table
from serve.experiments.store import Store, runs
from serve.tables import show

ARMS = Experiment("tickets", "s", (Variant("attn", "tickets-attn"), Variant("all", "tickets-all")))


@pytest.fixture
def store(tmp_path: Path):
    opened = Store(f"sqlite:///{tmp_path}/e.sqlite")
    yield opened
    opened.close()


def expose(store: Store, run: int, number: int, variant: str, unit: str | None = None, **changes) -> str:
    fields = {
        "completion_id": f"c{number}",
        "run_id": run,
        "variant": variant,
        "unit": unit or f"u{number}",
        "model_version": f"tickets-{variant}@1",
        "content_hash": "abc",
        "exposed_at": float(number),
        "ttft_s": 0.1 + number / 1000,
    }
    store.expose(Exposure(**{**fields, **changes}))
    return f"c{number}"


def test_counts_means_latency_and_verdict_come_from_what_was_written(store):
    run = store.begin_run(ARMS).id
    for i in range(400):
        variant = ("attn", "all")[i % 2]
        completion = expose(store, run, i, variant)
        store.complete(completion, latency_s=1 + i / 1000, num_tokens=5, finish="stop")
        store.record_outcome(completion, "exact_match", float(variant == "all" or i % 4 == 0))
    found = report(store, "tickets")
    attn, all_ = found.variants
    assert (attn.num_exposures, attn.num_units, attn.num_outcomes) == (200, 200, 200)
    assert (attn.mean, all_.mean) == (0.5, 1.0)
    assert found.comparisons[0].verdict == "better"
    assert found.comparisons[0].interval.low > 0.3
    assert all_.latency.p50_s == pytest.approx(1.2, abs=0.01)
    assert all_.latency.p95_s == pytest.approx(1.38, abs=0.01)
    assert found.warnings == ()
    assert json.loads(json.dumps(found.to_dict()))["variants"][1]["versions"] == {"tickets-all@1 abc": 200}


def test_a_busy_unit_counts_once_with_its_mean(store):
    run = store.begin_run(ARMS).id
    for i in range(10):
        store.record_outcome(expose(store, run, i, "attn", unit="busy"), "ok", float(i < 5))
    store.record_outcome(expose(store, run, 10, "attn"), "ok", 1.0)
    arm = report(store, "tickets").variants[0]
    assert (arm.num_exposures, arm.num_units, arm.num_outcomes, arm.num_units_with_outcome) == (11, 2, 11, 2)
    assert arm.mean == 0.75


def test_feedback_is_idempotent_and_its_last_value_counts(store):
    run = store.begin_run(ARMS).id
    completion = expose(store, run, 0, "attn")
    for value in (0.0, 0.0, 1.0):
        store.record_outcome(completion, "ok", value)
    arm = report(store, "tickets").variants[0]
    assert (arm.num_outcomes, arm.mean) == (1, 1.0)


def test_an_exposure_written_twice_is_one(store):
    run = store.begin_run(ARMS).id
    expose(store, run, 0, "attn")
    expose(store, run, 0, "all")
    assert [v.num_exposures for v in report(store, "tickets").variants] == [1, 0]


def test_feedback_on_an_unknown_completion_is_refused(store):
    store.begin_run(ARMS)
    with pytest.raises(NotFoundError, match="'nope'"):
        store.record_outcome("nope", "ok", 1.0)


def test_the_same_definition_is_one_run_and_another_definition_starts_afresh(store):
    run = store.begin_run(ARMS).id
    expose(store, run, 0, "attn")
    assert store.begin_run(ARMS).id == run
    other = store.begin_run(Experiment("tickets", "another salt", ARMS.variants)).id
    assert other != run
    assert sum(v.num_exposures for v in report(store, "tickets").variants) == 0
    assert store.begin_run(ARMS).id == run
    assert sum(v.num_exposures for v in report(store, "tickets").variants) == 1


def test_a_report_needs_the_file_only_and_reads_while_another_connection_writes(store, tmp_path):
    run = store.begin_run(ARMS).id
    expose(store, run, 0, "attn")
    reader = Store(f"sqlite:///{tmp_path}/e.sqlite", create=False)
    assert report(reader, "tickets").variants[0].num_exposures == 1
    reader.close()
    with pytest.raises(NotFoundError, match=r"missing\.sqlite"):
        Store(f"sqlite:///{tmp_path}/missing.sqlite", create=False)
    assert not (tmp_path / "missing.sqlite").exists()


def test_many_threads_write_at_once_and_nothing_is_lost(store):
    run = store.begin_run(ARMS).id

    def write(i: int) -> None:
        store.record_outcome(expose(store, run, i, "all"), "ok", 1.0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert report(store, "tickets").variants[1].num_outcomes == 200


def test_a_skewed_split_and_a_replaced_adapter_are_warned_of(store):
    run = store.begin_run(ARMS).id
    for i in range(200):
        expose(store, run, i, "all" if i % 4 else "attn", model_version=f"tickets-all@{1 + i // 100}")
    found = report(store, "tickets")
    assert found.sample_ratio_p_value < 0.001
    assert any("configured shares" in warning for warning in found.warnings)
    assert any("2 versions" in warning for warning in found.warnings)


def test_what_cannot_be_compared_is_refused_by_name(store):
    run = store.begin_run(ARMS).id
    completion = expose(store, run, 0, "attn")
    store.record_outcome(completion, "ok", 1.0)
    store.record_outcome(completion, "stars", 4.0)
    with pytest.raises(DataError, match=r"4\.0"):
        report(store, "tickets", outcome="stars")
    with pytest.raises(NotFoundError, match=r"'thumbs'.*ok 1, stars 1"):
        report(store, "tickets", outcome="thumbs")
    with pytest.raises(NotFoundError, match="experiments there: tickets"):
        report(store, "other")
    assert report(store, "tickets", outcome="ok").outcome == "ok"


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_stores_that_cannot_work_are_refused(url):
    with pytest.raises(ConfigError, match="store"):
        Store(url)


def test_the_table_names_every_variant_and_the_verdict(store):
    run = store.begin_run(ARMS).id
    store.record_outcome(expose(store, run, 0, "attn"), "ok", 1.0)
    text = shown(report(store, "tickets"))
    assert all(word in text for word in ("attn", "all", "exposures", "users", "95% interval", "TTFT ms"))
    assert "all against attn: undecided" in text


def shown(found: ExperimentReport, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console, *render(found))
    return console.file.getvalue()


def test_a_misspelled_outcome_is_listed_and_can_be_passed_over_or_dropped(store):
    run = store.begin_run(ARMS).id
    for i in range(40):
        store.record_outcome(expose(store, run, i, ("attn", "all")[i % 2]), "exact_match", float(i % 3 == 0))
    alone = report(store, "tickets")
    store.record_outcome("c3", "exct_match", 1.0)
    several = report(store, "tickets")
    assert several.outcomes == {"exact_match": 40, "exct_match": 1}
    assert (several.outcome, several.comparisons) == (None, ())
    assert "exact_match 40, exct_match 1; nothing is compared until --outcome names one" in shown(several)
    assert report(store, "tickets", "exact_match").comparisons == alone.comparisons
    assert store.drop_outcome(run, "exct_match") == 1
    dropped = report(store, "tickets")
    assert dropped.comparisons == alone.comparisons
    assert "Dropped by hand: 1 of outcome exct_match" in shown(dropped)
    assert store.drop_outcome(run, "exct_match") == 0
    assert [(each.name, each.num_outcomes) for each in store.drops(run)] == [("exct_match", 1)]


def test_a_drop_touches_one_name_in_one_run(store):
    numbers = [store.begin_run(Experiment("tickets", salt, ARMS.variants)).id for salt in ("a", "b")]
    for number, run in enumerate(numbers):
        completion = expose(store, run, number, "all")
        for name in ("ok", "okk"):
            store.record_outcome(completion, name, 1.0)
    store.drop_outcome(numbers[0], "okk")
    assert [each.outcomes for each in store.runs("tickets")] == [{"ok": 1, "okk": 1}, {"ok": 1}]


def test_a_store_from_before_drops_were_recorded_is_read_and_dropped_from(store):
    run = store.begin_run(ARMS).id
    store.record_outcome(expose(store, run, 0, "all"), "ok", 1.0)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE dropped_outcomes")
    assert report(store, "tickets").dropped == ()
    assert store.drop_outcome(run, "ok") == 1
    assert len(report(store, "tickets").dropped) == 1


def test_an_earlier_run_is_named_and_reported_on_when_asked(store):
    first = store.begin_run(ARMS).id
    for i in range(12):
        store.record_outcome(expose(store, first, i, ("attn", "all")[i % 2]), "ok", 1.0)
    before = report(store, "tickets")
    third = Experiment("tickets", "s", (*ARMS.variants, Variant("new", "tickets-new")))
    second = store.begin_run(third).id
    found = report(store, "tickets")
    assert (found.run_id, len(found.variants)) == (second, 3)
    assert [(each.run_id, each.num_exposures) for each in found.other_runs] == [(first, 12)]
    assert f"run {first} (exposures: 12" in shown(found)
    assert report(store, "tickets", run_id=first).variants == before.variants
    assert report(store, "tickets", run_id=first).other_runs == (), "the other one has nothing to read"
    with pytest.raises(NotFoundError, match=rf"no run 99; its runs: {second}, {first}"):
        report(store, "tickets", run_id=99)
    listed = [str(line) for line in runs_table(store.runs("tickets")).lines(80)]
    assert any(line.startswith(f"{second} ") for line in listed)
    assert any(line.startswith(f"{first} ") and "12" in line and "ok 12" in line for line in listed)


def test_units_assigned_by_another_rule_are_not_mixed_with_these(store):
    """A store as servers before weighted rendezvous wrote it: the same definition, and no rule in it."""
    definition = json.dumps(asdict(ARMS), sort_keys=True)
    digest = hashlib.sha256(definition.encode()).hexdigest()
    with store._engine.begin() as connection:
        old = {"experiment": "tickets", "digest": digest, "definition": definition}
        connection.execute(runs.insert().values(**old, started_at=1.0, activated_at=1.0))
    new = store.begin_run(ARMS).id
    assert [each.run.id for each in store.runs("tickets")] == [new, 1]
    assert {each.run.experiment for each in store.runs("tickets")} == {ARMS}


def test_units_are_compared_in_the_order_of_their_first_outcome(store):
    """Whatever the order of exposure, and whether or not an outcome is reported again."""
    rng = np.random.default_rng(0)
    run = store.begin_run(ARMS).id
    arms = rng.integers(0, 2, 200)
    for i in range(200):
        expose(store, run, i, ("attn", "all")[arms[i]])
    arrival = rng.permutation(200)
    values = {int(i): float(rng.random() < 0.5 + 0.4 * arms[i]) for i in arrival}
    for i in arrival:
        store.record_outcome(f"c{i}", "ok", values[int(i)])
        if rng.random() < 0.2:
            again = int(arrival[0])
            store.record_outcome(f"c{again}", "ok", values[again])
    control, treatment = (np.array([values[int(i)] for i in arrival if arms[i] == arm]) for arm in (0, 1))
    found = report(store, "tickets").comparisons[0]
    assert found.interval == difference_interval(control, treatment, 0.05)
    assert found.interval != difference_interval(np.sort(control), np.sort(treatment), 0.05)
    assert found.num_control_units == found.num_treatment_units == min(len(control), len(treatment))


def test_units_that_wait_for_the_other_arms_are_told_of(store):
    run = store.begin_run(ARMS).id
    for i in range(300):
        completion = expose(store, run, i, ("attn", "all")[i % 2])
        if i % 2 or i < 100:
            store.record_outcome(completion, "ok", 1.0)
    warnings = report(store, "tickets").warnings
    assert any("100 of 150 users of all wait to be compared" in warning for warning in warnings)


def test_three_arms_share_alpha_between_two_comparisons(store):
    three = Experiment("tickets", "s", (*ARMS.variants, Variant("new", "tickets-new", 2.0)))
    run = store.begin_run(three).id
    rng = np.random.default_rng(1)
    values: dict[str, list[float]] = {"attn": [], "all": [], "new": []}
    for i in range(300):
        name = ("attn", "all", "new", "new")[i % 4]
        values[name].append(float(rng.random() < 0.5))
        store.record_outcome(expose(store, run, i, name), "ok", values[name][-1])
    arms = {name: np.array(found) for name, found in values.items()}
    found = report(store, "tickets").comparisons
    assert found[0].interval == difference_interval(arms["attn"], arms["all"], 0.025)
    assert found[1].interval == difference_interval(arms["attn"], arms["new"], 0.025, 2.0)
