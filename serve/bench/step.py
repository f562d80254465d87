"""`lathe bench step`: what the engine's decode step takes over mlx-lm's bare loop, and where it goes.

Both run in this process, on the same random model and the same prompts, some steps of the one and then some of the
other. The model is so small that most of a step is the host's time: what Python does, and what mlx does to build
and start a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from serve.bench import standin
from serve.bench.about import about
from serve.bench.stopwatch import Lap, Moment, Stopwatch
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.engine.sampler import Sampler
from serve.model.loading import load
from serve.model.prompt import Prompt
from serve.tables import Table, numbers

ASKED_MS = 0.3
ASKED_ROW_MS = 0.005
PROMPT_TOKENS = 16
WARM_UP_STEPS = 8
PARTS = ("schedule", "arrays", "forward build", "eval", "read", "events")


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    rows: tuple[int, ...] = (16, 64)
    rounds: int = 10
    steps_per_round: int = 20


@dataclass(frozen=True)
class Clock:
    """Milliseconds a step: by the wall, and of this thread on a processor, which waits while others compute."""

    wall_ms: float
    thread_ms: float

    @classmethod
    def of(cls, spent: Moment, count: int) -> Clock:
        """`count` steps took so long."""
        return cls(1e3 * spent.wall_s / count, 1e3 * spent.thread_s / count)


@dataclass(frozen=True)
class Result:
    """At one number of rows. A round's numbers are means over its steps."""

    num_rows: int
    bare: list[Clock]
    engine: list[Clock]
    parts: dict[str, Clock] = field(default_factory=dict)
    """Of the engine's step, measured by itself."""
    bare_parts: dict[str, Clock] = field(default_factory=dict)
    """Of the bare loop's, which has two of them."""

    @property
    def asked_ms(self) -> float:
        """What the engine may take more than the bare loop."""
        return ASKED_MS + ASKED_ROW_MS * self.num_rows

    @property
    def over_ms(self) -> list[float]:
        """A round each."""
        return [ours.wall_ms - bare.wall_ms for ours, bare in zip(self.engine, self.bare, strict=True)]

    @property
    def thread_over_ms(self) -> list[float]:
        """The same of this thread alone."""
        return [ours.thread_ms - bare.thread_ms for ours, bare in zip(self.engine, self.bare, strict=True)]

    def as_json(self) -> dict[str, Any]:
        over = median(self.over_ms)
        return {**asdict(self), "over_ms": over, "asked_ms": self.asked_ms, "is_met": over <= self.asked_ms}


def run(setting: Setting, folder: Path, progress: Callable[[str], None]) -> list[Result]:
    """Write the model into `folder` and measure."""
    model = folder / "model"
    standin.write_model(model, mx.float32, standin.TINY)
    return [_measure(count, setting, model, progress) for count in setting.rows]


