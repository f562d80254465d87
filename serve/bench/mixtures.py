"""What adapters take of a decode step: batches of one, of eight, of many, in every form, over the bare model's step.

A step is one forward of the model's own code over its own cache, all rows one token on. The loops take turns, step by
step, so that what else the machine does disturbs all of them alike; a ratio is of two steps beside each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from serve.adapters.bank.bank import Bank
from serve.adapters.bank.costs import Costs
from serve.adapters.fitting.update import LowRank
from serve.bench import standin
from serve.bench.about import about
from serve.model.loading import load
from serve.model.network import Network
from serve.model.weights import linear_modules, linear_shape
from serve.tables import Table, numbers

PROMPT_TOKENS = 74
WARM_UP_STEPS = 2
BY_ROWS = Costs({1: 1.0}, row=1e9, start=1e9)
"""Each row by itself, zeros for the base's: nothing is worth moving."""
BY_TILES = Costs({1: 1.0, 2: 1.01, 4: 1.02, 8: 1.03, 16: 1.04, 32: 1.05}, row=0.0, start=0.0)
"""Rows of one adapter together, as many as there are, and the base's left out."""
FORMS: Mapping[str, Costs | None] = {"by rows": BY_ROWS, "by tiles": BY_TILES, "as measured": None}
RANK = 16
RANKS = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Mixture:
    """A batch's adapters: its rows take turns at the first `count`, which have these ranks in turn."""

    name: str
    count: int
    ranks: tuple[int, ...] = (RANK,)
    asked: float | None = None
    """Of the bare step's rate."""


MIXTURES = (
    Mixture("loaded, unused", 0, asked=0.98),
    Mixture("all rows on one", 1, asked=0.93),
    Mixture("8 mixed", 8, asked=0.90),
    Mixture("32 mixed", 32, asked=0.85),
    Mixture("64 mixed, rank 32", 64, (32,)),
    Mixture("64 mixed, ranks 4 to 128", 64, RANKS),
)


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    rows: tuple[int, ...] = (4, 16, 32, 64)
    rounds: int = 20
    size: str = "29M"


@dataclass(frozen=True)
class Clock:
    """Milliseconds of one step: by the wall, and of the whole process on processors."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Result:
    """One mixture in one form, beside the bare loop."""

    num_rows: int
    mixture: Mixture
    form: str
    bare: list[Clock] = field(default_factory=list)
    own: list[Clock] = field(default_factory=list)

    def ratio(self, clock: str) -> float:
        """Its rate over the bare loop's: the median of pairs of steps."""
        pairs = zip(self.bare, self.own, strict=True)
        return median(getattr(bare, clock) / getattr(own, clock) for bare, own in pairs)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "wall_ratio": self.ratio("wall_ms"), "cpu_ratio": self.ratio("cpu_ms")}


def run(setting: Setting, folder: Path, progress: Callable[[str], None]) -> list[Result]:
    """Write the model into `folder` and measure."""
    model = folder / "mixed-model"
    standin.write_model(model, standin.default_dtype(), standin.SIZES[setting.size])
    bare = _Loop(load(str(model)).network)
    results: list[Result] = []
    for ranks in dict.fromkeys(mixture.ranks for mixture in MIXTURES):
        mixtures = [mixture for mixture in MIXTURES if mixture.ranks == ranks]
        progress(f"adapters of rank {', '.join(map(str, ranks))}")
        banked = _Banked(load(str(model)).network, max(mixture.count for mixture in mixtures), ranks)
        for num_rows in setting.rows:
            progress(f"{num_rows} rows, adapters of rank {', '.join(map(str, ranks))}")
            results += _measure(num_rows, mixtures, bare, banked, setting.rounds)
    return sorted(results, key=lambda each: each.num_rows)


