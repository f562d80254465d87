"""No table ever cuts a number or a name: every table there is, long names and big numbers, at any width."""

from __future__ import annotations

import ast
import io
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

import lathe
from serve import combinations, doctor, hardware, remote_adapters
from serve.adapters.tools import difference, extraction, inspection
from serve.bench import compare as serve_compare
from serve.bench import conversations, finding, mixtures, step
from serve.bench.goodput import Goodput
from serve.bench.scripts import Setting
from serve.bench.summary import Spread, Summary
from serve.bench.summary import table as summary_table
from serve.device import Device
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.records import Drop, Run, RunCounts
from serve.experiments.report import (
    Comparison,
    ExperimentReport,
    Latency,
    OtherRun,
    VariantReport,
    render,
    runs_table,
)
from serve.experiments.statistics import Interval
from serve.tables import LEAST_OF_WORDS, Column, Table, numbers, show, words
from train import demo, demo_live
from train.after import export
from train.bench import compare as train_compare
from train.bench import sighted_compare
from train.data import tables as data_tables
from train.data.splits import Split
from train.data.tokens import SourceCounts, TokenizeReport
from train.watch import runs

ROOT = Path(lathe.__file__).parent
SOURCES = [ROOT / "lathe.py", *sorted(ROOT.glob("serve/**/*.py")), *sorted(ROOT.glob("train/**/*.py"))]
WIDTHS = (40, 80, 200)
LONG = "customer-support-router-2026-11-attention-only"
LONGER = f"runs/experiments/{LONG}/rank-64/seed-1234567"


def console_of(width: int, *, is_terminal: bool) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None, legacy_windows=False
    )


def printed(console: Console) -> str:
    return console.file.getvalue()


# The tables there are. Each entry prints its table, and says which names and numbers must be read in it.

Case = tuple[Callable[[Console], None], list[str]]


def experiment_report() -> Case:
    def arm(name: str, latency: Latency) -> VariantReport:
        return VariantReport(
            name, name, 0.5, 12_345_678, 1_234_567, 9_876_543, 1_234_000, 0.8, 0.6543, Interval(0.6511, 0.6577),
            latency, {}, {},
        )  # fmt: skip

    slow, slower = Latency(1.276, 12.5, 0.127, 1.999), Latency(123.456, 1234.567, 1.0, 2.0)
    arms = (arm(LONG, slow), arm(f"{LONG}-b", slower))
    interval = Interval(-0.0321, 0.0654)
    found = ExperimentReport(
        experiment="tickets",
        run_id=1234,
        started_at="2026-11-26T01:10:53+00:00",
        outcome="exact_match_of_the_whole_answer",
        outcomes={"exact_match_of_the_whole_answer": 9_876_543, "exct_match": 1},
        dropped=(Drop("exctmatch", 1_234_567, 0.0),),
        other_runs=(OtherRun(1233, "2026-11-25T00:00:00+00:00", 7_654_321),),
        alpha=0.05,
        variants=arms,
        comparisons=(Comparison(arms[0].name, arms[1].name, 0.0123, interval, "undecided", 1, 1),),
        sample_ratio_p_value=0.5,
        warnings=(f"{LONG} was served by 2 versions: {LONG}@1 abcdef, {LONG}@2 fedcba",),
    )
    must = [
        LONG,
        f"{LONG}-b",
        "12,345,678",
        "9,876,543",
        "1,276",
        "12,500",
        "123,456",
        "1,234,567",
        "127",
        "1,999",
    ]
    must += ["0.654", "0.651", "0.658", "+0.012", "(-0.032", "+0.065)", "1,234,567", "7,654,321", f"{LONG}@2"]
    must += ["exact_match_of_the_whole_answer", "1234,", "2026-11-26T01:10:53+00:00"]
    return lambda console: show(console, *render(found)), must


def experiment_runs() -> Case:
    variants = (Variant(LONG, LONG, 1.5), Variant(f"{LONG}-b", LONG, 98.5))
    counts = RunCounts(
        Run(1234, Experiment("e", "s", variants), 0.0), 0.0, 12_345_678, {"exact_match": 7_654_321}
    )
    must = [LONG, f"{LONG}-b", "98.5", "12,345,678", "7,654,321", "1234", "1970-01-01T00:00:00+00:00"]
    return lambda console: show(console, runs_table([counts])), must


