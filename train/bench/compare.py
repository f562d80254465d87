"""`lathe bench train`: Lathe, mlx_lm.lora and mlx-lm-lora on one model and the same chats, one after the other.

Every run is a process of its own with the same BLAS, the same recipe file and one pass over the same rows; rounds
go through the runs in turn, so drift of the machine meets all alike. What counts is *data tokens*: those of the
rows, without padding, whichever way a loop batches them. Imports, loading, tokenizing and the first steps are
in no rate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import yaml

from serve import blas, device
from serve.bench import standin
from serve.errors import ConfigError, StoppedError
from serve.model.loading import load_tokenizer, resolve
from serve.model.template import ChatTemplate
from serve.model.template_rules import make_template
from serve.tables import Table, numbers
from train.bench.chats import Lengths, write_chats
from train.bench.process import run_child
from train.foresee import preflight
from train.recipe.recipe import load_recipe
from train.watch.metrics import rows_of

PEER = "mlx_lm_lora_package"
"""The package mlx-lm-lora, another project than mlx_lm's own mlx_lm.lora; measured where it is installed."""
LOOPS = ("lathe", "mlx_lm_lora", "length_sorted", PEER, "lathe_packed")
"""Lathe as it comes; mlx_lm.lora as it comes; mlx_lm's loop with its sort by length repaired; the other package;
sample_packing."""
RATIOS = (
    ("lathe", "mlx_lm_lora"),
    ("lathe_packed", "mlx_lm_lora"),
    ("lathe", "length_sorted"),
    ("lathe_packed", "length_sorted"),
    ("lathe", PEER),
    ("lathe_packed", PEER),
    ("lathe_packed", "lathe"),
)
PYTHON = (sys.executable, "-P")
"""-P: a folder named `train` or `serve` where the user stands is not imported."""
MLX_LM_CHILD = Path(__file__).with_name("mlx_lm_child.py")
PEER_CHILD = Path(__file__).with_name("mlx_lm_lora_child.py")
MLX_VLM_CHILD = Path(__file__).with_name("mlx_vlm_child.py")
PACKAGES = ("mlx", "mlx-lm", "mlx-lm-lora", "mlx-lathe")
SHORT = Lengths(median=24.0, sigma=0.3, longest=40)
"""Rows, one a batch, whose updates take 100 to 200 ms on a CPU: where the loop's own time shows."""
SHORT_STEPS = 100
STEPS_PER_REPORT = 10


@dataclass(frozen=True)
class TrainBench:
    """What to measure, the same for every loop. `num_batches` of `batch_size` rows are one pass."""

    num_batches: int = 12
    batch_size: int = 8
    rounds: int = 1
    warmup: int = 1
    """Steps at the start that are in no rate."""
    model: str | None = None
    """A model folder or hub name in place of the random one."""
    vocabulary: int = 32768
    lengths: Lengths = field(default_factory=Lengths)
    seed: int = 0

    def check(self) -> None:
        """ConfigError if there would be nothing to measure."""
        check_counts(self.num_batches, self.batch_size, self.rounds, self.warmup)


def check_counts(num_batches: int, batch_size: int, rounds: int, warmup: int) -> None:
    """ConfigError, by the command's options, if there would be nothing to measure."""
    for option, found in (("batch-size", batch_size), ("rounds", rounds)):
        if found < 1:
            raise ConfigError(f"--{option}: found {found}; expected 1 or more")
    if num_batches <= warmup:
        raise ConfigError(
            f"--iters: found {num_batches}; expected {warmup + 1} or more, for the first {warmup} is warm-up and "
            "not counted"
        )


@dataclass(frozen=True)
class Step:
    """One optimizer update. `time` is the wall clock after its report.

    in_loop_s  from the making of its batches to the moved weights; compute_s of that is the update itself. None
               where a loop does not say
    """

    time: float
    loss: float
    data_tokens: int
    places: int
    in_loop_s: float | None = None
    compute_s: float | None = None


