"""How far to guess, over given times and luck: no arrays, no clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest

from serve.engine.drafts import Drafting
from serve.engine.gains import FRESH, MAX_DRAFT, NUM_SHARES, WIDTHS, Gains, StepTimes, rerun_rates

Machine = Callable[[int], float]
"""Tokens → seconds of a step."""

MACHINES: dict[str, Machine] = {
    "a cpu": lambda tokens: 0.025 + 0.0025 * tokens,
    "a slow cpu": lambda tokens: 0.03 * tokens**0.8,
    "a laptop's gpu": lambda tokens: 0.012 + 0.0003 * tokens,
    "a large gpu": lambda tokens: 0.006 + 0.00001 * tokens,
}


class Nobody:
    """A drafter that is never asked: the test's luck is."""

    max_bytes = num_bytes = 0

    def propose(self, wanted):
        raise NotImplementedError

    def forget(self, sequence):
        raise NotImplementedError

    def clear(self, tenant):
        raise NotImplementedError


@dataclass
class Decode:
    """Rows that are replaced by others when they have said `length` tokens."""

    machine: Machine
    num_rows: int
    share: float
    """How often a guess is right."""
    known: float = 1.0
    """How often there is one."""
    guess_s: float = 0.0
    """What a guess takes, for all rows."""
    seed: int = 0
    length: int = 120
    reruns: bool = False
    """A block that is not all a row's own is given back, and what was right of it run again."""
    gains: Gains | None = None
    slowness: Callable[[int], float] = lambda number: 1.0
    """Of the machine in a step, that others use too: so many times as long."""
    seconds: float = 0.0
    plain_s: float = 0.0
    """What as many tokens would have taken without guesses."""
    num_tokens: int = 0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.gains = self.gains or Gains(reruns=self.reruns)
        self.rows = [[self.begin(), self.rng.randrange(self.length), 0] for _ in range(self.num_rows)]

    def begin(self) -> Drafting:
        return self.gains.begin("nobody", Nobody(), "")

    def run(self, num_tokens: int) -> None:
        until = self.num_tokens + num_tokens
        while self.num_tokens < until:
            self.step()

    def step(self) -> None:
        gains, rng = self.gains, self.rng
        draftings, behind = [row[0] for row in self.rows], [row[2] for row in self.rows]
        wanted, width, counts = gains.wanted(draftings, behind), 1, [0] * self.num_rows
        if wanted:
            self.seconds += self.guess_s * wanted
            gains.note_guessing("nobody", self.num_rows, wanted, self.guess_s * wanted)
            counts = [min(wanted, MAX_DRAFT - late) if rng.random() < self.known else 0 for late in behind]
            for drafting, count in zip(draftings, counts, strict=True):
                gains.note_asked(drafting, "", count > 0)
            width = gains.width(draftings, counts, behind)
        drawn = 0
        for row, count in zip(self.rows, counts, strict=True):
            drafted, right = max(min(count, width - 1 - row[2]), 0), 0
            while right < drafted and rng.random() < self.share:
                right += 1
            if drafted:
                gains.note_draft(row[0], "", drafted, right)
            drawn += right + 1
            row[1] += right + 1
            is_exact = right == drafted and row[2] + 1 + drafted == width
            row[2] = 0 if is_exact or width == 1 or not self.reruns else row[2] + right + 1
            if row[1] >= self.length:
                row[:] = self.begin(), 0, 0
        noise = rng.uniform(0.97, 1.03) * self.slowness(self.num_steps)
        if width == 1 and any(behind):
            lengths = Counter(behind)
            took_s = noise * sum(self.machine(count * (late + 1)) for late, count in lengths.items())
            gains.note_rerun(self.num_rows, drawn, took_s)
        else:
            took_s = noise * self.machine(self.num_rows * width)
            gains.note_step(self.num_rows, width, drawn, took_s)
        self.seconds += took_s
        self.plain_s += drawn / self.num_rows * self.machine(self.num_rows) * self.slowness(self.num_steps)
        self.num_tokens += drawn
        self.num_steps += 1

    @property
    def rate(self) -> float:
        """Against decoding without guesses."""
        return self.plain_s / self.seconds


class Fixed(Gains):
    """Always so wide."""

    def __init__(self, most: int, *, reruns: bool) -> None:
        super().__init__(reruns=reruns)
        self.most = most

    def wanted(self, draftings, behind=()):
        return self.most - 1

    def width(self, draftings, counts, behind=()):
        return self.most


@cache
def best_rerun_rate(machine: Machine, num_rows: int, share: float, guess_s: float) -> float:
    """Of rows that give blocks back: of the width that is best on that machine, tried one after the other."""

    def rate(width: int) -> float:
        gains = Fixed(width, reruns=True)
        decode = Decode(machine, num_rows, share, guess_s=guess_s, reruns=True, gains=gains)
        decode.run(400 * num_rows)
        return decode.rate

    return max(map(rate, WIDTHS))


