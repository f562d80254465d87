"""Store and report: what was written is what is counted, per unit, and comes back without a server."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from serve.errors import ConfigError, DataError, NotFoundError, RequestError
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.report import render, report
from serve.experiments.store import Exposure, Store

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
    with pytest.raises(RequestError, match="ok, stars"):
        report(store, "tickets")
    with pytest.raises(DataError, match=r"4\.0"):
        report(store, "tickets", outcome="stars")
    with pytest.raises(NotFoundError, match="thumbs"):
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
    console = Console(file=io.StringIO(), width=80)
    console.print(render(report(store, "tickets")))
    text = console.file.getvalue()
    assert all(word in text for word in ("attn", "all", "sures", "users", "95% interval", "TTFT ms"))
    assert "all against attn: undecided" in text