@dataclass(frozen=True)
class Run:
    """One process's steps."""

    steps: tuple[Step, ...]
    peak_memory_bytes: int
    warmup: int

    @property
    def counted(self) -> tuple[Step, ...]:
        return self.steps[self.warmup :]

    @property
    def seconds(self) -> float:
        """Of the counted steps, everything between them included."""
        return self.steps[-1].time - self.steps[self.warmup - 1].time

    @property
    def data_tokens_per_s(self) -> float:
        return sum(step.data_tokens for step in self.counted) / self.seconds

    @property
    def outside_s(self) -> list[tuple[float, float]]:
        """(seconds in the loop but outside the update, seconds of report) of each counted step; [] if not known."""
        return [
            (step.in_loop_s - step.compute_s, step.time - before.time - step.in_loop_s)
            for before, step in pairwise(self.steps[self.warmup - 1 :])
            if step.in_loop_s is not None and step.compute_s is not None
        ]


@dataclass(frozen=True)
class Summary:
    """A loop over all rounds: medians, the largest peak, and the first round's losses."""

    data_tokens_per_s: float
    data_tokens_per_s_by_round: tuple[float, ...]
    peak_memory_bytes: int
    padding_frac: float
    data_tokens: int
    """In one pass, warm-up included."""
    steps: int
    seconds: float
    step_s: float
    loss_first: float
    loss_last: float
    overhead_frac: float | None = None
    """Share of the counted seconds outside the updates, a report after each step included."""


@dataclass(frozen=True)
class Overhead:
    """Lathe's loop over short updates, with a report every 10, the recipe's default."""

    steps: int
    step_ms: float
    """Of an update: graph building, forward, backward, optimizer."""
    outside_ms: float
    """A step's share of everything else: batches made, counts kept, reports to console, files and TensorBoard."""
    frac: float
    """Share of the time outside the updates."""


@dataclass(frozen=True)
class Ratio:
    """One loop over another, round by round: the median, lowest and highest of the rates; and of the peaks."""

    of: str
    to: str
    data_tokens_per_s: float
    lowest: float
    highest: float
    peak_memory: float


@dataclass(frozen=True)
class Outcome:
    """Everything `lathe bench train` shows."""

    summaries: dict[str, Summary]
    ratios: list[Ratio]
    overhead: Overhead
    backend: str

    def as_json(self, bench: TrainBench) -> dict[str, Any]:
        """The loops stand at the top, by name."""
        return {
            **{name: asdict(each) for name, each in self.summaries.items()},
            "overhead": asdict(self.overhead),
            "ratios": [asdict(each) for each in self.ratios],
            "settings": asdict(bench),
            "machine": asdict(device.describe()),
            "versions": {name: version for name in PACKAGES if (version := installed(name)) is not None},
        }


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def run(bench: TrainBench, folder: Path, progress: Callable[[str], None]) -> Outcome:
    """Write model and rows into `folder`, then run every loop `rounds` times.

    ConfigError or ModelError on bad settings, before anything runs; StoppedError if a child process fails.
    """
    bench.check()
    model = _model(bench, folder, progress)
    template = make_template(load_tokenizer(str(model)))
    rows = folder / "data" / "train.jsonl"
    write_chats(rows, bench.num_batches * bench.batch_size, bench.lengths, template, bench.seed)
    recipes = _write_recipes(bench, model, rows.parent, folder)
    loops = [name for name in LOOPS if name != PEER or installed("mlx-lm-lora")]
    runs: dict[str, list[Run]] = {name: [] for name in loops}
    for number in range(bench.rounds):
        for name in loops:
            progress(f"round {number + 1} of {bench.rounds}: {name}")
            runs[name].append(_run_once(name, recipes[name], folder, bench))
            # A comparison that is cut off has told what it had.
            progress(f"{name}: {runs[name][-1].data_tokens_per_s:,.0f} data tokens/s")
    summaries = {name: summarize(each) for name, each in runs.items()}
    ratios = [ratio(of, to, runs[of], runs[to]) for of, to in RATIOS if {of, to} <= runs.keys()]
    progress("short steps: what Lathe's loop itself takes")
    return Outcome(summaries, ratios, _overhead(bench, model, template, folder), device.backend())


def _model(bench: TrainBench, folder: Path, progress: Callable[[str], None]) -> Path:
    if bench.model is not None:
        return resolve(bench.model)
    progress("writing a random model")
    dtype = mx.float32 if device.backend() == "cpu" else mx.bfloat16
    standin.write_model(folder / "model", dtype, replace(standin.SMALLEST, vocabulary=bench.vocabulary))
    mx.clear_cache()
    return folder / "model"


