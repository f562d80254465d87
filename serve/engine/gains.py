"""How far to guess: acceptance of rows and adapters, and what a step of so many tokens takes. No clock.

A step of B rows and W tokens a row gives row r

    1 + p_r + p_r² + … + p_r^k,   k = min(guesses of r, W - 1),   p_r: how often its guesses are right

tokens, in t(B · W) seconds and what guessing them takes; the W with the most tokens a second is taken, 1 where none
gains MIN_GAIN. What times are not known is filled in by those that are, for t grows about as N^COST_EXPONENT.
A row's p is its own as far as it has drafted, and before that the last rows' of the same drafter and adapter. Where
guesses do not pay, they are tried again within an allowance: TRIAL_SHARE of the time and what drafts have gained; out
of that comes also what is asked in vain.

Rows that keep a state give all of a block back where one token of it was not theirs, and run what was right again at
the next one's beginning. Such a row's tokens a step are those of many blocks of one width, each with as many guesses
as what it is behind leaves room for (`rerun_rates`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from serve.engine.drafts import MAX_DRAFT, Acceptance, Drafter, Drafting

WIDTHS = (1, 2, 3, 4, 5, 7, 9, 12, 16)
"""Tokens a row of a step: few, so that each is timed often and compiled once."""
COST_EXPONENT = 0.4
"""Measured on CPU: 1, 9 and 72 tokens take 27, 65 and 149 ms."""
GUESSING_EXPONENT = 1.0
"""Of guesses that are made one behind the other."""
NUM_KEPT = 5
"""Times of a size."""
FRESH = 16
"""Steps."""
MIN_GAIN = 1.03
PLAIN_EVERY = (4, 128)
"""Of so many steps with guesses at least and at most one is made without, and timed: what they are held against may
have changed. More rarely each time that it has not."""
SAME_TIME = 1.2
"""Two times that are the same, but for chance, differ by less."""
TRIAL_SHARE = 0.01
MAX_ALLOWANCE = 2.5
"""In plain steps, and in debt; as much is there at first."""
NUM_IDLE = 3
"""Steps for which nobody is asked, once none is worth the asking; a new sequence ends that."""
TRIAL_WIDTH = 3
FIRST_SHARE = 0.7
"""What is thought of a drafter that nobody has asked yet."""
FIRST_WEIGHT = 2.0
ROW_WEIGHT = 3.0
"""Guesses of other rows that a new row's first ones stand beside."""
ROW_MEMORY, GROUP_MEMORY = 0.9, 0.99
MAX_GROUPS = 4096
SHORTEST_S = 1e-9
NUM_SHARES = 100
"""For so many shares of right guesses, evenly spaced, it is known what blocks give."""


