"""`lathe bench train --pictures`: Lathe and mlx-vlm's own trainer on one model with eyes and the same rows.

As in `compare`, every run is a process of its own with the same BLAS, and rounds go through the loops in turn. Beside
rates and memory stand losses: each loop's own of its first step, which no weight has moved yet, and what a forward
that sees no later token says of the same rows; and what that says of all rows after each loop's training. The second
model's layers take whatever mask they are given in place of their own, and mlx-vlm's trainer gives one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from serve import device
from serve.bench import standin
from serve.errors import StoppedError
from serve.tables import Table, numbers
from train.bench import sighted
from train.bench.compare import (
    MLX_VLM_CHILD,
    PYTHON,
    Ratio,
    Run,
    Step,
    Summary,
    check_counts,
    environment,
    installed,
    lathe_steps,
    ratio,
    summarize,
)
from train.bench.pictures import Pictures, write_rows
from train.bench.process import Clock, run_child

LATHE, THEIRS, PREPARED = "lathe", "mlx_vlm", "mlx_vlm_prepared"
LOOPS = (LATHE, THEIRS, PREPARED)
"""Lathe as it comes; mlx_vlm's Trainer as it comes; the same with rows decoded and tokenized before step 1."""
RATIOS = ((LATHE, THEIRS), (LATHE, PREPARED))
TIMED, MASKED = "qwen2_5_vl", "smolvlm"
"""The model that is timed, and the one whose losses alone are compared: with it mlx-vlm's trainer stops at batches of
more than one row."""
PACKAGES = ("mlx", "mlx-vlm", "mlx-lathe")
MASKED_STEPS = 12


@dataclass(frozen=True)
class SightedBench:
    """What to measure, the same for every loop. `num_batches` of `batch_size` rows are one pass."""

    num_batches: int = 12
    batch_size: int = 8
    rounds: int = 1
    warmup: int = 1
    """Steps at the start that are in no rate."""
    size: standin.Size = field(default_factory=lambda: replace(standin.SMALLEST, vocabulary=32768))
    tower: sighted.Tower = sighted.MIDDLE
    pictures: Pictures = field(default_factory=Pictures)
    masked_steps: int = MASKED_STEPS
    seed: int = 0

    def check(self) -> None:
        """ConfigError if there would be nothing to measure."""
        check_counts(self.num_batches, self.batch_size, self.rounds, self.warmup)


@dataclass(frozen=True)
class Losses:
    """Of one loop on one model, in nats a target.

    first            its own, of its first step
    first_reference  of the same rows by the same weights, no later token seen
    last_reference   of all rows after its training, likewise
    """

    first: float
    first_reference: float
    last_reference: float


@dataclass(frozen=True)
class SightedOutcome:
    """Everything `lathe bench train --pictures` shows."""

    summaries: dict[str, Summary]
    ratios: list[Ratio]
    tokens_per_cpu_s: dict[str, float | None]
    """By loop: data tokens a second of its process's CPU time, which does not count who else uses the machine; the
    median of the rounds. None where the kernel does not say."""
    losses: dict[str, dict[str, Losses]]
    """By model, then by loop."""
    before: dict[str, float]
    """By model: loss of all rows before any training, by the reference."""
    backend: str

    def as_json(self, bench: SightedBench) -> dict[str, Any]:
        """The loops stand at the top, by name."""
        losses = {
            model: {loop: asdict(each) for loop, each in loops.items()}
            for model, loops in self.losses.items()
        }
        return {
            **{
                name: {**asdict(each), "data_tokens_per_cpu_s": self.tokens_per_cpu_s[name]}
                for name, each in self.summaries.items()
            },
            "losses": losses,
            "loss_before": self.before,
            "ratios": [asdict(each) for each in self.ratios],
            "settings": asdict(bench),
            "machine": asdict(device.describe()),
            "versions": {name: version for name in PACKAGES if (version := installed(name)) is not None},
        }