def as_json(setting: Setting, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {**about(), "settings": asdict(setting), "results": [each.as_json() for each in results]}


def _measure(num_rows: int, setting: Setting, model: Path, progress: Callable[[str], None]) -> Result:
    engine = _decoding_engine(num_rows, model)
    bare = _BareLoop(num_rows, model)
    result = Result(num_rows, [], [])
    for number in range(setting.rounds + 1):
        progress(f"{num_rows} rows: round {number} of {setting.rounds}")
        steps = setting.steps_per_round if number else WARM_UP_STEPS
        clocks = _clock(bare.step, steps), _clock(engine.step, steps)
        if number:
            result.bare.append(clocks[0])
            result.engine.append(clocks[1])
    result.parts.update(_parts(lambda: engine.step(), _laps(engine), setting.steps_per_round))
    laps = [Lap(bare, "build", "forward build"), Lap(bare, "evaluate", "eval")]
    result.bare_parts.update(_parts(lambda: bare.step(), laps, setting.steps_per_round))
    assert engine.stats().num_decoding == num_rows, "a row has ended"
    return result


def _clock(step: Callable[[], object], count: int) -> Clock:
    start = Moment.now()
    for _ in range(count):
        step()
    return Clock.of(Moment.now().since(start), count)


def _prompts(num_rows: int) -> list[tuple[int, ...]]:
    """Different ones: rows share no prefix."""
    return [tuple(10 + (37 * row + 11 * t) % 400 for t in range(PROMPT_TOKENS)) for row in range(num_rows)]


def _decoding_engine(num_rows: int, model: Path) -> Engine:
    """An engine all of whose rows decode, without end."""
    engine = Engine(load(str(model)), EngineLimits(max_rows=num_rows))
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    for row, prompt in enumerate(_prompts(num_rows)):
        engine.add(engine.check(Request(str(row), Prompt(prompt), sampling)))
    while engine.stats().num_decoding < num_rows:
        engine.step()
    return engine


class _BareLoop:
    """A greedy step for all rows each time it is asked: the family's own code over its own cache."""

    def __init__(self, num_rows: int, model: Path) -> None:
        self._module = load(str(model)).network.module
        self._cache = make_prompt_cache(self._module)
        self._tokens = mx.array(_prompts(num_rows))  # [B, T]

    def step(self) -> None:
        self.build()
        self.evaluate()

    def build(self) -> None:
        logits = self._module(self._tokens, cache=self._cache)[:, -1]  # [B, V]
        self._tokens = mx.argmax(logits, axis=-1)[:, None]  # [B, 1]

    def evaluate(self) -> None:
        mx.eval(self._tokens)


def _parts(step: Callable[[], object], laps: Sequence[Lap], count: int) -> dict[str, Clock]:
    """What a step spends on each of PARTS. `step` looks its calls up each time, so that it meets the timed ones."""
    stopwatch = Stopwatch()
    with stopwatch.watching(laps):
        for _ in range(count):
            step()
    return {part: Clock.of(stopwatch.spent.get(part, Moment(0.0, 0.0)), count) for part in PARTS}


def _laps(engine: Engine) -> list[Lap]:
    """The calls that a decode step is made of."""
    network, runner = engine.model.network, engine._runner
    return [
        Lap(engine, "step", "events"),
        Lap(engine.scheduler, "schedule", "schedule"),
        Lap(engine.scheduler, "commit", "schedule"),
        Lap(runner, "start", "arrays"),
        Lap(network, "hidden", "forward build"),
        Lap(network, "logits", "forward build"),
        Lap(Sampler, "draw", "forward build"),
        Lap(Sampler, "is_sound", "forward build"),
        Lap(runner, "_evaluate", "eval"),
        Lap(runner, "read", "read"),
    ]


def table(results: Sequence[Result]) -> Table:
    """A line a number of rows: medians over rounds, in milliseconds a step."""
    headings = ("bare", "engine", "over", "lowest", "highest", "asked", "met", "over, this thread's")
    drawn = Table("rows", *numbers(*headings), title="Milliseconds a step, medians of rounds")
    for each in results:
        over = each.over_ms
        walls = (median(clock.wall_ms for clock in clocks) for clocks in (each.bare, each.engine))
        cells = [*walls, median(over), min(over), max(over), each.asked_ms]
        is_met = "yes" if median(over) <= each.asked_ms else "no"
        thread = median(each.thread_over_ms)
        drawn.add(str(each.num_rows), *(f"{ms:.2f}" for ms in cells), is_met, f"{thread:.2f}")
    return drawn


def parts_table(results: Sequence[Result]) -> Table:
    """Where a step goes, the engine's and the bare loop's: by the wall, and of this thread on a processor."""
    drawn = Table("rows", "loop", "clock", *numbers(*PARTS, "all"), title="Milliseconds of a step")
    for each in results:
        for loop, parts in (("engine", each.parts), ("bare", each.bare_parts)):
            for clock in ("wall", "thread"):
                cells = [getattr(parts[part], f"{clock}_ms") for part in PARTS]
                drawn.add(str(each.num_rows), loop, clock, *(f"{ms:.3f}" for ms in (*cells, sum(cells))))
    return drawn