class StepTimes:
    """Seconds by number of tokens: the shortest of the last few, for a busy machine makes the others longer, but of
    those before FRESH steps the last alone, for by now it may be busier, or less."""

    def __init__(self, exponent: float = COST_EXPONENT) -> None:
        """exponent: of the tokens, by which times grow beyond what is measured."""
        self._exponent = exponent
        self._now = 0  # a number of steps
        self._kept: dict[int, deque[tuple[int, float]]] = {}  # when, and seconds
        self._sizes: list[int] = []  # in order

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took that long."""
        self._now += 1
        kept = self._kept.get(num_tokens)
        if kept is None:
            kept = self._kept[num_tokens] = deque(maxlen=NUM_KEPT)
            insort(self._sizes, num_tokens)
        while kept and self._now - kept[0][0] > FRESH:
            kept.popleft()
        kept.append((self._now, max(seconds, SHORTEST_S)))

    def of(self, num_tokens: int) -> float | None:
        """What such a step takes, measured, or by those on either side of it; None while nothing is known."""
        if not self._sizes:
            return None
        at = bisect_left(self._sizes, num_tokens)
        if at < len(self._sizes) and self._sizes[at] == num_tokens:
            return self._shortest(num_tokens)
        if 0 < at < len(self._sizes):
            low, high = self._sizes[at - 1], self._sizes[at]
            of_low, of_high = self._shortest(low), self._shortest(high)
            part = math.log(num_tokens / low) / math.log(high / low)
            return of_low * (of_high / of_low) ** part
        nearest = self._sizes[0] if at == 0 else self._sizes[-1]
        return self._shortest(nearest) * (num_tokens / nearest) ** self._exponent

    def age(self, num_tokens: int) -> int:
        """Steps since one of that size was timed last; 0 where none was."""
        kept = self._kept.get(num_tokens)
        return self._now - kept[-1][0] if kept else 0

    def _shortest(self, num_tokens: int) -> float:
        return min(seconds for _, seconds in self._kept[num_tokens])


@dataclass(frozen=True)
class _Group:
    """Of the last rows of one drafter and adapter."""

    acceptance: Acceptance
    knowledge: Acceptance


def _of_row(group: Acceptance) -> Acceptance:
    """What a new row begins with."""
    return Acceptance(group.share * ROW_WEIGHT, ROW_WEIGHT, ROW_MEMORY)


class Gains:
    """Of one engine. Driven by `note_step`, `note_rerun`, `note_guessing`, `note_asked` and `note_draft`."""

    def __init__(self, *, reruns: bool = False) -> None:
        """`reruns`: a row gives all of a block back that was not all its own."""
        self._rates = rerun_rates() if reruns else block_rates()
        self._steps = StepTimes()
        self._guessing: dict[str, StepTimes] = {}  # by name of the drafter
        self._groups: OrderedDict[tuple[str, str], _Group] = OrderedDict()
        self._allowance = MAX_ALLOWANCE  # in plain steps
        self._guessed_s = 0.0  # since the last step
        self._num_idle = 0
        self._max_age = PLAIN_EVERY[0]

    def begin(self, name: str, drafter: Drafter, adapter: str) -> Drafting:
        """What a new sequence under that adapter ("": the base) is to have."""
        self._num_idle = 0
        group = self._group(name, adapter)
        return Drafting(name, drafter, _of_row(group.acceptance), _of_row(group.knowledge))

    def wanted(self, draftings: Sequence[Drafting | None], behind: Sequence[int] = ()) -> int:
        """How many guesses to ask for each row's, of those that run a token; 0: none are worth the asking.

        behind  of each row, tokens that it runs again first
        """
        if self._num_idle:
            self._num_idle -= 1
            return 0
        behind = behind or [0] * len(draftings)
        counts = [
            0 if drafting is None else MAX_DRAFT - late
            for drafting, late in zip(draftings, behind, strict=True)
        ]
        known = max((drafting.knowledge.share for drafting in draftings if drafting is not None), default=0.0)
        width = self._width(draftings, counts, behind, self._guessing_s(draftings), known)
        if width == 1 and not any(behind) and self._steps.age(len(behind)) <= self._max_age:
            self._num_idle = NUM_IDLE
        return width - 1

    def width(
        self, draftings: Sequence[Drafting | None], counts: Sequence[int], behind: Sequence[int] = ()
    ) -> int:
        """Tokens a row that the step is to run, given how many guesses there are for each; 1: nobody guesses."""
        return self._width(draftings, counts, behind or [0] * len(counts), {}, 1.0)

    def note_step(self, num_rows: int, width: int, num_drawn: int, seconds: float) -> None:
        """A step of so many rows has drawn so many tokens and did nothing else; guessing not counted."""
        if width == 1:
            self._note_plain(num_rows, seconds)
        self._steps.note(num_rows * width, seconds)
        self._settle(num_rows, num_drawn, None if width == 1 else seconds)
        if width == 1:
            self._allow(TRIAL_SHARE)

    def _note_plain(self, num_rows: int, seconds: float) -> None:
        """How soon it is to be known anew what such a step takes."""
        before_s = self._steps.of(num_rows)
        if before_s is None or self._steps.age(num_rows) <= self._max_age:
            return
        least, most = PLAIN_EVERY
        is_same = before_s / SAME_TIME < seconds < before_s * SAME_TIME
        self._max_age = min(self._max_age * 2, most) if is_same else least

    def note_rerun(self, num_rows: int, num_drawn: int, seconds: float) -> None:
        """A step without guesses took so long, for rows ran again what they had given back."""
        self._settle(num_rows, num_drawn, seconds)

    def _settle(self, num_rows: int, num_drawn: int, seconds: float | None) -> None:
        """What a step has gained, or lost, is allowed. `seconds`: None: as long as any without guesses."""
        plain_s, guessed_s = self._steps.of(num_rows), self._guessed_s
        self._guessed_s = 0.0
        if plain_s is not None:
            spent_s = guessed_s + (plain_s if seconds is None else seconds)
            self._allow(num_drawn / num_rows - spent_s / plain_s)

    def skip_step(self) -> None:
        """A step did other things too, so what it took says nothing, nor what was guessed for it."""
        self._guessed_s = 0.0

    def note_guessing(self, name: str, num_rows: int, count: int, seconds: float) -> None:
        """A drafter was asked for so many guesses of so many rows each."""
        self._guessing.setdefault(name, StepTimes(GUESSING_EXPONENT)).note(num_rows * count, seconds)
        self._guessed_s += seconds

    def note_asked(self, drafting: Drafting, adapter: str, is_known: bool) -> None:
        """A row's drafter was asked, and knew something, or nothing."""
        drafting.knowledge.note(1, is_known)
        self._group(drafting.name, adapter).knowledge.note(1, is_known)

    def note_draft(self, drafting: Drafting, adapter: str, num_drafted: int, num_right: int) -> None:
        """A row's guesses have been checked."""
        drafting.num_drafts += 1
        drafting.num_drafted += num_drafted
        drafting.num_right += num_right
        drafting.acceptance.note(num_drafted, num_right)
        self._group(drafting.name, adapter).acceptance.note(num_drafted, num_right)

    def _width(
        self,
        draftings: Sequence[Drafting | None],
        counts: Sequence[int],
        behind: Sequence[int],
        guessing_s: Mapping[int, float],
        known: float,
    ) -> int:
        """`known`: how often those counts are there, once they are asked for."""
        num_rows = len(counts)
        if not any(counts):
            return 1
        plain_s, least = self._steps.of(num_rows), 1 + max(behind)
        longest = max(count + late for count, late in zip(counts, behind, strict=True))
        if plain_s is None:  # the first steps: they are timed
            return 1
        shares = [drafting.acceptance.share if drafting else 0.0 for drafting in draftings]
        widths = [*(width for width in WIDTHS[1:] if least <= width <= longest), longest + 1]
        steps_s = [self._steps.of(num_rows * width) or plain_s for width in widths]
        plain_s = min(plain_s, *steps_s)
        best, most = 1, MIN_GAIN
        for width, step_s, tokens in zip(
            widths, steps_s, self._expected(shares, counts, widths), strict=True
        ):
            guessed_s = guessing_s.get(width, 0.0)
            gain = tokens / num_rows * plain_s / (step_s + guessed_s)
            if gain > most and known * (gain - 1) >= (1 - known) * guessed_s / plain_s:
                best, most = width, gain
        if best > 1:
            is_late = self._steps.age(num_rows) > self._max_age
            return 1 if is_late and least == 1 else best
        if least > 1:
            return 1
        is_tried = self._may_try(num_rows, plain_s, guessing_s, known)
        return min(TRIAL_WIDTH, longest + 1) if is_tried else 1

    def _expected(self, shares: Sequence[float], counts: Sequence[int], widths: Sequence[int]) -> list[float]:
        """By width, tokens of all rows together in one step."""
        at = [round(share * NUM_SHARES) for share in shares]
        found: list[float] = self._rates[np.asarray(widths)[:, None], counts, at].sum(axis=1).tolist()
        return found

    def _may_try(self, num_rows: int, plain_s: float, guessing_s: Mapping[int, float], known: float) -> bool:
        """Whether a trial's loss, if all guesses are wrong, is within what is allowed."""
        step_s = self._steps.of(num_rows * TRIAL_WIDTH)
        assert step_s is not None
        return known * (step_s / plain_s - 1) + guessing_s.get(TRIAL_WIDTH, 0.0) / plain_s <= self._allowance

    def _guessing_s(self, draftings: Sequence[Drafting | None]) -> dict[int, float]:
        """By width, what the drafters take for it; those that nobody has timed, nothing."""
        names: dict[str, int] = {}
        for drafting in draftings:
            if drafting is not None:
                names[drafting.name] = names.get(drafting.name, 0) + 1
        return {
            width: sum(
                self._guessing[name].of(num_rows * (width - 1)) or 0.0
                for name, num_rows in names.items()
                if name in self._guessing
            )
            for width in WIDTHS[1:]
        }

    def _allow(self, num_steps: float) -> None:
        self._allowance = max(min(self._allowance + num_steps, MAX_ALLOWANCE), -MAX_ALLOWANCE)

    def _group(self, name: str, adapter: str) -> _Group:
        key = (name, adapter)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(
                Acceptance(FIRST_SHARE * FIRST_WEIGHT, FIRST_WEIGHT, GROUP_MEMORY),
                Acceptance(FIRST_WEIGHT, FIRST_WEIGHT, GROUP_MEMORY),
            )
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(key)
        return group