def best_rate(decode: Decode) -> float:
    """Of the width that is best on that machine, for all steps alike."""
    if decode.reruns:
        return best_rerun_rate(decode.machine, decode.num_rows, decode.share, decode.guess_s)

    def rate(width: int) -> float:
        count, share = width - 1, decode.share
        mean = sum(share**number for number in range(count + 1))
        return (
            mean
            * decode.machine(decode.num_rows)
            / (decode.machine(decode.num_rows * width) + decode.guess_s * count)
        )

    return max(map(rate, WIDTHS))


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("guess_s", [0.0, 0.002, 0.02])
@pytest.mark.parametrize("reruns", [False, True])
def test_guesses_that_are_wrong_cost_little(machine, num_rows, share, guess_s, reruns):
    decode = Decode(machine, num_rows, share, guess_s=guess_s, reruns=reruns)
    decode.run(600 * num_rows)
    assert decode.rate > 0.97


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_rows_that_give_blocks_back_guess_only_where_running_them_again_pays(machine, num_rows, share):
    decode = Decode(machine, num_rows, share, reruns=True)
    decode.run(1200 * num_rows)
    assert decode.rate > 0.97


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("guess_s", [0.0, 0.002])
@pytest.mark.parametrize("reruns", [False, True])
def test_guesses_that_are_right_are_made_as_far_as_is_best(machine, num_rows, share, guess_s, reruns):
    decode = Decode(machine, num_rows, share, guess_s=guess_s, reruns=reruns)
    decode.run(600 * num_rows)
    assert decode.rate > 0.85 * best_rate(decode)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reruns", [False, True])
def test_what_begins_to_pay_is_found_out_and_what_ends_to_pay_is_left(machine, seed, reruns):
    decode = Decode(machine, 4, 0.0, seed=seed, reruns=reruns)
    decode.run(2000)
    for share in (0.95, 0.0, 0.95):
        decode.share = share
        decode.run(1500)  # until that is noticed
        decode.seconds = decode.plain_s = 0.0
        decode.num_tokens = 0
        decode.run(3000)
        assert decode.rate > (0.7 * best_rate(decode) if share else 0.97)


@pytest.mark.parametrize("reruns", [False, True])
def test_a_guess_that_few_rows_have_is_not_paid_for_by_all(reruns):
    decode = Decode(MACHINES["a slow cpu"], 16, 0.9, known=0.05, reruns=reruns)
    decode.run(8000)
    assert decode.rate > 0.97


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("guess_s", [0.0001, 0.001])
def test_asking_who_knows_nothing_costs_little(machine, num_rows, guess_s):
    decode = Decode(machine, num_rows, 0.9, known=0.0, guess_s=guess_s)
    decode.run(600 * num_rows)
    assert decode.rate > 0.97


@pytest.mark.parametrize("machine", ["a cpu", "a laptop's gpu"])
@pytest.mark.parametrize("num_rows", [8, 16])
@pytest.mark.parametrize("share", [0.1, 0.25])
@pytest.mark.parametrize(("slow", "period"), [(3, 20), (6, 40), (8, 60)])
def test_a_machine_that_others_slow_down_is_no_reason_to_guess(machine, num_rows, share, slow, period):
    """What steps of one width take is known of when they ran last, and the machine may have been slower then."""
    decode = Decode(
        MACHINES[machine],
        num_rows,
        share,
        known=0.8,
        guess_s=0.00003,
        slowness=lambda number: 2.0 if number % period < slow else 1.0,
    )
    decode.run(1200 * num_rows)
    assert decode.rate > 0.95


@pytest.mark.parametrize("width", [2, 5, 16])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.94])
def test_what_a_row_gets_that_gives_blocks_back_is_what_is_thought(width, share):
    decode = Decode(lambda tokens: 1.0, 1, share, reruns=True, gains=Fixed(width, reruns=True), length=10**9)
    decode.run(20_000)
    expected = rerun_rates()[width, width - 1, round(share * NUM_SHARES)]
    assert decode.num_tokens / decode.seconds == pytest.approx(expected, rel=0.03)


def test_times_between_measured_ones_are_between_them():
    times = StepTimes()
    assert times.of(3) is None
    times.note(8, 0.4)
    assert times.of(8) == 0.4
    assert times.of(1) < 0.4 < times.of(64)
    times.note(32, 0.9)
    assert 0.4 < times.of(16) < 0.9
    times.note(32, 5.0)  # somebody else was busy
    assert times.of(32) == 0.9
    for _ in range(FRESH):
        times.note(8, 0.4)
    assert times.age(32) == FRESH
    times.note(32, 2.0)  # and is so still
    assert times.of(32) == 2.0


def test_no_step_is_wider_than_can_be_drafted():
    assert max(WIDTHS) - 1 == MAX_DRAFT
    decode = Decode(MACHINES["a large gpu"], 1, 0.999)
    decode.run(500)
    assert decode.gains.wanted([decode.rows[0][0]]) == MAX_DRAFT
