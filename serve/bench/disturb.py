"""How long running streams stand still while an adapter is loaded, replaced and unloaded beside them.

One engine on its own thread, as in a server, whose rows stream without end; this thread loads. A gap is counted in
steps: over the median of the same streams' gaps just before. By the wall, and in the CPU time of this process without
what this thread itself takes to read files, which on a free core nobody waits for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from serve.adapters.versions.version import AdapterVersion
from serve.bench.finding import Finding
from serve.engine.engine import Engine
from serve.engine.request import Event, Request, Sampling
from serve.engine.worker import Worker
from serve.errors import StoppedError
from serve.model.prompt import Prompt

ASKED_STEPS = 2.0
WAIT_S = 120.0
"""For a few steps of running streams; longer and something is broken."""
KINDS = ("loading", "replacing", "unloading")


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    num_rows: int = 16
    rounds: int = 5
    quiet_steps: int = 24
    """Before each disturbance, to know how long a step is."""
    steps_after: int = 4
    """What a disturbance left to be done is done in them."""


class Tick(NamedTuple):
    """When a token came. Seconds of clocks that begin anywhere."""

    wall_s: float
    cpu_s: float


@dataclass
class Gaps:
    """Of one kind of disturbance, an entry each time: the longest gap in steps, and how long it all took."""

    wall_steps: list[float] = field(default_factory=list)
    cpu_steps: list[float] = field(default_factory=list)
    quiet_steps: list[float] = field(default_factory=list)
    """The longest gap of the quiet stretch before it, by the wall."""
    step_ms: list[float] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)


class Streams:
    """Rows that stream, and when each of their tokens came."""

    def __init__(self, num_rows: int, cpu_s: Callable[[], float]) -> None:
        self._cpu_s = cpu_s
        self._ticks: list[list[Tick]] = [[] for _ in range(num_rows)]
        self._changed = threading.Condition()
        self._error: str | None = None

    def sink(self, row: int) -> Callable[[Event], None]:
        """What the worker tells of that row's tokens."""

        def take(event: Event) -> None:
            with self._changed:
                if event.token_ids:
                    self._ticks[row].append(Tick(time.perf_counter(), self._cpu_s()))
                if event.finish not in (None, "cancelled"):
                    self._error = f"row {row} has ended: {event.error or event.finish}"
                self._changed.notify_all()

        return take

    def wait(self, num_steps: int) -> None:
        """Until every row has had so many tokens more. Raises StoppedError if one ends instead."""
        with self._changed:
            wanted = [len(ticks) + num_steps for ticks in self._ticks]

            def is_there() -> bool:
                return self._error is not None or all(
                    len(ticks) >= count for ticks, count in zip(self._ticks, wanted, strict=True)
                )

            if not self._changed.wait_for(is_there, WAIT_S):
                raise StoppedError(f"{num_steps} decode steps took more than {WAIT_S:.0f} s")
            if self._error is not None:
                raise StoppedError(self._error)

    def gaps(self, since_s: float, until_s: float) -> list[Tick]:
        """Between tokens of one row, of all rows: those that touch the time between the two moments."""
        with self._changed:
            return [
                Tick(later.wall_s - earlier.wall_s, later.cpu_s - earlier.cpu_s)
                for ticks in self._ticks
                for earlier, later in pairwise(ticks)
                if later.wall_s > since_s and earlier.wall_s < until_s
            ]


def run(
    setting: Setting,
    engine: Engine,
    adapters: Sequence[str],
    news: Mapping[str, Path],
    progress: Callable[[str], None],
) -> list[Finding]:
    """`engine`, which nobody runs yet, streams rows of `adapters` in turn; `news` are loaded beside them, round by
    round: one, then another in its place, then none. Its worker is stopped afterwards."""
    found = {kind: Gaps() for kind in KINDS}
    with _streaming(setting, engine, adapters) as streams:
        registry, paths = engine.registry, list(news.values())
        for number in range(setting.rounds):
            progress(f"loading beside {setting.num_rows} streams: round {number + 1} of {setting.rounds}")
            one, other = paths[2 * number % len(paths)], paths[(2 * number + 1) % len(paths)]
            deeds: Mapping[str, Callable[[], object]] = {
                "loading": partial(registry.load, "news", one),
                "replacing": partial(registry.load, "news", other, replace=True),
                "unloading": partial(registry.unload, "news"),
            }
            for kind, deed in deeds.items():
                _disturb(setting, streams, deed, found[kind])
    return [finding for kind, gaps in found.items() for finding in _findings(setting, kind, gaps)]


def _disturb(setting: Setting, streams: Streams, deed: Callable[[], object], found: Gaps) -> None:
    start_s = time.perf_counter()
    streams.wait(setting.quiet_steps)
    before_s = time.perf_counter()
    deed()
    after_s = time.perf_counter()
    streams.wait(setting.steps_after)
    quiet, gaps = streams.gaps(start_s, before_s), streams.gaps(before_s, time.perf_counter())
    step = Tick(median(gap.wall_s for gap in quiet), median(gap.cpu_s for gap in quiet))
    found.wall_steps.append(max(gap.wall_s for gap in gaps) / step.wall_s)
    found.cpu_steps.append(max(gap.cpu_s for gap in gaps) / max(step.cpu_s, 1e-9))
    found.quiet_steps.append(max(gap.wall_s for gap in quiet) / step.wall_s)
    found.step_ms.append(1e3 * step.wall_s)
    found.took_ms.append(1e3 * (after_s - before_s))


def _findings(setting: Setting, kind: str, gaps: Gaps) -> list[Finding]:
    what = f"longest gap of {setting.num_rows} streams in decode steps, {kind} an adapter"
    values = {
        "step ms": gaps.step_ms,
        f"{kind} ms": gaps.took_ms,
        "longest gap in steps before it": gaps.quiet_steps,
    }
    return [
        Finding(f"{what}, by the wall", tuple(gaps.wall_steps), ASKED_STEPS, "at most", values),
        Finding(f"{what}, in CPU time", tuple(gaps.cpu_steps), ASKED_STEPS, "at most", {}),
    ]


@contextmanager
def _streaming(setting: Setting, engine: Engine, adapters: Sequence[str]) -> Iterator[Streams]:
    """All rows decode, from the beginning of the block to its end."""
    streams = Streams(setting.num_rows, _cpu_clock())
    worker = Worker(engine)
    worker.start()
    try:
        sampling = Sampling(temperature=0.0, ignore_eos=True)
        for row in range(setting.num_rows):
            version = _version(engine, adapters, row)
            request = Request(str(row), Prompt(_prompt(row)), sampling, version)
            worker.submit(request, streams.sink(row))
        streams.wait(2)
        yield streams
        for row in range(setting.num_rows):
            worker.cancel(str(row))
    finally:
        worker.stop()


def _version(engine: Engine, adapters: Sequence[str], row: int) -> AdapterVersion | None:
    return engine.registry.acquire(adapters[row % len(adapters)]) if adapters else None


def _prompt(row: int) -> tuple[int, ...]:
    return tuple(10 + (37 * row + 11 * t) % 400 for t in range(16))


def _cpu_clock() -> Callable[[], float]:
    """CPU seconds of this process less the calling thread's, asked for from any thread."""
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    if clock_of is None:  # macOS has none
        return time.process_time
    clock = clock_of(threading.get_ident())
    return lambda: time.process_time() - time.clock_gettime(clock)