@lru_cache
def rerun_rates() -> np.ndarray:
    """[width, guesses, share · NUM_SHARES] tokens a step of a row that gives back every block that was not all its
    own, in many steps of one width. A block that is filled and right ends a cycle: the row is behind by nothing."""
    share = np.linspace(0, 1, NUM_SHARES + 1)
    rates = np.ones((MAX_DRAFT + 2, MAX_DRAFT + 1, NUM_SHARES + 1))
    for width in range(2, MAX_DRAFT + 2):
        for count in range(1, width):
            tokens, steps = np.zeros((width + 1, len(share))), np.zeros((width + 1, len(share)))  # by behind
            for behind in reversed(range(width)):
                num_guesses = min(count, width - 1 - behind)
                steps[behind] = 1.0
                for right in range(num_guesses + 1):
                    is_all = right == num_guesses
                    chance = share**right * (1.0 if is_all else 1 - share)
                    after = behind + right + 1
                    is_over = is_all and after == width
                    tokens[behind] += chance * (right + 1 + (0.0 if is_over else tokens[after]))
                    steps[behind] += chance * (0.0 if is_over else steps[after])
            rates[width, count:] = tokens[0] / steps[0]
    return rates


@lru_cache
def block_rates() -> np.ndarray:
    """[width, guesses, share · NUM_SHARES] tokens of a row in one step: itself, and its guesses before the first
    wrong one."""
    share = np.minimum(np.linspace(0, 1, NUM_SHARES + 1), 0.999)
    checked = np.minimum(np.arange(MAX_DRAFT + 1), np.maximum(np.arange(MAX_DRAFT + 2)[:, None] - 1, 0))
    rates: np.ndarray = (1 - share ** (checked[..., None] + 1)) / (1 - share)
    return rates
