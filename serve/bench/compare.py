"""`lathe bench compare`: Lathe beside a bare batched loop and other servers; its mixes of adapters beside its base.

All get one random model, the same BLAS, the same prompts and the same number of tokens to make. They stay up for the
whole run, and all but the one being measured are paused. Within a round they take turns at each number of clients, in
an order that turns round, so drift of the machine meets all alike, and ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, Literal

import mlx.core as mx

from serve.bench import standin
from serve.bench.about import about
from serve.bench.contest import (
    BARE,
    FEW_MIXED,
    KEYS,
    LATHE,
    MANY,
    MANY_MIXED,
    ONE,
    PEERS,
    UNUSED,
    Contestant,
    Field,
    Work,
)
from serve.bench.load import Round, TimeLimit
from serve.bench.summary import Summary, summarize
from serve.errors import ConfigError, StoppedError
from serve.tables import Table, numbers

BEST_PEER = "the best peer"
Rounds = Mapping[tuple[str, int], Sequence[Round]]
"""(label, number of clients) → rounds, in order."""
What = Literal["tokens a second", "tokens a CPU second", "longest gap"]
GROWTH_A_CLIENT = 0.12
"""A guess until it has been measured: a round of 16 clients takes 1 + 15 · 0.12 times as long as one of one."""


@dataclass(frozen=True)
class Comparison:
    """What to measure, the same for everybody."""

    concurrency: tuple[int, ...] = (1, 4, 16, 32, 64)
    num_prompt_tokens: int = 74
    max_tokens: int = 64
    rounds: int = 3
    requests_per_client: int = 2
    size: str = "29M"
    """Of the random model: one of `standin.SIZES`."""
    rank: int = 16
    """Of each adapter, on all linear layers."""
    only: tuple[str, ...] = tuple(KEYS)
    """Who takes part: keys of `contest.KEYS`. vllm-mlx is left out where it is not installed."""
    time_limit_s: float | None = None
    """Of all rounds together. A level that would not end in time is not begun, and streams that have not ended by
    then are cut off."""


@dataclass(frozen=True)
class Asked:
    """A ratio that is wanted: of whom, to whom, of what, and how much of it, by the number of clients."""

    of: str
    to: str
    what: What
    least: Mapping[int, float] | None = None
    """From so many clients on, at least so much."""
    most: float | None = None

    def bound(self, concurrency: int) -> float | None:
        """What is asked at so many clients, if anything is."""
        if self.least is None:
            return self.most
        return self.least[max(level for level in self.least if level <= concurrency)]


_SPEEDS = (
    Asked(LATHE, BARE, "tokens a second", least={1: 0.95}),
    *(Asked(LATHE, peer, "tokens a second", least={1: 1.0, 16: 1.05}) for peer in (*PEERS, BEST_PEER)),
    Asked(FEW_MIXED, LATHE, "tokens a second", least={1: 0.90}),
    Asked(MANY_MIXED, LATHE, "tokens a second", least={1: 0.85}),
    Asked(ONE, LATHE, "tokens a second", least={1: 0.93}),
    Asked(UNUSED, LATHE, "tokens a second", least={1: 0.98}),
)
ASKED = (
    *_SPEEDS,
    Asked(LATHE, BEST_PEER, "longest gap", most=1.0),
    # Nothing is asked of it: it tells on a busy machine what the wall cannot.
    *(replace(each, what="tokens a CPU second", least=None) for each in _SPEEDS),
)


@dataclass(frozen=True)
class Ratio:
    """One setting over another: the median over rounds, and its extremes."""

    of: str
    to: str
    concurrency: int
    median: float
    min: float
    max: float
    what: What = "tokens a second"
    """Of Lathe's own time on processors, and the other's, in place of the wall's; or of the longest gap between two
    pieces of one stream."""
    asked: float | None = None
    is_met: bool | None = None
    """By the median; None where nothing is asked."""


@dataclass(frozen=True)
class Outcome:
    """Everything `lathe bench compare` shows."""

    summaries: list[Summary]
    ratios: list[Ratio]
    same_text: dict[str, float]
    """Fraction of Lathe's base answers that another one gave too, word for word."""
    left_out: tuple[str, ...] = ()
    """What was not measured, and why."""

    def as_json(self, comparison: Comparison) -> dict[str, Any]:
        return {
            **about(),
            "settings": asdict(comparison),
            "results": [each.as_json() for each in self.summaries],
            "ratios": [asdict(each) for each in self.ratios],
            "same_text": self.same_text,
            "left_out": self.left_out,
        }


