"""`learning_curve.png`: a run's losses, rate and gradient norm over its steps, drawn from metrics.jsonl.

The whole history is drawn, a continued run's too. Knows no trainer; matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.errors import StorageError
from train.loop import checkpoint
from train.watch.metrics import rows_of

FILE = "learning_curve.png"
SIZE_INCHES, DOTS_PER_INCH = (8.0, 5.6), 110
TRAIN, VALID, RATE, NORM, QUIET = "#4c78a8", "#e45756", "#54a24b", "#b279a2", "#6b6b6b"
SMOOTH_FROM_POINTS = 60
"""From this many points on, the training loss is drawn faintly, with its running mean on top."""
FIRST_AFTER_S = 10.0
"""A run that is shorter is drawn once, at its end."""
REST_FACTOR = 50
"""Between two drawings of a running training, this many times as long as the last one took: 2 % of the time."""


@dataclass
class History:
    """Points (step, value) of a run's curves."""

    train_loss: list[tuple[int, float]] = field(default_factory=list)
    valid_loss: list[tuple[int, float]] = field(default_factory=list)
    learning_rate: list[tuple[int, float]] = field(default_factory=list)
    grad_norm: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float] | None:
        """Of the validations after training began, the lowest; the first of equals."""
        trained = [point for point in self.valid_loss if point[0] > 0]
        return min(trained, key=lambda point: point[1], default=None)


class LearningCurve:
    """The picture of one run's folder; drawn again when enough time has gone by since the last time."""

    def __init__(self, folder: Path, title: str) -> None:
        self._folder = folder
        self._title = title
        self._next_s = time.perf_counter() + FIRST_AFTER_S

    def refresh(self) -> None:
        """Draw, unless that was done a moment ago."""
        if time.perf_counter() >= self._next_s:
            self.draw()

    def draw(self) -> None:
        """Draw what metrics.jsonl holds by now; nothing while it holds no loss."""
        start_s = time.perf_counter()
        history = read(self._folder)
        if history.train_loss or history.valid_loss:
            try:
                checkpoint.write_whole(self._folder / FILE, picture(history, self._title))
            except OSError as error:
                raise StorageError(f"{self._folder / FILE}: {error}") from error
        end_s = time.perf_counter()
        self._next_s = end_s + REST_FACTOR * (end_s - start_s)


def read(folder: Path) -> History:
    """The curves of a run's metrics.jsonl. Points that are no number (a loss that was not finite) are left out."""
    history = History()
    for row in rows_of(folder):
        if row.get("kind") == "train":
            _add(history.train_loss, row, "loss")
            _add(history.learning_rate, row, "learning_rate")
            _add(history.grad_norm, row, "grad_norm")
        elif row.get("kind") == "valid":
            _add(history.valid_loss, row, "loss")
    return history


def _add(points: list[tuple[int, float]], row: dict[str, Any], name: str) -> None:
    value = row.get(name)
    if isinstance(value, int | float) and value == value:
        points.append((row["step"], float(value)))


def picture(history: History, title: str) -> bytes:
    """A PNG: losses above, learning rate and gradient norm below."""
    # The object interface and no pyplot: no global state, no window system, safe on any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), hspace=0.32, wspace=0.22)
    figure.subplots_adjust(left=0.085, right=0.975, top=0.915, bottom=0.085)
    figure.text(0.085, 0.955, title, fontsize=12, fontweight="bold", va="center")
    _draw_losses(figure.add_subplot(grid[0, :]), history)
    _draw_small(figure.add_subplot(grid[1, 0]), history.learning_rate, "learning rate", RATE)
    _draw_small(figure.add_subplot(grid[1, 1]), history.grad_norm, "gradient norm", NORM)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw_losses(axes: Any, history: History) -> None:
    _plain(axes)
    axes.set_ylabel("loss", fontsize=9, color=QUIET)
    if history.train_loss:
        steps, values = zip(*history.train_loss, strict=True)
        crowded = len(values) >= SMOOTH_FROM_POINTS
        axes.plot(steps, values, color=TRAIN, linewidth=1.2, alpha=0.3 if crowded else 1.0, label="training")
        if crowded:
            axes.plot(steps, running_mean(values), color=TRAIN, linewidth=1.6, label="training, running mean")
    if history.valid_loss:
        steps, values = zip(*history.valid_loss, strict=True)
        marker = "o" if len(steps) <= 40 else None
        axes.plot(
            steps, values, color=VALID, linewidth=1.6, marker=marker, markersize=3.5, label="validation"
        )
    _limit(axes, history)
    if history.best is not None:
        step, loss = history.best
        axes.axvline(step, color=VALID, linewidth=0.8, linestyle=":", zorder=0)
        label = f"best validation: {loss:.4g} at step {step:,}"
        axes.plot([step], [loss], "*", color=VALID, markersize=11, markeredgecolor="white", label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, loc="upper right")


def _limit(axes: Any, history: History) -> None:
    """A few outliers (the first steps, a spike) must not press the rest flat: logarithmic where that helps."""
    values = [value for _, value in [*history.train_loss, *history.valid_loss]]
    if min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)


def _draw_small(axes: Any, points: Sequence[tuple[int, float]], title: str, color: str) -> None:
    _plain(axes)
    axes.set_title(title, fontsize=8.5, color=QUIET, loc="left", pad=10)
    axes.set_xlabel("step", fontsize=8.5, color=QUIET)
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=color, linewidth=1.4)
        axes.set_ylim(0, 1.08 * max(values) or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set_fontsize(7)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bdbdbd")
    axes.tick_params(labelsize=8, colors=QUIET)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)


def running_mean(values: Sequence[float]) -> list[float]:
    """Each value's mean with those before it, weights falling by half over a twentieth of the points."""
    keep = 0.5 ** (1 / max(len(values) / 20, 1))
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = total * keep + value, weight * keep + 1
        means.append(total / weight)
    return means
