"""What a trainer tells, written down: to the console and to metrics; and checkpoints, saved when it asks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from train.loop.keeper import Keeper
from train.loop.step import Evaluation
from train.loop.trainer import Nonfinite, Report, TrainState
from train.watch.curve import LearningCurve
from train.watch.metrics import MetricsLog
from train.watch.progress import RunProgress
from train.watch.samples import Sample

PROMPT_WIDTH, ANSWER_WIDTH = 40, 100
"""Characters of a sample on the console."""
DONE = {
    "stop": "the run ends",
    "skip": "the step is skipped",
    "rollback": "going on from the last checkpoint's weights",
}


class Journal:
    """The observer of one Trainer. Decides nothing about when.

    shown    what of a validation is told first: its loss, or a measure that the objective is judged by
    samples  answers of the weights as they are, for a person to read
    told     called with the folder of each checkpoint, once it is published
    notes    what else a person should know since the last time they were asked for
    """

    def __init__(
        self,
        keeper: Keeper,
        metrics: MetricsLog,
        progress: RunProgress,
        curve: LearningCurve,
        *,
        shown: str = "loss",
        samples: Callable[[], Sequence[Sample]] = tuple,
        told: Callable[[Path], None] = lambda folder: None,
        notes: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.keeper = keeper
        self.progress = progress
        self.curve = curve
        self._metrics = metrics
        self._shown = shown
        self._samples = samples
        self._told = told
        self._notes = notes

    def say(self, text: str) -> None:
        """A line to the console."""
        self.progress.say(text)

    def on_report(self, report: Report) -> None:
        """A line of progress, and what a stream left out since the last one."""
        self.progress.report(report)
        for note in self._notes():
            self.progress.say(note, style="yellow")
        values = dataclasses.asdict(report)
        self._metrics.write("train", values.pop("step"), **values.pop("measures"), **values)

    def on_eval(self, step: int, evaluation: Evaluation, is_best: bool, seconds: float) -> None:
        """A validation loss, and what was measured beside it; samples; the learning curve."""
        best = " (best)" if is_best else ""
        others = dict(evaluation.measures)
        shown = self._shown if self._shown in others else "loss"
        value = others.pop(shown, evaluation.loss)
        measures = "".join(f"  {name} {value:.4g}" for name, value in others.items())
        self.progress.say(f"step {step}: validation {shown} {value:.4f}{measures}{best}, {seconds:.1f} s")
        self._metrics.write("valid", step, loss=evaluation.loss, seconds=seconds, **evaluation.measures)
        for number, sample in enumerate(self._samples()):
            self._show(step, number, sample)
        self.curve.refresh()

    def on_nonfinite(self, event: Nonfinite) -> None:
        """A step that was not applied, with the rows to look at."""
        self.progress.say(
            f"step {event.step}: {event.what} on {event.rows}; {DONE[event.action]}", style="yellow"
        )
        self._metrics.write("nonfinite", **dataclasses.asdict(event))

    def on_rollback(self) -> None:
        """The last checkpoint's weights and optimizer, in place of those at hand."""
        self.keeper.roll_back()

    def on_save(self, state: TrainState) -> None:
        """Publish a checkpoint, and say where it is."""
        self._told(self.keeper.save(state, self._metrics.position()))

    def _show(self, step: int, number: int, sample: Sample) -> None:
        """The beginning of an answer to the console, the whole to metrics."""
        self._metrics.write_sample(step, number, sample.prompt, sample.answer)
        line = f"  {brief(sample.prompt, PROMPT_WIDTH)} → {brief(sample.answer, ANSWER_WIDTH)}"
        self.progress.say(line, style="dim")


def brief(text: str, width: int) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