def run(
    comparison: Comparison,
    folder: Path,
    progress: Callable[[str], None],
    keep: Callable[[Outcome], None],
    vllm_mlx: str | None = None,
) -> Outcome:
    """Write the model into `folder`, start everybody, measure, stop them.

    A peer that fails is left out from then on. Raises StoppedError or ConfigError if Lathe or the bare loop fails.

    keep      is given what is known so far each time that all had their turn, so a run cut off has told it
    vllm_mlx  the executable of vllm-mlx; None: it is not installed
    """
    labels = [KEYS[key] for key in KEYS if key in comparison.only]
    if len(labels) < 2:
        raise ConfigError(
            f"--only: nothing is compared with {labels[0]}; name two or more of {', '.join(KEYS)}"
        )
    left_out = []
    if vllm_mlx is None and PEERS[2] in labels:
        labels.remove(PEERS[2])
        left_out.append(f"{PEERS[2]} is not installed; its executable can be named with --vllm-mlx")
    model, adapters, size = folder / "model", folder / "adapters", standin.SIZES[comparison.size]
    progress("writing a random model")
    standin.write_model(model, standin.default_dtype(), size)
    paths: Mapping[str, Path] = {}
    if {FEW_MIXED, MANY_MIXED, ONE, UNUSED} & set(labels):
        progress(f"writing {MANY} adapters")
        paths = standin.write_adapters(adapters, MANY, size, ranks=(comparison.rank,))
    mx.clear_cache()
    work = Work(comparison.num_prompt_tokens, comparison.max_tokens)
    with ExitStack() as stack:
        contestants = Field(labels, work, model, paths, folder, vllm_mlx).start(stack, progress, left_out)
        measuring = Measuring(contestants, comparison, progress)
        rounds = measuring.run(lambda so_far: keep(outcome_of(so_far, left_out)))
    return outcome_of(rounds, [*left_out, *measuring.left_out])


def outcome_of(rounds: Rounds, left_out: Sequence[str] = ()) -> Outcome:
    """Of the rounds as far as they came: a level that not all had has no entry."""
    summaries = [summarize(label, each) for (label, _), each in rounds.items()]
    return Outcome(summaries, ratios_of(rounds), _same_text(rounds), tuple(left_out))


class Measuring:
    """The rounds of a comparison, within its time."""

    def __init__(
        self, contestants: Sequence[Contestant], comparison: Comparison, progress: Callable[[str], None]
    ) -> None:
        self._contestants = list(contestants)
        self._comparison = comparison
        self._progress = progress
        self._took_s: dict[int, float] = {}
        """By number of clients: what the last turn of everybody took."""
        self._start_s = time.monotonic()
        self.left_out: list[str] = []

    def run(self, keep: Callable[[Rounds], None]) -> Rounds:
        """All rounds, or as many as the time limit lets begin."""
        asked = self._comparison
        rounds: dict[tuple[str, int], list[Round]] = {}
        self._guess()
        for number in range(asked.rounds):
            self._progress(f"all rounds take about {self._expected_s(number) / 60:,.0f} more minutes")
            for concurrency in asked.concurrency:
                remaining_s = self._remaining_s
                if remaining_s is not None and self._took_s[concurrency] > remaining_s:
                    self.left_out.append(
                        f"round {number + 1} at {concurrency} client(s): it takes about "
                        f"{self._took_s[concurrency]:,.0f} s, and {max(0.0, remaining_s):,.0f} s are left of the "
                        f"time limit"
                    )
                    continue
                self._turns(number, concurrency, rounds)
                keep(rounds)
        if not rounds:
            raise StoppedError(f"nothing was measured: {self.left_out[0]}")
        return rounds

    def _turns(self, number: int, concurrency: int, rounds: dict[tuple[str, int], list[Round]]) -> None:
        """Everybody once, at so many clients. What was cut off by the time limit is thrown away; a peer all of whose
        requests failed takes no more turns."""
        start_s = time.monotonic()
        done: dict[str, Round] = {}
        for each in self._contestants if number % 2 == 0 else reversed(self._contestants):
            self._progress(
                f"round {number + 1} of {self._comparison.rounds}: {each.label}, {concurrency} client(s)"
            )
            remaining_s = self._remaining_s
            count = _count(self._comparison, concurrency)
            limit = TimeLimit(end_s=None if remaining_s is None else max(1.0, remaining_s))
            done[each.label] = each.level(concurrency, count, limit)
            if any(answer.error_kind == "cut off" for answer in done[each.label].answers):
                self.left_out.append(
                    f"round {number + 1} at {concurrency} client(s): the time limit cut it off"
                )
                return
        for each in list(self._contestants):
            if all(answer.error is not None for answer in done[each.label].answers):
                self._drop(each, done[each.label])
            else:
                rounds.setdefault((each.label, concurrency), []).append(done[each.label])
        self._took_s[concurrency] = time.monotonic() - start_s

    def _drop(self, contestant: Contestant, done: Round) -> None:
        """Failed requests are counted and shown; a round of nothing else has no rate to show. Raises StoppedError for
        one that nothing can be told without."""
        said = f"{contestant.label}: all {len(done.answers)} requests failed: {done.answers[0].error}"
        if contestant.label not in PEERS:
            raise StoppedError(said)
        self._contestants.remove(contestant)
        self.left_out.append(f"{said}; it took no more turns")

    def _guess(self) -> None:
        """How long everybody's turn takes at each level, from one request of each."""
        self._progress("estimating: one request of each")
        one_s = sum(each.level(1, 1).wall_s for each in self._contestants)
        everybody_s = self._comparison.requests_per_client * one_s
        for level in self._comparison.concurrency:
            self._took_s[level] = everybody_s * (1 + GROWTH_A_CLIENT * (level - 1))

    def _expected_s(self, number: int) -> float:
        """Of the rounds from `number` on."""
        return (self._comparison.rounds - number) * sum(self._took_s.values())

    @property
    def _remaining_s(self) -> float | None:
        limit_s = self._comparison.time_limit_s
        return None if limit_s is None else limit_s - (time.monotonic() - self._start_s)