def training_runs() -> Case:
    run = runs.Run(
        LONGER, LONG, "interrupted", steps=1_234_567, judged_by="reward", best_value=1234.5678, best_step=1_111_111,
        metric="exact_match", metric_value=0.987, base_model=f"hub/{LONG}-base", base_fingerprint="sha256:abcdef0123",
        objective="grpo", fine_tune_type="lora", data_hash="sha256:fedcba9876", parent=f"runs/{LONG}-parent",
        parent_hash="sha256:1234567890", resumed_from="checkpoints/step-1111111",
        created="2026-11-21T17:46:00+00:00", seconds=123_456.0,
    )  # fmt: skip
    must = [
        LONGER,
        "interrupted",
        "1,234,567",
        "1234.5678",
        "@1,111,111",
        "98.7%",
        f"{LONG}-base",
        "abcdef01",
    ]
    must += ["fedcba98", f"runs/{LONG}-parent", "12345678", "step-1111111", "17:46", "34:17:36"]
    return lambda console: show(console, *runs.tables([run])), must


def diagnosis() -> Case:
    device = Device(**{each.name: None for each in fields(Device)})
    told = {"system": "Linux", "machine": "x86_64", "chip": f"AMD {LONG}", "memory_bytes": 123 * 2**40}
    told |= {"mlx_version": "0.32.4", "backend": "cpu", "blas": f"OpenBLAS in /opt/{LONGER}/libopenblas.so"}
    device = Device(**{**vars_of(device), **told, "dtype_policy": "float32"})
    findings = (doctor.Finding(f"no model in /opt/{LONGER}", f"pip install {LONG}"),)
    gpus = (
        hardware.Gpu(f"NVIDIA {LONG}", 132, 2**40, 4812.3, "580.65.06", "9.0"),
        hardware.Gpu("another", 1),
    )
    made_of = hardware.Hardware(
        f"AMD {LONG}", "a board", 12, (("super", 4), ("performance", 8)), 96, 3, 2**47, 2**33, 153.5, gpus
    )
    found = doctor.Diagnosis(
        device, 123_456.7, 1234.5, 987.6, made_of, {LONG: "1.2.3"}, f"/data/{LONGER}", findings
    )
    must = [
        LONG,
        f"/opt/{LONGER}/libopenblas.so",
        "125952.0",
        "123456.7",
        "1234.5",
        "987.6",
        *("board", "super", "performance)", "96", "8.0", "153.5", "132", "1024.0", "4,812", "580.65.06"),
        "another",
        f"/data/{LONGER}",
        "1.2.3",
    ]
    return lambda console: doctor.show(found, console), must


def model_combinations() -> Case:
    cells = [combinations.Cell("base", column, True) for column in combinations.COLUMNS]
    cells += [
        combinations.Cell(LONG, column, bool(i % 2), f"reason {i}: {LONGER}")
        for i, column in enumerate(combinations.COLUMNS)
    ]
    drawn, notes = combinations.table(combinations.Combinations(f"hub/{LONG}", tuple(cells)))
    must = [LONG, f"hub/{LONG}", "(1)", f"({len(combinations.COLUMNS)})", LONGER]
    return lambda console: show(console, drawn, *notes), must


def vars_of(device: Device) -> dict:
    return {each.name: getattr(device, each.name) for each in fields(Device)}


def summary() -> Summary:
    slow = Spread(1.0, 1.276, 123.456, 150.0, 200.0)
    given = dict.fromkeys((each.name for each in fields(Summary)), 0)
    given |= {
        "label": f"lathe, {LONG}",
        "concurrency": 1024,
        "num_requests": 9_876_543,
        "num_errors": 1_234_567,
    }
    given |= {"tokens_per_s": 1_234_567.8, "ttft_s": slow, "tpot_s": slow, "gap_s": slow}
    given |= {"request_rate": 12345.5, "goodput": Goodput("ttft:1", 98765.43, 0.4321)}
    return Summary(**given)


def serving_bench() -> Case:
    must = [
        LONG,
        "1,234,567.8",
        "1,276",
        "123,456",
        "150,000",
        "200,000",
        "1,234,567",
        "9,876,543",
        "1024",
        "12345.5",
        "98,765.43",
        "(43%)",
    ]
    return lambda console: show(console, summary_table(f"http://127.0.0.1:1/{LONGER}", [summary()])), must