def _write_recipes(bench: TrainBench, model: Path, data: Path, folder: Path) -> dict[str, Path]:
    """One mlx-lm recipe for all, and what packing changes in it."""
    common = _common(bench, model, data)
    paths = {}
    for name in LOOPS:
        changes: dict[str, Any] = {"adapter_path": str(folder / name)}
        if name == "lathe_packed":
            # A packed batch is filled up to batch_size · max_seq_length: about what others hold on average.
            changes |= {"sample_packing": True, "batch_size": _packed_batch_size(bench), "epochs": 1.0}
        recipe = {
            key: value
            for key, value in (common | changes).items()
            if key != "iters" or "epochs" not in changes
        }
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(recipe, sort_keys=False))
    return paths


def _common(bench: TrainBench, model: Path, data: Path) -> dict[str, Any]:
    """What all loops are told."""
    return {
        "model": str(model),
        "train": True,
        "data": str(data),
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
        "num_layers": -1,
        "batch_size": bench.batch_size,
        "iters": bench.num_batches,
        "optimizer": "adam",
        "learning_rate": 1e-4,
        "max_seq_length": bench.lengths.longest,
        "mask_prompt": True,
        "val_batches": 0,
        "steps_per_report": 1,
        "save_every": 10**6,
        "seed": bench.seed,
    }


def _packed_batch_size(bench: TrainBench) -> int:
    return max(1, round(bench.batch_size * bench.lengths.mean / bench.lengths.longest))


def _run_once(name: str, recipe: Path, folder: Path, bench: TrainBench) -> Run:
    log = folder / f"{name}.log"
    if name.startswith("lathe"):
        peak = run_child(
            name,
            [*PYTHON, "-m", "lathe", "train", str(recipe), "--overwrite"],
            log,
            environment(preload=False),
        )
        steps, reported, _ = lathe_steps(recipe, folder / name)
    else:
        out = folder / f"{name}.json"
        loop = "sorted" if name == "length_sorted" else "as_is"
        command = [*PYTHON, str(MLX_LM_CHILD), str(recipe), str(out), loop]
        if name == PEER:
            command = [*PYTHON, str(PEER_CHILD), str(recipe), str(out)]
        peak = run_child(name, command, log, environment(preload=True))
        found = json.loads(out.read_text())
        steps, reported = tuple(Step(**each) for each in found["steps"]), found["peak_memory_bytes"]
    if len(steps) <= bench.warmup:
        raise StoppedError(
            f"{name} took {len(steps)} steps, of which {bench.warmup} are not counted: too few"
        )
    return Run(steps, peak if device.backend() == "cpu" else reported, bench.warmup)


def environment(*, preload: bool) -> dict[str, str]:
    """The same BLAS for all: Lathe loads it itself, mlx_lm has it loaded for it."""
    library = blas.find() if blas.is_needed() else None
    if library is None:
        return {}
    return {"MLX_DISABLE_COMPILE": "1", **({"LD_PRELOAD": blas.preloaded(library)} if preload else {})}


def lathe_steps(recipe: Path, adapter: Path) -> tuple[tuple[Step, ...], int, list[tuple[int, ...]]]:
    """(steps, peak as reported, each step's rows), with batches made again for their tokens and places."""
    flight = preflight.prepare(load_recipe(recipe))
    lines = [line for line in rows_of(adapter) if line["kind"] == "train"]
    rows = [flight.batch_at(line["iteration"] - 1).row_ids for line in lines]
    return (
        tuple(_lathe_step(line, flight) for line in lines),
        max(line["memory_bytes"] for line in lines),
        rows,
    )


def _lathe_step(line: dict[str, Any], flight: preflight.Preflight) -> Step:
    batch = flight.batch_at(line["iteration"] - 1)
    in_loop_s = batch.num_tokens / line["tokens_per_s"]
    compute_s = in_loop_s * (1 - line["overhead_frac"])
    return Step(line["time"], line["loss"], batch.num_tokens, batch.tokens.size, in_loop_s, compute_s)


def summarize(runs: Sequence[Run]) -> Summary:
    """Of a loop's runs, one a round."""
    first = runs[0]
    rates = tuple(each.data_tokens_per_s for each in runs)
    places = sum(step.places for step in first.steps)
    tokens = sum(step.data_tokens for step in first.steps)
    middle = Summary(
        data_tokens_per_s=median(rates),
        data_tokens_per_s_by_round=rates,
        peak_memory_bytes=max(each.peak_memory_bytes for each in runs),
        padding_frac=1 - tokens / places,
        data_tokens=tokens,
        steps=len(first.steps),
        seconds=median(each.seconds for each in runs),
        step_s=median(each.seconds / len(each.counted) for each in runs),
        loss_first=first.steps[0].loss,
        loss_last=first.steps[-1].loss,
    )
    outside = [step for each in runs for step in each.outside_s]
    if not outside:
        return middle
    return replace(middle, overhead_frac=sum(map(sum, outside)) / sum(each.seconds for each in runs))