def run(bench: SightedBench, folder: Path, progress: Callable[[str], None]) -> SightedOutcome:
    """Write models and rows into `folder`, then run every loop `rounds` times.

    ConfigError on bad settings, before anything runs; StoppedError if a child process fails.
    """
    bench.check()
    timed = _Case.write(TIMED, bench, bench.num_batches, bench.batch_size, folder, progress)
    runs: dict[str, list[Run]] = {name: [] for name in LOOPS}
    rates: dict[str, list[float | None]] = {name: [] for name in LOOPS}
    firsts: dict[str, dict[str, _First]] = {TIMED: {}, MASKED: {}}
    for number in range(bench.rounds):
        for name in LOOPS:
            progress(f"round {number + 1} of {bench.rounds}: {name}")
            found, firsts[TIMED][name], clock = timed.train(name, bench.warmup)
            runs[name].append(found)
            rates[name].append(tokens_per_cpu_s(found, clock))
            progress(f"{name}: {found.data_tokens_per_s:,.0f} data tokens/s")
    masked = _Case.write(MASKED, bench, bench.masked_steps, 1, folder, progress)
    for name in (LATHE, THEIRS):
        progress(f"{MASKED}, for its losses: {name}")
        _, firsts[MASKED][name], _ = masked.train(name, 0)
    losses: dict[str, dict[str, Losses]] = {}
    before: dict[str, float] = {}
    for case in (timed, masked):
        progress(f"{case.family}: losses by the reference")
        losses[case.family], before[case.family] = case.losses(firsts[case.family])
    return SightedOutcome(
        {name: summarize(each) for name, each in runs.items()},
        [ratio(of, to, runs[of], runs[to]) for of, to in RATIOS],
        {name: _median(each) for name, each in rates.items()},
        losses,
        before,
        device.backend(),
    )


@dataclass(frozen=True)
class _First:
    """A loop's first step: its own loss, and the rows it was of."""

    loss: float
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Case:
    """One model with its rows, and a recipe for each loop."""

    family: str
    folder: Path
    recipes: Mapping[str, Path]

    @classmethod
    def write(
        cls,
        family: str,
        bench: SightedBench,
        num_batches: int,
        batch_size: int,
        folder: Path,
        progress: Callable[[str], None],
    ) -> _Case:
        """The model, its rows and recipes, in a folder of its own."""
        own = folder / family
        progress(f"writing a random {family}")
        dtype = mx.float32 if device.backend() == "cpu" else mx.bfloat16
        sighted.write_model(family, own / "model", dtype, bench.size, bench.tower, bench.seed)
        mx.clear_cache()
        rows = own / "data" / "train.jsonl"
        write_rows(rows, num_batches * batch_size, bench.pictures, bench.seed)
        recipes = {}
        for name in LOOPS:
            recipes[name] = own / f"{name}.yaml"
            said = _recipe(bench, own, rows, num_batches, batch_size) | {"adapter_path": str(own / name)}
            recipes[name].write_text(yaml.safe_dump(said, sort_keys=False))
        return cls(family, own, recipes)

    def train(self, name: str, warmup: int) -> tuple[Run, _First, Clock]:
        """One pass of a loop over the rows, with its process's clock."""
        log, recipe = self.folder / f"{name}.log", self.recipes[name]
        clock: Clock = []
        if name == LATHE:
            command = [*PYTHON, "-m", "lathe", "train", str(recipe), "--overwrite"]
            peak = run_child(name, command, log, environment(preload=False), clock)
            steps, reported, rows = lathe_steps(recipe, self.folder / name)
        else:
            how = "prepared" if name == PREPARED else "as_is"
            found = self._child("train", name, recipe, how, clock=clock)
            peak, reported = found["peak_resident_bytes"], found["peak_memory_bytes"]
            rows = [step.pop("rows") for step in found["steps"]]
            steps = tuple(Step(**each) for each in found["steps"])
        if len(steps) <= warmup:
            raise StoppedError(f"{name} took {len(steps)} steps, of which {warmup} are not counted: too few")
        held = peak if device.backend() == "cpu" else reported
        return Run(steps, held, warmup), _First(steps[0].loss, tuple(rows[0])), clock

    def losses(self, firsts: Mapping[str, _First]) -> tuple[dict[str, Losses], float]:
        """(of each loop, of all rows before any training)."""
        base = self._reference(None)
        found = {}
        for name, first in firsts.items():
            after = self._reference(self.folder / name)
            found[name] = Losses(first.loss, _mean(base[list(first.rows)]), _mean(after))
        return found, _mean(base)

    def _reference(self, adapter: Path | None) -> np.ndarray:
        """[rows, 3]: sum of losses, targets and tokens of each row."""
        more = [] if adapter is None else [str(adapter)]
        return np.array(self._child("reference", "reference", self.recipes[THEIRS], *more)["rows"])

    def _child(
        self, mode: str, name: str, recipe: Path, *more: str, clock: Clock | None = None
    ) -> dict[str, Any]:
        out = self.folder / f"{name}.json"
        command = [*PYTHON, str(MLX_VLM_CHILD), mode, str(recipe), str(out), *more]
        peak = run_child(name, command, self.folder / f"{name}.log", environment(preload=True), clock)
        return {**json.loads(out.read_text()), "peak_resident_bytes": peak}