def serving_comparison() -> Case:
    ratios = [
        serve_compare.Ratio(LONG, f"{LONG}-b", level, 1234.5, 1000.25, 98765.75, asked=1235.25, is_met=False)
        for level in (1, 4, 16, 64)
    ]
    outcome = serve_compare.Outcome([], ratios, {})
    must = [LONG, f"{LONG}-b", "1234.50", "(1000.25,", "98765.75)", "1235.25", "✗"]
    return lambda console: show(console, serve_compare.table(outcome)), must


def step_bench() -> Case:
    clock = step.Clock(1234.5678, 987.6543)
    parts = {part: step.Clock(number + 0.1234, number + 0.05) for number, part in enumerate(step.PARTS)}
    found = step.Result(1024, [clock], [step.Clock(98765.4321, 1000.5)], parts, parts)
    must = ["1024", "1234.57", "98765.43", "97530.86", "5.42", "12.85", "no", "0.123", "5.123", "15.740"]
    return lambda console: show(console, step.table([found]), step.parts_table([found])), must


def cache_bench() -> Case:
    found = finding.Finding(LONG, (1234.5678, 0.001, 98765.4321), 0.0667, "at most")
    must = [LONG, "1234.568", "0.001", "98765.432", "0.0667", "no"]
    return lambda console: show(console, finding.table(f"title {LONGER}", [found])), must


def conversations_bench() -> Case:
    slow = Spread(1.0, 1.276, 123.456, 150.0, 200.0)
    given = dict.fromkeys((each.name for each in fields(conversations.Result)), 0.0)
    given |= {"label": f"lathe-{LONG}", "num_turns": 9_876_543, "num_errors": 1_234_567, "hit_rate": 0.9876}
    given |= {"most_possible": 0.9987, "ttft_s": slow, "first_turns_ttft_s": slow, "answers_per_s": 1234.5}
    outcome = conversations.Outcome([conversations.Result(**given)], 1234 * 2**20, {})
    must = [
        f"lathe-{LONG}",
        "98.8%",
        "99.9%",
        "1,276",
        "123,456",
        "1234.50",
        "1,234,567",
        "9,876,543",
        "1,234",
    ]
    return lambda console: show(console, conversations.table(outcome, Setting())), must


def training_bench() -> Case:
    kinds = {each.name: each for each in fields(train_compare.Outcome)}
    loop = train_compare.Summary(**{**dict.fromkeys((f.name for f in fields(train_compare.Summary)), 0), **{
        "data_tokens_per_s": 1_234_567.0, "peak_memory_bytes": 123_456_000_000_000, "padding_frac": 0.17,
        "steps": 123_456, "step_s": 1234.5, "loss_first": 1234.5, "loss_last": 0.1,
    }})  # fmt: skip
    ratio = train_compare.Ratio(LONG, f"{LONG}-b", 1234.5, 1000.25, 98765.75, 0.43)
    outcome = train_compare.Outcome(**{**dict.fromkeys(kinds), "summaries": {LONG: loop}, "ratios": [ratio]})
    must = [
        LONG,
        f"{LONG}-b",
        "1,234,567",
        "123456.00",
        "1234.5",
        "1234.50",
        "(1000.25,",
        "98765.75)",
        "0.43",
        "0.1",
    ]
    return lambda console: show(console, *train_compare.tables(outcome)), must


def training_bench_with_pictures() -> Case:
    loop = train_compare.Summary(**{**dict.fromkeys((f.name for f in fields(train_compare.Summary)), 0), **{
        "data_tokens_per_s": 1_234_567.0, "peak_memory_bytes": 123_456_000_000_000, "padding_frac": 0.17,
        "steps": 123_456, "step_s": 1234.5,
    }})  # fmt: skip
    ratio = train_compare.Ratio(LONG, f"{LONG}-b", 1234.5, 1000.25, 98765.75, 0.43)
    losses = {"m": {LONG: sighted_compare.Losses(1234.5678, 8765.4321, 2345.678)}}
    outcome = sighted_compare.SightedOutcome(
        {LONG: loop}, [ratio], {LONG: 7_654_321.0}, losses, {"m": 3456.789}, "cpu"
    )
    must = [
        LONG,
        "1,234,567",
        "7,654,321",
        "123456.00",
        "1234.50",
        "0.43",
        "1234.5678",
        "8765.4321",
        "3456.789",
    ]
    return lambda console: show(console, *sighted_compare.tables(outcome)), [*must, "2345.678"]


