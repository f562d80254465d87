"""`lathe bench adapters`: what adapters cost, part by part, on a random model. Lathe alone.

    mixes   8 and 32 adapters mixed, and all rows on one, over the base alone
    unused  adapters that are loaded and that nobody asks for, over none
    ranks   64 adapters of ranks 4 to 128 mixed, over all at rank 32
    load    streams beside which an adapter is loaded, replaced, unloaded
    many    1,000 adapters on disk and 16 slots, over one adapter

All but the last are measured in this process, engine beside engine (`lockstep.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from serve.bench import crowd, disturb, lockstep, standin
from serve.bench.finding import Finding, Keep, collect
from serve.bench.lockstep import Cost, Side
from serve.bench.standin import Size
from serve.engine.engine import Engine, EngineLimits
from serve.model.loading import load

PARTS = ("mixes", "unused", "ranks", "load", "many")
RANKS = (4, 8, 16, 32, 64, 128)
RANK_OF_ALL = 32
ASKED_FEW, ASKED_MANY, ASKED_ONE, ASKED_UNUSED, ASKED_RANKS = 0.90, 0.85, 0.93, 0.98, 0.9


@dataclass(frozen=True)
class Setting:
    """Which parts to measure, and how."""

    parts: tuple[str, ...] = PARTS
    size: Size = standin.SMALLEST
    rows: int = 32
    """Of mixes and unused: requests that run together."""
    few: int = 8
    many: int = 32
    """Adapters of the two mixes, of rank 16; unused has as many as the larger one."""
    num_ranked: int = 64
    """ranks: adapters, and rows, one each."""
    num_prompt_tokens: int = 74
    max_tokens: int = 48
    rounds: int = 3
    load: disturb.Setting = field(default_factory=disturb.Setting)
    crowd: crowd.Setting = field(default_factory=crowd.Setting)


def run(setting: Setting, folder: Path, progress: Callable[[str], None], keep: Keep) -> list[Finding]:
    """Write model and adapters into `folder` and measure. Raises StoppedError if a server or a request fails."""
    progress("writing a random model")
    model = folder / "model"
    standin.write_model(model, standin.default_dtype(), setting.size)
    mx.clear_cache()
    measuring = _Measuring(setting, model, folder, progress)
    parts = {
        "mixes": measuring.mixes,
        "unused": measuring.unused,
        "ranks": measuring.ranks,
        "load": measuring.load,
        "many": measuring.many,
    }
    return collect(parts, setting.parts, keep)


@dataclass(frozen=True)
class _Measuring:
    """The parts. Engines are made for each and let go after it."""

    setting: Setting
    model: Path
    folder: Path
    progress: Callable[[str], None]

    def mixes(self) -> Iterator[Finding]:
        setting = self.setting
        paths = self._adapters("mixes", setting.many)
        base, adapted = self._engine({}, setting.rows), self._engine(paths, setting.rows)
        names = list(paths)
        cases = (
            (f"{setting.few} adapters mixed", names[: setting.few], ASKED_FEW),
            (f"{setting.many} adapters mixed", names, ASKED_MANY),
            ("all rows on one adapter", names[:1], ASKED_ONE),
        )
        for what, chosen, asked in cases:
            ours, theirs = Side(adapted, chosen), Side(base)
            yield from self._over(f"{what}, over the base alone", ours, theirs, setting.rows, asked)

    def unused(self) -> list[Finding]:
        setting = self.setting
        paths = self._adapters("mixes", setting.many)
        ours, theirs = (Side(self._engine(loaded, setting.rows)) for loaded in (paths, {}))
        what = f"the base with {setting.many} adapters loaded and unused, over without"
        return self._over(what, ours, theirs, setting.rows, ASKED_UNUSED)

    def ranks(self) -> list[Finding]:
        count = self.setting.num_ranked
        mixed = self._adapters("ranks-mixed", count, RANKS)
        equal = self._adapters("ranks-equal", count, (RANK_OF_ALL,))
        ours, theirs = (Side(self._engine(paths, count), list(paths)) for paths in (mixed, equal))
        what = f"{count} adapters of ranks {RANKS[0]} to {RANKS[-1]} mixed, over all at {RANK_OF_ALL}"
        return self._over(what, ours, theirs, count, ASKED_RANKS)

    def load(self) -> list[Finding]:
        setting = self.setting.load
        running = self._adapters("running", self.setting.few)
        news = self._adapters("news", 2 * setting.rounds, seed=1000)
        engine = self._engine(running, setting.num_rows)
        return disturb.run(setting, engine, list(running), news, self.progress)

    def many(self) -> list[Finding]:
        setting, home = self.setting.crowd, self.folder / "many"
        self.progress(f"writing {setting.num_adapters:,} adapters")
        paths = standin.write_many_adapters(home, setting.num_adapters, self.setting.size, rank=setting.rank)
        return crowd.run(setting, self.model, paths, self.folder, self.progress)

    def _adapters(
        self, name: str, count: int, ranks: Sequence[int] = (16,), seed: int = 1
    ) -> Mapping[str, Path]:
        self.progress(f"writing {count} adapters")
        return standin.write_adapters(self.folder / name, count, self.setting.size, ranks=ranks, seed=seed)

    def _engine(self, adapters: Mapping[str, Path], num_rows: int) -> Engine:
        """Of the model anew, since a bank wraps its layers; with all of `adapters` loaded, and no prefixes kept."""
        limits = EngineLimits(max_rows=num_rows, max_adapters=max(1, len(adapters) + 1), prefix_cache_bytes=0)
        engine = Engine(load(str(self.model)), limits)
        engine.bank.measure()  # as a server does
        for name, path in adapters.items():
            engine.registry.load(name, path)
        return engine

    def _over(self, what: str, ours: Side, theirs: Side, num_rows: int, asked: float) -> list[Finding]:
        """Throughput of one side over the other's, round by round; the first round is thrown away."""
        costs: list[tuple[Cost, Cost]] = []
        for number in range(self.setting.rounds + 1):
            self.progress(f"{what}: round {number} of {self.setting.rounds}")
            tokens = self.setting.max_tokens if number else 2
            mine, other = lockstep.run([ours, theirs], self._prompts(num_rows, number), tokens, number)
            assert mine.num_tokens == other.num_tokens == num_rows * tokens, "both have answered all"
            if number:
                costs.append((mine, other))
        return [lockstep.throughput(what, kind, costs, asked) for kind in lockstep.KINDS]

    def _prompts(self, num_rows: int, number: int) -> list[list[int]]:
        """Token ids of words, different ones in each row and round."""
        rows = range(num_rows * number, num_rows * (number + 1))
        return [
            [10 + (37 * row + 11 * t * (1 + row % 7)) % 400 for t in range(self.setting.num_prompt_tokens)]
            for row in rows
        ]