def tokens_per_cpu_s(run: Run, clock: Clock) -> float | None:
    """Of the counted steps. None where there was no clock, or steps too short for it."""
    if not clock:
        return None
    times, used = zip(*clock, strict=True)
    start_s, stop_s = np.interp([run.steps[run.warmup - 1].time, run.steps[-1].time], times, used)
    tokens = sum(step.data_tokens for step in run.counted)
    return tokens / float(stop_s - start_s) if stop_s > start_s else None


def _median(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return median(known) if known else None


def _mean(rows: np.ndarray) -> float:
    losses, targets, _ = rows.sum(0)
    return float(losses / targets)


def _recipe(
    bench: SightedBench, folder: Path, rows: Path, num_batches: int, batch_size: int
) -> dict[str, Any]:
    """What all loops are told: the language part's linear layers, in every block."""
    return {
        "model": str(folder / "model"),
        "datasets": [{"path": str(rows), "type": "chat"}],
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": "all-linear"},
        "num_layers": -1,
        "batch_size": batch_size,
        "iters": num_batches,
        "optimizer": "adam",
        "learning_rate": 1e-4,
        "max_seq_length": 2048,
        "val_batches": 0,
        "steps_per_report": 1,
        "save_every": 10**6,
        "seed": bench.seed,
    }


def tables(outcome: SightedOutcome) -> Iterator[Table]:
    """The loops, a line each; how they compare; their losses."""
    headings = ("data tok/s", "data tok/CPU s", "peak GB", "padding", "steps", "s/step")
    drawn = Table("loop", *numbers(*headings), title=f"one pass over the same pictures, {TIMED}")
    for name, each in outcome.summaries.items():
        drawn.add(
            name,
            f"{each.data_tokens_per_s:,.0f}",
            f"{rate:,.0f}" if (rate := outcome.tokens_per_cpu_s[name]) is not None else "-",
            f"{each.peak_memory_bytes / 1e9:.2f}",
            f"{each.padding_frac:.0%}",
            str(each.steps),
            f"{each.step_s:.3g}",
        )
    yield drawn
    compared = Table("of / to", *numbers("data tok/s (lowest, highest)", "peak"), title="median of rounds")
    for pair in outcome.ratios:
        compared.add(
            f"{pair.of} / {pair.to}",
            f"{pair.data_tokens_per_s:.2f} ({pair.lowest:.2f}, {pair.highest:.2f})",
            f"{pair.peak_memory:.2f}",
        )
    yield compared
    said_of = ("of step 1, its own", "by the reference", "of all rows, before", "after")
    said = Table("model, loop", *numbers(*said_of), title="losses; those of all rows by the reference")
    for model, loops in outcome.losses.items():
        for name, loss in loops.items():
            said.add(
                f"{model}, {name}",
                f"{loss.first:.4f}",
                f"{loss.first_reference:.4f}",
                f"{outcome.before[model]:.3f}",
                f"{loss.last_reference:.3f}",
            )
    yield said


def notes(outcome: SightedOutcome) -> list[str]:
    """What a reader of the tables must know."""
    held = "resident set of the process" if outcome.backend == "cpu" else "mx.get_peak_memory"
    return [
        f"peak memory: {held}; {PREPARED}: rows decoded and tokenized before its first step",
        f"reference: each row alone through its embeddings, no later token seen; {MASKED} with one row a batch, for "
        f"mlx-vlm's trainer takes no more there",
    ]