def split(name: str) -> Split:
    counts = SourceCounts(**{each.name: 12_345_678 for each in fields(SourceCounts)})
    report = TokenizeReport(
        9_876_543, 8_765_432, 7_654_321, 123_456_789_012, 98_765_432_109, dropped={"x": 1_234_567},
        histogram=((64, 12_345_678), (1_048_576, 1)), longest=1_048_576,
        sources={f"{LONGER}.jsonl": counts, "b.jsonl": counts},
    )  # fmt: skip
    return Split(name, [], [], report)


ROWS = [
    "9,876,543",
    "8,765,432",
    "7,654,321",
    "123,456,789,012",
    "98,765,432,109",
    "1,234,567",
    "1,048,576",
    "80.0%",
]


def rows_of_splits() -> Case:
    splits = [split(name) for name in ("train", "valid", "test")]
    return lambda console: show(console, data_tables.rows_table(splits)), ["train", "valid", "test", *ROWS]


def sources_of_a_split() -> Case:
    must = [f"{LONGER}.jsonl", "12,345,678", "sequences"]
    return lambda console: show(console, data_tables.sources_table(split("train"))), must


def lengths() -> Case:
    must = ["12,345,678", "1,048,576", "█" * data_tables.BAR_WIDTH]
    return lambda console: show(console, data_tables.histogram(split("train").report)), must


def exported() -> Case:
    report = export.ExportReport(
        LONGER, LONG, LONG, 4, 128, "float16", 0.98765, 1.234e-06, 5.678e-03, 123_456_789, 1_234_567,
        123_456_700_000, 1.0, LONG, 7_654_321, (LONGER, LONG),
    )  # fmt: skip
    must = [
        LONGER,
        "123,456.7",
        "98.77%",
        "123,456,789",
        "1.23e-06,",
        "5.68e-03",
        "1,234,567",
        "7,654,321,",
        LONG,
    ]
    return lambda console: show(console, export._table(report)), must


def demo_result() -> Case:
    score = {"exact_match": 0.5, "num_exact": 1_234_567, "num_rows": 9_876_543}
    training = {"num_trainable": 12_345_678_901, "seconds": 123_456.0}
    numbers_ = {
        "base": score,
        "adapters": {LONG: {**score, "training": training}},
        "serving": {"num_requests": 7_654_321, "tokens_per_s": 1_234_567.0},
        "export": {"bits": 8, "out": LONGER, "top1_agreement": 0.98765, "kl_mean": 1.1e-06},
        "winner": LONG,
        "pictures": {
            "scores": {"shapes": score, LONGER: score},
            "training": training,
            "question": "Which bin?",
            "answers": {"shapes": "black", LONGER: "black square, bin 3"},
        },
        "seconds": 99_999.0,
    }
    report = ExperimentReport("e", 1, "now", None, {}, (), (), 0.05, (), (), None, ())
    must = [LONG, "1234567", "9876543", "50.0%", "12,345,678,901", "123456", "7654321", "98.77%", "square,"]
    return lambda console: demo._show(numbers_, report, console), must


def extracted() -> Case:
    found = extraction.Extraction({}, (extraction.Kept(LONGER, 1.2345, 0.98765, 123_456),), {LONG: 0.5})
    return lambda console: show(console, *extraction.tables(found)), [
        LONGER,
        "123.450%",
        "98.765%",
        "123456",
        LONG,
    ]


def inspected() -> Case:
    module = inspection.Module(LONGER, 12_345_678, 7_654_321, 128, 1024, 1234.5, "bfloat16", 98.76, False)
    found = inspection.Inspection(LONG, "peft", "lora", (module,), (), 123_456_789, 2**40, None, (), ())
    must = [LONGER, LONG, "128", "12345678", "7654321", "1024", "1234.5", "98.76", "bfloat16", "123,456,789"]
    return lambda console: show(console, *inspection.tables(found)), must


