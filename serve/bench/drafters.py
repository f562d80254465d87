"""`lathe bench drafters`: what guesses gain where they come true, and cost where they do not. Lathe beside itself.

    copied     n-grams, where the prompt holds most of the answer: one row, and eight rows of four adapters
    unguessed  n-grams, where nothing of the answer stands anywhere: one row, and eight
    model      a draft model for a target at least twenty times its size: one row, tokens drawn at temperature 1

Engines run in lockstep, one with a drafter and one without, and both draw as many tokens. How many guesses were right
stands beside each ratio.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx.utils import tree_flatten

from serve.bench import lockstep, standin
from serve.bench.finding import Finding, Keep, collect
from serve.bench.lockstep import Cost, Side
from serve.bench.standin import Size
from serve.bench.walks import LEAD_TOKENS, QUIET, copying_prompt, write_walking_model
from serve.bench.widened import write_widened
from serve.draft.lookup import NAME as NGRAM
from serve.draft.lookup import LookupDrafter
from serve.draft.model import NAME as MODEL
from serve.draft.model import DraftModel
from serve.engine.drafts import Drafter, DraftStats
from serve.engine.engine import Engine, EngineLimits
from serve.errors import ConfigError
from serve.model.loading import LoadedModel, load

PARTS = ("copied", "unguessed", "model")
ASKED_COPIED, ASKED_COPIED_MIXED, ASKED_UNGUESSED, ASKED_MODEL = 1.8, 1.3, 0.97, 1.3
LEAST_TIMES = 20
"""A target is so many times its draft model's size."""
WIDENED = Size(512, 8, 1536, 12, 4, 64, 0)
"""What the draft model stands in, where no target is named; its vocabulary is the draft model's."""
NOISE = 0.01
DRAFT_BYTES = 256 << 20
TICKETS = (
    "My {} arrived broken.",
    "Where is my {}?",
    "The bill for my {} is wrong.",
    "I want to return my {}.",
)
PRODUCTS = ("lamp", "vacuum", "speaker", "mixer", "desk", "camera", "heater", "tablet")


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    draft: str
    """The draft model: a folder or a hub name."""
    parts: tuple[str, ...] = PARTS
    target: str | None = None
    """Of the draft model; None: one that it stands in, widened, and whose other numbers are noise."""
    noise: float = NOISE
    size: Size = standin.SMALLEST
    """Of the models that n-grams guess for."""
    rows: int = 8
    num_adapters: int = 4
    """copied: of the rows, in turns."""
    changed: float = 0.02
    """copied: share of the shown tokens that are others."""
    num_prompt_tokens: int = 256
    max_tokens: int = 160
    rounds: int = 3


def run(setting: Setting, folder: Path, progress: Callable[[str], None], keep: Keep) -> list[Finding]:
    """Write models and adapters into `folder` and measure. Raises StoppedError if a request fails, ConfigError where
    the target is not large enough, or the draft model's tokenizer is another."""
    measuring = _Measuring(setting, folder, progress)
    parts = {"copied": measuring.copied, "unguessed": measuring.unguessed, "model": measuring.model}
    return collect(parts, setting.parts, keep)


