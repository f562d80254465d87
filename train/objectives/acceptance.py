"""How often a drafter guesses right: a network and a teacher's answers in, shares of tokens out.

A guess is made as serving makes it, after the answer's own tokens: the likeliest token (greedy), or the drafter's own
draw by the random number that the teacher's token is drawn by (coupled; Daliri, Musco and Suresh 2024, "Coupling
without communication and drafter-invariant speculative decoding"). An answer's first token comes with its prompt and
is never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from serve.engine.request import Sampling
from serve.engine.sampler import Sampler
from serve.model.network import Network
from train.loop.loss import Losses, chunk_rows, chunks, hidden_at

WAYS = ("coupled", "greedy")
NUM_GUESSES = 4
"""In a row, as a step of serving has them."""


@dataclass
class Acceptance:
    """Counts by way of guessing, added up over answers."""

    num_guessed: int = 0
    """Tokens of answers, but for their first."""
    num_right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    num_rounds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    """Steps with guesses that the answers take."""
    num_accepted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    """Guesses that those steps accept."""

    def add(self, is_right: Mapping[str, np.ndarray]) -> None:
        """One answer: by way, whether a guess of each of its tokens [n] bool would be right."""
        self.num_guessed += len(is_right[WAYS[0]]) - 1
        for way in WAYS:
            rounds, accepted = rounds_of(is_right[way].tolist())
            self.num_right[way] += int(is_right[way][1:].sum())
            self.num_rounds[way] += rounds
            self.num_accepted[way] += accepted

    def as_sums(self) -> dict[str, float]:
        """For adding up over processes."""
        named = {"right": self.num_right, "rounds": self.num_rounds, "accepted": self.num_accepted}
        sums = {f"{name}/{way}": float(counts[way]) for name, counts in named.items() for way in WAYS}
        return {"guessed": float(self.num_guessed), **sums}


def measures_of(sums: Mapping[str, float]) -> dict[str, float]:
    """What people are shown of `Acceptance.as_sums`, by way: the share of tokens that are guessed right, and how many
    of `NUM_GUESSES` in a row are accepted, a mean over the rounds that answers take. 0 where nothing is guessed."""
    measures = {}
    for way in WAYS:
        measures[f"acceptance/{way}"] = sums[f"right/{way}"] / (sums["guessed"] or 1.0)
        measures[f"accepted_of_{NUM_GUESSES}/{way}"] = sums[f"accepted/{way}"] / (
            sums[f"rounds/{way}"] or 1.0
        )
    return measures


def rounds_of(is_right: Sequence[bool], num_guesses: int = NUM_GUESSES) -> tuple[int, int]:
    """(rounds, guesses accepted in them) of one answer: each round accepts guesses up to the first wrong one, and
    ends with the teacher's token in its place, or behind the last."""
    position, rounds, accepted = 1, 0, 0
    while position < len(is_right):
        guesses = is_right[position : position + num_guesses]
        count = next((number for number, is_fine in enumerate(guesses) if not is_fine), len(guesses))
        rounds, accepted = rounds + 1, accepted + count
        position += count + 1
    return rounds, accepted


def guesses_of(
    network: Network,
    inputs: Mapping[str, Any],
    settings: Sequence[Sampling],
    counters: Sequence[int],
    losses: Losses,
) -> tuple[float, dict[str, np.ndarray]]:
    """(sum of the targets' losses; by way, whether each target [N] would be guessed).

    inputs    tokens [B, T], positions [N] and token_ids [N] of the targets, as arrays
    settings  [N], how each target was drawn; its seed among them
    counters  [N], as how manieth token of its answer, from 0
    The module is in the mode the caller has put it in.
    """
    hidden = hidden_at(network, inputs["tokens"], inputs["positions"])
    total = 0.0
    right: dict[str, list[np.ndarray]] = {way: [] for way in WAYS}
    for rows in chunks(len(settings), chunk_rows(network.vocab_size)):
        logits = network.logits(hidden[rows]).astype(mx.float32)
        greedy = mx.argmax(logits, axis=-1)
        coupled = Sampler(settings[rows]).tokens(logits, counters[rows])
        loss, ids = losses(logits, rows).sum(), inputs["token_ids"][rows]
        found = {"coupled": mx.equal(coupled, ids), "greedy": mx.equal(greedy, ids)}
        mx.eval(loss, found)
        total += float(np.array(loss))
        for way, is_right in found.items():
            right[way].append(np.array(is_right))
    return total, {way: np.concatenate(parts) for way, parts in right.items()}