def adapters_apart() -> Case:
    apart = difference.Apart(LONGER, 1.234e-06, 5678.0, 0.1234, -0.9876, 0.5432)
    found = difference.Difference((apart,), (f"{LONG}.bias",))
    must = [LONGER, "1.234e-06", "5678", "0.1234", "-0.9876", "0.5432", LONG, f"{LONG}-b", f"{LONG}.bias"]
    return lambda console: show(console, *difference.tables(found, LONG, f"{LONG}-b")), must


def adapters_served() -> Case:
    version = {
        "id": f"{LONG}@12345", "state": "resident", "slot": 1_234_567, "rank": {"min": 8, "max": 1024},
        "modules": 7_654_321, "bytes": {"content": 123_456 * 2**20}, "hits": 9_876_543,
        "held_by": {"requests": 3_456_789}, "path": f"/srv/{LONGER}",
    }  # fmt: skip
    listing = {"data": [{"pinned": True, "current": version["id"], "versions": [version]}]}
    must = [f"{LONG}@12345", "pinned", "1234567", "8-1024", "7654321", "123456.0"]
    must += ["9876543", "3456789", f"/srv/{LONGER}"]
    return lambda console: show(console, remote_adapters.table(listing)), must


def mixtures_bench() -> Case:
    clocks = [mixtures.Clock(123_456.7, 1234.5)], [mixtures.Clock(246_913.4, 2469.0)]
    found = mixtures.Result(1024, mixtures.Mixture(LONG, 32, (8,), 0.85), "tiles", *clocks)
    must = ["1024", LONG, "tiles", "123456.7", "246913.4", "0.50", "0.85"]
    return lambda console: show(console, mixtures.table([found])), must


def demo_of_versions() -> Case:
    kinds = {each.name for each in fields(demo_live.Probed)}
    given = {"version": f"{LONG}@12345", "step": 1_234_567, "num_exact": 7_654_321, "answer": f"of {LONGER}"}
    probed = demo_live.Probed(**{**dict.fromkeys(kinds, 0), **given})
    back = demo_live.WentBack(f"{LONG}@1", 3, 1.0, f"{LONG}@2", 4)
    live = {
        "adapter": LONG,
        "streamed": f"{LONG}-b",
        "num_probes": 9_876_543,
        "versions": (probed,),
        "went_back": back,
    }
    live = {**dict.fromkeys((each.name for each in fields(demo_live.Live)), 0), **live}
    must = [f"{LONG}@12345", "1234567", "7654321", "9876543", LONGER, f"{LONG}-b", f"{LONG}@1", f"{LONG}@2"]
    return lambda console: demo_live._show(demo_live.Live(**live), console), must


CASES = [
    experiment_report,
    experiment_runs,
    training_runs,
    diagnosis,
    model_combinations,
    serving_bench,
    serving_comparison,
    step_bench,
    cache_bench,
    conversations_bench,
    training_bench,
    training_bench_with_pictures,
    rows_of_splits,
    sources_of_a_split,
    lengths,
    exported,
    demo_result,
    extracted,
    inspected,
    adapters_apart,
    adapters_served,
    mixtures_bench,
    demo_of_versions,
]


@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_number_and_name_put_in_comes_out_whole(case, width, is_terminal):
    draw, must = case()
    console = console_of(width, is_terminal=is_terminal)
    draw(console)
    found = printed(console)
    tokens = found.split()
    missing = [
        word for word in must if word not in tokens and f"{word}," not in tokens and f"{word}:" not in tokens
    ]
    assert not missing, found


# The helper itself, over random tables.

WORDS = (
    "a",
    "users",
    "exact_match",
    "1,276",
    "12,345,678",
    LONG,
    "表",
    "🙂🙂",
    "x/y/z",
    "0.5",
    "[bold]",
    "\\[red]",
)


def random_table(rng: random.Random) -> Table:
    columns = [
        Column(
            " ".join(rng.choices(WORDS, k=rng.randint(0, 3))),
            rng.choice(["left", "right"]),
            rng.random() < 0.5,
        )
        for _ in range(rng.randint(1, 6))
    ]
    table = Table(*columns, title=rng.choice(["", f"title {LONGER}"]), has_headings=rng.random() < 0.7)
    for _ in range(rng.randint(0, 5)):
        table.add(
            *(rng.choice([" ", "\n", "  "]).join(rng.choices(WORDS, k=rng.randint(0, 6))) for _ in columns)
        )
    return table


