"""What benchmarks measured, as a PNG: rounds and ratios in, a picture out. Knows no server.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.bench.compare import Outcome as Compared
from serve.bench.compare import Ratio
from serve.bench.load import Round
from serve.bench.summary import Summary
from serve.errors import StorageError

DOTS_PER_INCH = 110
WIDTH_INCHES = 11.0
QUIET = "#6b6b6b"
COLORS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f2a33a", "#72b7b2", "#9d755d", "#bab0ac", "#333333")
UNDER_WAY_POINTS = 400


def save(figure: Any, path: Path) -> None:
    """Write the picture. Raises StorageError."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.getvalue())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error


def served(title: str, rounds: Sequence[Round], summaries: Sequence[Summary]) -> Any:
    """A figure of `lathe bench serve`: rates by level; how first tokens, gaps and times per token spread; how many
    requests were under way."""
    figure, axes = _figure(title, 2, 3)
    labels = [_level(each) for each in rounds]
    _rates(axes[0], labels, summaries)
    good = [[answer for answer in each.answers if answer.error is None] for each in rounds]
    _spreads(
        axes[1],
        "time to first token, ms",
        labels,
        [[1e3 * each.first_s for each in answers if each.first_s is not None] for answers in good],
    )
    _spreads(
        axes[2],
        "time per token of an answer, ms",
        labels,
        [[1e3 * each.tpot_s for each in answers if each.tpot_s is not None] for answers in good],
    )
    _spreads(
        axes[3],
        "inter-token gaps, ms",
        labels,
        [[1e3 * gap for each in answers for gap in each.gaps_s] for answers in good],
        of_longer=True,
    )
    _under_way(axes[4], labels, rounds)
    _lengths(axes[5], rounds)
    return figure


def compared(title: str, outcome: Compared) -> Any:
    """A figure of `lathe bench compare`: throughput and longest gaps by number of clients; the ratios asked for."""
    figure, axes = _figure(title, 2, 2)
    labels = list(dict.fromkeys(each.label for each in outcome.summaries))
    colors = {label: COLORS[number % len(COLORS)] for number, label in enumerate(labels)}
    panels = (
        (axes[0], "tokens a second", lambda each: each.tokens_per_s),
        (axes[1], "longest inter-token gap, ms", lambda each: _longest_ms(each)),
    )
    for panel, name, value_of in panels:
        panel.set_title(name, fontsize=10, color=QUIET, loc="left")
        for label in labels:
            points = [(each.concurrency, value_of(each)) for each in outcome.summaries if each.label == label]
            _line(panel, [point for point in points if point[1] is not None], colors[label], label)
        _by_clients(panel, {each.concurrency for each in outcome.summaries})
    speeds = [each for each in outcome.ratios if each.what == "tokens a second"]
    adapted = [each for each in speeds if each.of.startswith("lathe, ")]
    _ratios(
        axes[2], "base alone, over others: tokens a second", [each for each in speeds if each not in adapted]
    )
    _ratios(axes[3], "adapters, over the base alone: tokens a second", adapted)
    axes[0].legend(fontsize=7.5, frameon=False)
    return figure


def _longest_ms(summary: Summary) -> float | None:
    gaps = [gap for gap in summary.longest_gap_s_by_round if gap is not None]
    return 1e3 * float(np.median(gaps)) if gaps else None


def _figure(title: str, num_rows: int, num_columns: int) -> tuple[Any, list[Any]]:
    # The object interface and no pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (WIDTH_INCHES, 0.4 + 3.2 * num_rows)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    axes = [figure.add_subplot(num_rows, num_columns, 1 + number) for number in range(num_rows * num_columns)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
        each.grid(alpha=0.25)
    return figure, axes


def _level(each: Round) -> str:
    if each.request_rate is None:
        return f"{each.concurrency} client{'s' if each.concurrency > 1 else ''}"
    return "burst" if np.isinf(each.request_rate) else f"{each.request_rate:g}/s"


def _rates(axes: Any, labels: Sequence[str], summaries: Sequence[Summary]) -> None:
    places = np.arange(len(labels))
    axes.set_title("tokens a second", fontsize=10, color=QUIET, loc="left")
    bars = axes.bar(places, [each.tokens_per_s for each in summaries], color=COLORS[0], width=0.6)
    axes.bar_label(bars, fmt="%.0f", fontsize=8)
    words = [
        label if each.goodput is None else f"{label}\n{each.goodput.share:.0%} good"
        for label, each in zip(labels, summaries, strict=True)
    ]
    axes.set_xticks(places, words, fontsize=8)
    axes.margins(y=0.15)