def _count(comparison: Comparison, concurrency: int) -> int:
    return max(2, comparison.requests_per_client * concurrency)


def ratios_of(rounds: Rounds) -> list[Ratio]:
    """All of ASKED that were measured on both sides."""
    levels = list(dict.fromkeys(concurrency for _, concurrency in rounds))
    found = [_ratio(asked, level, rounds) for asked in ASKED for level in levels]
    return [each for each in found if each is not None]


def _ratio(asked: Asked, concurrency: int, rounds: Rounds) -> Ratio | None:
    ours = _values(asked.of, asked.what, concurrency, rounds)
    theirs = _values(asked.to, asked.what, concurrency, rounds)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b]
    if not pairs:
        return None
    values = [a / b for a, b in pairs]
    middle, bound = median(values), asked.bound(concurrency)
    is_met = None if bound is None else (middle >= bound if asked.least is not None else middle <= bound)
    return Ratio(asked.of, asked.to, concurrency, middle, min(values), max(values), asked.what, bound, is_met)


def _values(label: str, what: What, concurrency: int, rounds: Rounds) -> list[float | None]:
    """One a round; of the best peer, the best of all peers in each round."""
    if label != BEST_PEER:
        return [_value(each, what) for each in rounds.get((label, concurrency), ())]
    peers = [_values(peer, what, concurrency, rounds) for peer in PEERS if (peer, concurrency) in rounds]
    best = min if what == "longest gap" else max
    # One that was dropped has fewer rounds, and those are the first ones.
    return [
        best((value for value in each if value is not None), default=None) for each in zip_longest(*peers)
    ]


def _value(each: Round, what: What) -> float | None:
    found = {
        "tokens a second": each.tokens_per_s,
        "tokens a CPU second": each.tokens_per_cpu_s,
        "longest gap": each.longest_gap_s,
    }
    return found[what]


def _same_text(rounds: Rounds) -> dict[str, float]:
    """They saw the same prompts in the same order, so equal weights should give equal greedy text."""
    texts: dict[str, list[list[str]]] = {label: [] for label, _ in rounds}
    for (label, _), each in rounds.items():
        texts[label] += [sorted(answer.text for answer in one.answers) for one in each]
    alike = [label for label in (BARE, *PEERS, UNUSED) if label in texts]
    return {label: _overlap(texts[LATHE], texts[label]) for label in alike} if LATHE in texts else {}


def _overlap(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> float:
    pairs = list(zip(ours, theirs, strict=False))
    shared = sum(text in there for here, there in pairs for text in here)
    return shared / max(1, sum(len(here) for here, _ in pairs))


def table(outcome: Outcome) -> Table:
    """How many times as much: the median of the rounds and its extremes, a column for each number of clients."""
    title = "Median of rounds (lowest, highest), and what is asked: ✓ met, ✗ not"
    levels = list(dict.fromkeys(each.concurrency for each in outcome.ratios))
    headings = [f"{level} client{'s' if level > 1 else ''}" for level in levels]
    drawn = Table("of / to", *numbers(*headings), title=title)
    for of, to, what in dict.fromkeys((each.of, each.to, each.what) for each in outcome.ratios):
        found = {
            each.concurrency: _cell(each)
            for each in outcome.ratios
            if (each.of, each.to, each.what) == (of, to, what)
        }
        named = f"{of} / {to}" if what == "tokens a second" else f"{what}, {of} / {to}"
        drawn.add(named, *(found.get(level, "-") for level in levels))
    return drawn


def _cell(each: Ratio) -> str:
    ratio = f"{each.median:.2f} ({each.min:.2f}, {each.max:.2f})"
    if each.asked is None:
        return ratio
    sense = "≤" if each.what == "longest gap" else "≥"
    return f"{ratio} {sense} {each.asked:.2f} {'✓' if each.is_met else '✗'}"


def notes(outcome: Outcome) -> list[str]:
    """How alike the answers were, and what is missing."""
    said = [
        f"{label} gave {share:.0%} of Lathe's base answers word for word"
        for label, share in outcome.same_text.items()
    ]
    return [*said, *(f"left out: {each}" for each in outcome.left_out)]