def _overhead(bench: TrainBench, model: Path, template: ChatTemplate, folder: Path) -> Overhead:
    rows = folder / "short" / "train.jsonl"
    write_chats(rows, SHORT_STEPS, SHORT, template, bench.seed)
    changes = {"batch_size": 1, "iters": SHORT_STEPS, "steps_per_report": STEPS_PER_REPORT}
    name = "lathe_short"
    recipe = folder / f"{name}.yaml"
    adapter = folder / name
    written = {**_common(bench, model, rows.parent), **changes, "adapter_path": str(adapter)}
    recipe.write_text(yaml.safe_dump(written, sort_keys=False))
    command = [*PYTHON, "-m", "lathe", "train", str(recipe), "--overwrite"]
    run_child(name, command, folder / f"{name}.log", environment(preload=False))
    return overhead_of([line for line in rows_of(adapter) if line["kind"] == "train"])


def overhead_of(lines: Sequence[dict[str, Any]]) -> Overhead:
    """From the reports of a run, as metrics.jsonl has them; what came before the first is warm-up."""
    first, *counted = lines
    steps = lines[-1]["step"] - first["step"]
    elapsed_s = lines[-1]["time"] - first["time"]
    compute_s = sum(line["seconds"] * (1 - line["overhead_frac"]) for line in counted)
    outside_s = elapsed_s - compute_s
    return Overhead(steps, 1e3 * compute_s / steps, 1e3 * outside_s / steps, outside_s / elapsed_s)


def ratio(of: str, to: str, ours: Sequence[Run], theirs: Sequence[Run]) -> Ratio:
    """Of two loops' runs, round by round."""
    rates = [a.data_tokens_per_s / b.data_tokens_per_s for a, b in zip(ours, theirs, strict=True)]
    peaks = [max(run.peak_memory_bytes for run in runs) for runs in (ours, theirs)]
    return Ratio(of, to, median(rates), min(rates), max(rates), peaks[0] / peaks[1])


def tables(outcome: Outcome) -> Iterator[Table]:
    """The loops, a line each; then how they compare."""
    headings = ("data tok/s", "peak GB", "padding", "steps", "s/step", "loss")
    drawn = Table("loop", *numbers(*headings), title="one pass over the same chats")
    for name, each in outcome.summaries.items():
        drawn.add(
            name,
            f"{each.data_tokens_per_s:,.0f}",
            f"{each.peak_memory_bytes / 1e9:.2f}",
            f"{each.padding_frac:.0%}",
            str(each.steps),
            f"{each.step_s:.3g}",
            f"{each.loss_first:.1f} → {each.loss_last:.1f}",
        )
    yield drawn
    ratios = numbers("data tok/s (lowest, highest)", "peak")
    compared = Table("of / to", *ratios, title="median of rounds")
    for pair in outcome.ratios:
        compared.add(
            f"{pair.of} / {pair.to}",
            f"{pair.data_tokens_per_s:.2f} ({pair.lowest:.2f}, {pair.highest:.2f})",
            f"{pair.peak_memory:.2f}",
        )
    yield compared


def notes(outcome: Outcome) -> list[str]:
    """What a reader of the tables must know."""
    held = "resident set of the process" if outcome.backend == "cpu" else "mx.get_peak_memory"
    said = [f"peak memory: {held}; length_sorted: mlx_lm's loop with its sort by length repaired"]
    if PEER in outcome.summaries:
        said.append(
            f"{PEER}: mlx-lm-lora {installed('mlx-lm-lora')}, which draws each batch anew: no pass over all rows"
        )
    else:
        said.append(f"{PEER}: not measured, mlx-lm-lora is not installed (pip install mlx-lm-lora)")
    found = outcome.overhead
    said.append(
        f"Lathe's loop outside the updates: {found.outside_ms:.2f} ms a step, {found.frac:.2%} of the time of "
        f"{found.steps} updates of {found.step_ms:.0f} ms with a report every {STEPS_PER_REPORT}"
    )
    return said
