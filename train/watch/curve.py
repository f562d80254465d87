"""`learning_curve.png`: what a person asks of a run, over its steps, drawn from metrics.jsonl.

The whole history is drawn, a continued run's too. Knows no trainer; matplotlib is imported when something is drawn.
What is shown of which objective stands in `panels.py`.
"""

from __future__ import annotations

import io
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.errors import StorageError
from train.loop.whole import write_whole
from train.watch.metrics import rows_of
from train.watch.panels import Line, Panel, panels_of

FILE = "learning_curve.png"
WIDTH_INCHES, LARGE_INCHES, SMALL_INCHES, DOTS_PER_INCH = 9.0, 3.4, 1.9, 110
SMALL_A_ROW = 3
TITLE_LETTERS = 80
"""Of a line of the title; a long path goes on in the next."""
QUIET = "#6b6b6b"
SMOOTH_FROM_POINTS = 60
"""From this many points on, what is measured in training is drawn faintly, with its running mean on top."""
OPAQUE = 0.8
"""Of a legend, which may lie over lines: its words can be read, and the lines still be seen."""
MARKED_TO_POINTS = 40
"""Up to so many, each point of a curve is marked."""
LOGARITHMIC_FROM_RATIO = 20
"""Of the largest to the smallest: the first steps, or a spike, would press the rest flat."""
FEW_DECADES = 3
"""Of a logarithmic axis, up to which 2 and 5 are written between the powers of ten."""
FIRST_AFTER_S = 10.0
"""A run that is shorter is drawn once, at its end."""
REST_FACTOR = 50
"""Between two drawings of a running training, this many times as long as the last one took: 2 % of the time."""

Points = list[tuple[int, float]]


@dataclass
class History:
    """Points (step, value) of everything that metrics.jsonl holds, by kind of line and by name."""

    train: dict[str, Points] = field(default_factory=dict)
    valid: dict[str, Points] = field(default_factory=dict)

    @property
    def train_loss(self) -> Points:
        return self.train.get("loss", [])

    @property
    def valid_loss(self) -> Points:
        return self.valid.get("loss", [])

    @property
    def best(self) -> tuple[int, float] | None:
        """Of the validations after training began, the lowest loss; the first of equals."""
        trained = [point for point in self.valid_loss if point[0] > 0]
        return min(trained, key=lambda point: point[1], default=None)

    def highest(self, name: str) -> tuple[int, float] | None:
        """Of the validations after training began, the highest of a measure; the first of equals."""
        trained = [point for point in self.valid.get(name, []) if point[0] > 0]
        return max(trained, key=lambda point: point[1], default=None)


class LearningCurve:
    """The picture of one run's folder; drawn again when enough time has gone by since the last time.

    rates  the learning rate of each step, from the first on; empty: only where it was reported
    """

    def __init__(self, folder: Path, title: str, rates: Sequence[float] = ()) -> None:
        self._folder = folder
        self._title = title
        self._rates = rates
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
                content = picture(history, self._title, self._rates)
                write_whole(self._folder / FILE, content)
            except OSError as error:
                raise StorageError(f"{self._folder / FILE}: {error}") from error
        end_s = time.perf_counter()
        self._next_s = end_s + REST_FACTOR * (end_s - start_s)


def read(folder: Path) -> History:
    """The curves of a run's metrics.jsonl. Points that are no number (a loss that was not finite) are left out."""
    history = History()
    for row in rows_of(folder):
        kinds = {"train": history.train, "valid": history.valid}
        if row.get("kind") in kinds:
            _add(kinds[row["kind"]], row)
    return history


def _add(curves: dict[str, Points], row: dict[str, Any]) -> None:
    for name, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        if is_number and name not in ("step", "time"):
            curves.setdefault(name, []).append((row["step"], float(value)))


def picture(history: History, title: str, rates: Sequence[float] = ()) -> bytes:
    """A PNG of `figure_of`."""
    stream = io.BytesIO()
    figure_of(history, title, rates).savefig(stream, format="png")
    return stream.getvalue()