@dataclass(frozen=True)
class _Measuring:
    """The parts. Engines are made for each and let go after it."""

    setting: Setting
    folder: Path
    progress: Callable[[str], None]

    def copied(self) -> Iterator[Finding]:
        setting, home = self.setting, self.folder / "walking"
        self.progress("writing a model that copies")
        text = write_walking_model(home, standin.default_dtype(), setting.size)
        # As quiet as what they are added to, or the model would say something else than its text.
        paths = standin.write_adapters(
            self.folder / "adapters", setting.num_adapters, setting.size, strength=QUIET
        )
        rng = random.Random(0)

        def prompts(num_rows: int) -> list[list[int]]:
            length = setting.num_prompt_tokens - LEAD_TOKENS
            return [
                copying_prompt(text, rng.randrange(len(text)), length, setting.changed, rng)
                for _ in range(num_rows)
            ]

        cases: Sequence[tuple[str, int, Mapping[str, Path], float]] = (
            ("one row", 1, {}, ASKED_COPIED),
            (f"{setting.rows} rows of {len(paths)} adapters", setting.rows, paths, ASKED_COPIED_MIXED),
        )
        for what, num_rows, adapters, asked in cases:
            yield from self._over(
                f"n-grams, copied answers, {what}", str(home), adapters, num_rows, prompts, asked
            )

    def unguessed(self) -> Iterator[Finding]:
        setting, home = self.setting, self.folder / "model"
        self.progress("writing a random model")
        standin.write_model(home, standin.default_dtype(), setting.size)
        rng = random.Random(1)

        def prompts(num_rows: int) -> list[list[int]]:
            return [
                [rng.randrange(10, 400) for _ in range(setting.num_prompt_tokens)] for _ in range(num_rows)
            ]

        for num_rows in (1, setting.rows):
            rows = "one row" if num_rows == 1 else f"{num_rows} rows"
            what = f"n-grams, answers that stand nowhere, {rows}"
            yield from self._over(what, str(home), {}, num_rows, prompts, ASKED_UNGUESSED)

    def model(self) -> Iterator[Finding]:
        setting = self.setting
        draft = load(setting.draft)
        target = setting.target or str(self._widened(draft))
        sizes = [_num_parameters(each) for each in (load(target), draft)]
        if sizes[0] < LEAST_TIMES * sizes[1]:
            raise ConfigError(
                f"--target has {sizes[0]:,} parameters and --draft {sizes[1]:,}; expected {LEAST_TIMES} times as many"
            )
        rng = random.Random(2)

        def prompts(num_rows: int) -> list[list[int]]:
            asked = [[{"role": "user", "content": _ticket(rng)}] for _ in range(num_rows)]
            return [draft.tokenizer.apply_chat_template(each, add_generation_prompt=True) for each in asked]

        def drafter_of(model: LoadedModel) -> Drafter:
            return DraftModel(load(setting.draft), model, max_bytes=DRAFT_BYTES)

        what = f"a draft model of {_short(sizes[1])} for a target of {_short(sizes[0])}, one row"
        yield from self._over(what, target, {}, 1, prompts, ASKED_MODEL, MODEL, drafter_of, temperature=1.0)

    def _widened(self, draft: LoadedModel) -> Path:
        self.progress("writing a target that the draft model stands in")
        size = replace(WIDENED, vocabulary=draft.network.vocab_size)
        home = self.folder / "target"
        write_widened(draft.path, home, size, self.setting.noise, standin.default_dtype())
        return home

    def _over(
        self,
        what: str,
        home: str,
        adapters: Mapping[str, Path],
        num_rows: int,
        prompts: Callable[[int], list[list[int]]],
        asked: float,
        name: str = NGRAM,
        drafter_of: Callable[[LoadedModel], Drafter] = lambda _: LookupDrafter(),
        temperature: float = 0.0,
    ) -> list[Finding]:
        """Throughput with a drafter over throughput without, round by round; the first round is thrown away."""
        ours, theirs = (
            Side(_engine(home, adapters, num_rows, {name: make} if make else {}), list(adapters))
            for make in (drafter_of, None)
        )
        costs: list[Sequence[Cost]] = []
        shares: list[Mapping[str, float]] = []
        for number in range(self.setting.rounds + 1):
            self.progress(f"{what}: round {number} of {self.setting.rounds}")
            before = dict(ours.engine.stats().drafts)
            asked_for = prompts(num_rows)
            both = lockstep.run([ours, theirs], asked_for, self.setting.max_tokens, number, temperature)
            assert both[0].num_tokens == both[1].num_tokens == num_rows * self.setting.max_tokens
            if number:
                costs.append(both)
                shares.append(_shares(before, ours.engine.stats().drafts))
        names = sorted({each for found in shares for each in found})
        right = {
            f"right of guesses{f' ({each})' if each else ''}": [found.get(each, 0.0) for found in shares]
            for each in names
        }
        steps = {"steps": [float(each[0].num_steps) for each in costs]}
        steps["steps of the other"] = [float(each[1].num_steps) for each in costs]
        findings = [lockstep.throughput(what, kind, costs, asked) for kind in lockstep.KINDS]
        return [replace(each, values={**each.values, **steps, **right}) for each in findings]


def _engine(
    home: str,
    adapters: Mapping[str, Path],
    num_rows: int,
    drafters: Mapping[str, Callable[[LoadedModel], Drafter]],
) -> Engine:
    """Of the model anew, since a bank wraps its layers; with all of `adapters` loaded, and no prefixes kept."""
    model = load(home)
    limits = EngineLimits(max_rows=num_rows, max_adapters=max(1, len(adapters) + 1), prefix_cache_bytes=0)
    made = {name: make(model) for name, make in drafters.items()}
    engine = Engine(model, limits, drafters=made, drafter=next(iter(made), None))
    engine.bank.measure()  # as a server does
    for name, path in adapters.items():
        engine.registry.load(name, path)
    return engine


def _shares(before: Mapping[str, DraftStats], after: Mapping[str, DraftStats]) -> dict[str, float]:
    """By adapter, the share of a round's guesses that was right; of those without any, nothing."""
    shares = {}
    for name, stats in after.items():
        earlier = before.get(name, DraftStats())
        num_drafted = stats.num_drafted - earlier.num_drafted
        if num_drafted:
            shares[name] = (stats.num_accepted - earlier.num_accepted) / num_drafted
    return shares


def _num_parameters(model: LoadedModel) -> int:
    return sum(value.size for _, value in tree_flatten(model.network.module.parameters()))


def _short(count: int) -> str:
    """1.0M, 28M."""
    millions = count / 1e6
    return f"{millions:.0f}M" if millions >= 10 else f"{millions:.2g}M"


def _ticket(rng: random.Random) -> str:
    """A question of the kind that the embedded model knows."""
    return f"Ticket: {rng.choice(TICKETS).format(rng.choice(PRODUCTS))}\nWork on this ticket."