def _spreads(
    axes: Any,
    title: str,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    of_longer: bool = False,
) -> None:
    """The share of values that are at most so large, a line each; `of_longer`: instead the share that is larger, on a
    logarithmic axis, where what is rare is what counts."""
    title = f"share of {title.replace(', ms', ' that are longer, ms')}" if of_longer else title
    axes.set_title(title, fontsize=10, color=QUIET, loc="left")
    for number, (label, each) in enumerate(zip(labels, values, strict=True)):
        if each:
            x = np.sort(np.asarray([min(each), *each]))
            share = np.arange(len(x)) / len(each)
            y = np.maximum(1 - share, 1 / len(x)) if of_longer else share
            axes.step(x, y, where="post", color=COLORS[number % len(COLORS)], linewidth=1.4, label=label)
    if any(values):
        axes.set_xscale("log")
        longest, shortest = (end(end(each) for each in values if each) for end in (max, min))
        # Two pieces that are read at once are microseconds apart: nobody looks there.
        axes.set_xlim(left=max(longest / 1000, 0.9 * shortest))
        _plain_numbers(axes.xaxis)
        axes.legend(fontsize=7.5, frameon=False)
    if of_longer:
        axes.set_yscale("log")


def _under_way(axes: Any, labels: Sequence[str], rounds: Sequence[Round]) -> None:
    axes.set_title("requests under way, by seconds", fontsize=10, color=QUIET, loc="left")
    for number, (label, each) in enumerate(zip(labels, rounds, strict=True)):
        spans = [(a.start_s, a.start_s + a.last_s) for a in each.answers if a.last_s is not None]
        if not spans:
            continue
        starts, ends = (np.sort(np.asarray(side)) for side in zip(*spans, strict=True))
        times = np.linspace(starts[0], ends[-1], UNDER_WAY_POINTS)
        count = np.searchsorted(starts, times, "right") - np.searchsorted(ends, times, "right")
        axes.plot(times - starts[0], count, color=COLORS[number % len(COLORS)], linewidth=1.2, label=label)
    axes.set_ylim(bottom=0)


def _lengths(axes: Any, rounds: Sequence[Round]) -> None:
    axes.set_title("lengths in tokens, all levels", fontsize=10, color=QUIET, loc="left")
    answers = [answer for each in rounds for answer in each.answers if answer.error is None]
    kinds = {
        "prompts": [answer.num_prompt_tokens for answer in answers if answer.num_prompt_tokens],
        "answers": [answer.num_tokens for answer in answers if answer.num_tokens],
    }
    longest = max((max(values) for values in kinds.values() if values), default=1)
    for number, (name, values) in enumerate(kinds.items()):
        if values:
            axes.hist(values, bins=24, range=(0, longest), alpha=0.6, color=COLORS[number], label=name)
    if answers:
        axes.legend(fontsize=7.5, frameon=False)


def _ratios(axes: Any, title: str, ratios: Sequence[Ratio]) -> None:
    """Medians with their extremes; what is asked as a dotted line of the same colour."""
    axes.set_title(title, fontsize=10, color=QUIET, loc="left")
    pairs = list(dict.fromkeys((each.of, each.to) for each in ratios))
    for number, (of, to) in enumerate(pairs):
        color = COLORS[number % len(COLORS)]
        found = [each for each in ratios if (each.of, each.to) == (of, to)]
        label = f"over {to}" if of == "lathe" else of.removeprefix("lathe, ")
        levels = [each.concurrency for each in found]
        _line(axes, [(each.concurrency, each.median) for each in found], color, label)
        axes.fill_between(levels, [e.min for e in found], [e.max for e in found], color=color, alpha=0.12)
        asked = [(each.concurrency, each.asked) for each in found if each.asked is not None]
        if asked:
            axes.plot(*zip(*asked, strict=True), color=color, linewidth=0.8, linestyle=":")
    axes.axhline(1.0, color=QUIET, linewidth=0.8)
    _by_clients(axes, {each.concurrency for each in ratios})
    if pairs:
        axes.legend(fontsize=7.5, frameon=False)


def _line(axes: Any, points: Iterable[tuple[float, float | None]], color: str, label: str) -> None:
    known = list(points)
    if known:
        axes.plot(
            *zip(*known, strict=True), color=color, linewidth=1.5, marker="o", markersize=3.5, label=label
        )


def _by_clients(axes: Any, levels: Iterable[int]) -> None:
    from matplotlib.ticker import NullLocator

    shown = sorted(set(levels))
    if not shown:
        return
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(level) for level in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("clients", fontsize=8.5, color=QUIET)


def _plain_numbers(axis: Any) -> None:
    """20, 50, 100 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