@pytest.mark.parametrize("seed", range(150))
def test_no_word_of_any_table_is_cut_or_lost_and_no_line_is_longer_than_it_must_be(seed):
    rng = random.Random(seed)
    table, width = random_table(rng), rng.choice([1, 10, 20, 40, 60, 80, 120, 200])
    console = console_of(width, is_terminal=rng.random() < 0.5)
    show(console, table)
    lines = printed(console).splitlines()
    given = sorted(word for row in table.rows for cell in row for word in cell.plain.split())
    kept = list(" ".join(lines).split())
    for word in given:
        kept.remove(word)  # ValueError: it was cut, or lost
    if table.title:
        assert lines.pop(0) == table.title
    for line in lines:
        *before, last = line.split() or [""]
        stands_out = not before or cell_len(last) > LEAST_OF_WORDS
        assert cell_len(line) <= width or stands_out, line
        assert line == line.rstrip()


@pytest.mark.parametrize("seed", range(50))
def test_a_table_with_room_is_a_grid_a_line_a_row(seed):
    rng = random.Random(seed)
    table = Table("name", *numbers("first", "second"), words("said"))
    for number in range(rng.randint(1, 6)):
        table.add(LONG[:number], f"{rng.random():.3f}", f"{rng.randrange(10**9):,}", "a few words")
    lines = [line.plain for line in table.lines(200)]
    assert len(lines) == 2 + len(table.rows)
    ends = {line.index("  a few words") for line in lines[2:]}
    assert len(ends) == 1, "numbers end in one column"


def test_words_go_on_in_the_next_line_before_a_table_becomes_a_list():
    table = Table("name", words("said"))
    table.add("first", "some words that do not fit on a line of forty")
    assert [line.plain for line in table.lines(40)] == [
        "name   said",
        "─" * 40,
        "first  some words that do not fit on a",
        "       line of forty",
    ]
    table.rows.clear()
    table.add("a-longer-first-name", "some words that do not fit")
    assert [line.plain for line in table.lines(20)] == [
        "a-longer-first-name",
        "  said  some words",
        "        that do not",
        "        fit",
    ]


def test_a_row_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match="2 cells; the table has 1"):
        Table("one").add("a", "b")


@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
def test_lines_of_words_between_tables_keep_names_whole_and_a_terminals_width(is_terminal):
    console = console_of(40, is_terminal=is_terminal)
    show(
        console,
        f"[bold]{LONGER} against 1,276 of {LONG}: " + "undecided " * 9,
        Text("styled " * 9, style="dim"),
    )
    lines = printed(console).splitlines()
    assert {f"[bold]{LONGER}", "1,276", f"{LONG}:"} <= set(printed(console).split())
    assert len(lines) == 2 if not is_terminal else all(len(x) <= 40 or " " not in x.strip() for x in lines)


# That there is no other way to draw one.


def names_used(path: Path) -> set[str]:
    """Modules that a file imports, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_tables_are_drawn_by_the_one_helper_and_every_one_is_above():
    drawing = {"rich.table", "rich.columns", "rich.panel", "rich.layout", "tabulate"}
    assert not [path for path in SOURCES if names_used(path) & drawing]
    users = {path.relative_to(ROOT).as_posix() for path in SOURCES if builds_a_table(path)}
    assert users == {
        "serve/adapters/tools/difference.py",
        "serve/adapters/tools/extraction.py",
        "serve/adapters/tools/inspection.py",
        "serve/combinations.py",
        "serve/doctor.py",
        "serve/bench/compare.py",
        "serve/bench/conversations.py",
        "serve/bench/finding.py",
        "serve/bench/mixtures.py",
        "serve/bench/step.py",
        "serve/bench/summary.py",
        "serve/experiments/report.py",
        "train/bench/compare.py",
        "train/bench/sighted_compare.py",
        "train/data/tables.py",
        "serve/remote_adapters.py",
        "train/demo.py",
        "train/demo_live.py",
        "train/after/export.py",
        "train/watch/runs.py",
    }


def builds_a_table(path: Path) -> bool:
    if not any(name.startswith("serve.tables") for name in names_used(path)):
        return False
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(getattr(call, "id", getattr(call, "attr", "")) == "Table" for call in calls)