def figure_of(history: History, title: str, rates: Sequence[float] = ()) -> Any:
    """A matplotlib figure: what counts most above, the rest in small panels below."""
    # The object interface and no pyplot: no global state, no window system, safe on any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    large, *small = panels = panels_of(history.train, history.valid, rates)
    num_rows = -(-len(small) // SMALL_A_ROW)
    size = (WIDTH_INCHES, LARGE_INCHES + num_rows * SMALL_INCHES + 0.3)
    # The layout gives every label its room, however wide the numbers are.
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    shown = "\n".join(textwrap.wrap(title, TITLE_LETTERS))
    figure.suptitle(shown, fontsize=12, fontweight="bold", x=0.01, ha="left")
    ratios = (LARGE_INCHES, *[SMALL_INCHES] * num_rows)
    grid = figure.add_gridspec(1 + num_rows, SMALL_A_ROW, height_ratios=ratios)
    _draw(figure.add_subplot(grid[0, :]), large, is_large=True)
    for number, panel in enumerate(small):
        row, column = divmod(number, SMALL_A_ROW)
        axes = figure.add_subplot(grid[1 + row, column])
        _draw(axes, panel, is_large=False)
        if row == num_rows - 1 or number + SMALL_A_ROW >= len(small):
            axes.set_xlabel("step", fontsize=8.5, color=QUIET)
    # One range of steps, so that what happened at one time stands at one place in all panels.
    steps = [step for panel in panels for line in panel.lines for step, _ in line.points]
    first, last = min(steps), max(steps)
    margin = 0.02 * (last - first) or 0.5
    for axes in figure.axes:
        axes.set_xlim(first - margin, last + margin)
    return figure


def _draw(axes: Any, panel: Panel, *, is_large: bool) -> None:
    _plain(axes)
    axes.set_title(panel.title, fontsize=10 if is_large else 9, color=QUIET, loc="left")
    for line in panel.lines:
        _draw_line(axes, line, is_large=is_large)
    if panel.star is not None:
        (step, value), label = panel.star
        color = panel.lines[-1].color
        axes.axvline(step, color=color, linewidth=0.8, linestyle=":", zorder=0)
        axes.plot([step], [value], "*", color=color, markersize=11, markeredgecolor="white", label=label)
    _limit(axes, panel)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        size = 8.5 if is_large else 7.5
        axes.legend(fontsize=size, loc="best", facecolor="white", edgecolor="none", framealpha=OPAQUE)


def _draw_line(axes: Any, line: Line, *, is_large: bool) -> None:
    if not line.points:
        return
    steps, values = zip(*line.points, strict=True)
    width = 1.6 if is_large else 1.4
    is_crowded = line.is_noisy and len(values) >= SMOOTH_FROM_POINTS
    marker = "o" if len(values) <= MARKED_TO_POINTS and line.is_marked else None
    axes.plot(
        steps,
        values,
        color=line.color,
        linewidth=1.0 if is_crowded else width,
        alpha=0.3 if is_crowded else 1.0,
        linestyle=line.style,
        marker=marker,
        markersize=3.0,
        label=None if is_crowded else line.label,
    )
    if is_crowded:
        axes.plot(steps, running_mean(values), color=line.color, linewidth=width, label=line.label)
    if line.spread:
        low, high = ([v + sign * line.spread.get(s, 0.0) for s, v in line.points] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.color, alpha=0.12, linewidth=0)


def _limit(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [value for line in panel.lines for _, value in line.points]
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    elif panel.may_be_logarithmic and min(values) > 0 and max(values) / min(values) > LOGARITHMIC_FROM_RATIO:
        axes.set_yscale("log")
        axes.set_title(f"{panel.title}, on a logarithmic axis", fontsize=10, color=QUIET, loc="left")
        if max(values) / min(values) < 10**FEW_DECADES:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.from_zero and min(values) >= 0:
        axes.set_ylim(0, 1.08 * max(values) or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))


def written(value: float) -> str:
    """A number beside an axis, whole, with no power of ten above it: 0.25, 5e-4, 1.2e5."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    digits, exponent = f"{value:.5e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


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
