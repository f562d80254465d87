"""What a person sees of a run: one live line on a terminal, plain lines elsewhere. Prints; measures nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from train.loop.trainer import Report


class RunProgress:
    """Use in `with`; between, tell it of reports and events."""

    def __init__(self, console: Console, num_iterations: int, start: int = 0) -> None:
        self._console = console
        self._num_iterations = num_iterations
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=num_iterations, completed=start, numbers="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def report(self, report: Report) -> None:
        """A new line of numbers."""
        numbers = numbers_of(report)
        self._bar.update(self._task, completed=report.iteration, numbers=numbers)
        if not self._console.is_terminal:
            place = f"iter {report.iteration}/{self._num_iterations}"
            self.say(f"{place}  step {report.step}  {numbers}  ETA {duration(report.eta_s)}")

    def say(self, text: str, style: str | None = None) -> None:
        """A line that stays, above the live one."""
        self._bar.console.print(text, style=style, highlight=False, soft_wrap=True)


def numbers_of(report: Report) -> str:
    """`loss 0.412  lr 1.0e-04  |g| 0.31  8,310 targets/s  21,034 tok/s  pad 4%  1.24 GB`, then measures."""
    return (
        f"loss {report.loss:.4f}  lr {report.learning_rate:.2e}  |g| {report.grad_norm:.2f}  "
        f"{report.targets_per_s:,.0f} targets/s  {report.tokens_per_s:,.0f} tok/s  "
        f"pad {report.padding_frac:.0%}  {report.memory_bytes / 1e9:.2f} GB"
        + "".join(f"  {name} {value:.4g}" for name, value in report.measures.items())
    )


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