def as_json(setting: Setting, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {**about(), "settings": asdict(setting), "results": [each.as_json() for each in results]}


def _measure(
    num_rows: int, mixtures: Sequence[Mixture], bare: _Loop, banked: _Banked, rounds: int
) -> list[Result]:
    results = [Result(num_rows, mixture, form) for mixture in mixtures for form in _forms_of(mixture)]
    loops = bare.start(num_rows), banked.loop.start(num_rows)
    for number in range(-WARM_UP_STEPS, rounds):
        before = loops[0]()
        for result in results:
            banked.choose(result.form, result.mixture, num_rows)
            clock = loops[1]()
            if number >= 0:
                result.bare.append(before)
                result.own.append(clock)
            before = loops[0]()
    return results


def _forms_of(mixture: Mixture) -> Sequence[str]:
    """Where there is one form alone, it is told once."""
    return tuple(FORMS) if mixture.count > 1 else ("as measured",)


class _Loop:
    """Greedy steps of the model's own code, each from the same prompt's end."""

    def __init__(self, network: Network) -> None:
        self._module = network.module

    def start(self, num_rows: int) -> Callable[[], Clock]:
        """A step of so many rows each time it is called."""
        rows, columns = mx.arange(num_rows)[:, None], mx.arange(PROMPT_TOKENS)[None]
        cache, tokens = make_prompt_cache(self._module), 10 + (37 * rows + 11 * columns) % 400
        mx.eval(self._module(tokens, cache=cache)[:, -1])
        last = tokens[:, -1:]

        def step() -> Clock:
            for layer in cache:
                layer.trim(layer.offset - PROMPT_TOKENS)
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            mx.eval(mx.argmax(self._module(last, cache=cache)[:, -1], axis=-1))
            return Clock(1e3 * (time.perf_counter() - wall_s), 1e3 * (time.process_time() - cpu_s))

        return step


class _Banked:
    """The same model with adapters in its bank, in slots from 1."""

    def __init__(self, network: Network, count: int, ranks: Sequence[int]) -> None:
        self.loop = _Loop(network)
        self._bank = Bank(network)
        self._bank.measure()
        self._measured = self._bank.rows.costs
        keys = iter(mx.random.split(mx.random.key(1), 2 * count * len(linear_modules(network.module))))
        for number in range(count):
            updates = _random_updates(network, ranks[number % len(ranks)], keys.__next__)
            for part in self._bank.parts(updates):
                self._bank.install(number + 1, part)

    def choose(self, form: str, mixture: Mixture, num_rows: int) -> None:
        """The coming steps are of this mixture in this form."""
        rows, costs = self._bank.rows, FORMS[form] or self._measured
        if rows.costs is not costs:
            rows.forget()
            rows.costs = costs
        rows.set([1 + row % mixture.count if mixture.count else 0 for row in range(num_rows)])


def _random_updates(network: Network, rank: int, key: Callable[[], mx.array]) -> dict[str, LowRank]:
    """Of all linear layers but the head."""
    updates = {}
    for path, layer in linear_modules(network.module).items():
        if ".layers." in path:
            inputs, outputs = linear_shape(layer)
            a = mx.random.normal((inputs, rank), key=key()) * inputs**-0.5
            updates[path] = LowRank(a, mx.random.normal((rank, outputs), key=key()) * 0.02)
    return updates


def table(results: Sequence[Result]) -> Table:
    """A line a mixture and form."""
    headings = ("bare, ms", "own, ms", "rate, by the wall", "rate, by processors", "asked")
    title = "A decode step with adapters over the bare one: medians of pairs"
    drawn = Table("rows", "adapters", "form", *numbers(*headings), title=title)
    for each in results:
        walls = (median(clock.wall_ms for clock in clocks) for clocks in (each.bare, each.own))
        asked = "" if each.mixture.asked is None else f"{each.mixture.asked:.2f}"
        ratios = (each.ratio("wall_ms"), each.ratio("cpu_ms"))
        cells = [*(f"{ms:.1f}" for ms in walls), *(f"{ratio:.2f}" for ratio in ratios), asked]
        drawn.add(str(each.num_rows), each.mixture.name, each.form, *cells)
    return drawn
