"""Tokens that have come → what their logits are changed by: penalties, biases, and no end before `min_tokens`.

A logit l of token t becomes l + bias_t; then, if t is in repetition's reach, l / r where l > 0 and l · r elsewhere
(Keskar et al. 2019, as transformers, vLLM and mlx-lm have it); then l − f · (times t came in frequency's reach)
− p · (1 if it came in presence's), OpenAI's. That order is vLLM's and mlx-lm's.

The reach of repetition is prompt and answer (transformers', vLLM's), and of the other two the answer (OpenAI's,
vLLM's). A context size n makes it the last n tokens of prompt and answer, for each of the three, as in mlx-lm.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from serve.engine.request import Sampling
from serve.model.prompt import Prompt

MAX_FACTOR = 1e6
MAX_CHANGE = 1e9
"""Beyond them nothing else counts, and single precision ends."""


class TokenChanges(NamedTuple):
    """l → scaled(l + bias) − offset, for K tokens, none of them twice; scaled(l) is l / factor where l > 0, and
    l · factor elsewhere."""

    token_ids: np.ndarray
    """[K] int64"""
    biases: np.ndarray
    """[K] float32; -inf: it cannot come."""
    factors: np.ndarray
    """[K] float32"""
    offsets: np.ndarray
    """[K] float32"""


class Reach:
    """Which tokens a penalty looks at: how often each entry has come in it."""

    def __init__(self, window: int | None, num_prompt: int, *, has_prompt: bool) -> None:
        """window: the last so many of prompt and answer; None: the answer, behind the prompt where it counts."""
        self.window = window
        if window is not None:
            self.first = max(num_prompt - window, 0)
        else:
            self.first = 0 if has_prompt else num_prompt
        self.counts = np.zeros(0, dtype=np.int32)

    def start(self, num_tokens: int) -> int:
        """Where it begins when there are so many tokens."""
        return self.first if self.window is None else max(num_tokens - self.window, 0)


class Penalties:
    """Of one sequence. An entry is a token that has come or is named; it keeps its number. What the prompt holds is
    counted once for all answers to it."""

    def __init__(self, sampling: Sampling, prompt: Prompt, ends: Collection[int]) -> None:
        """ends: tokens that would end the answer, which `min_tokens` keeps from coming."""
        count = len(prompt.token_ids)
        self._sampling = sampling
        self._num_prompt = count
        self._tokens = list(prompt.token_ids)
        self._repetition = Reach(sampling.repetition_context_size, count, has_prompt=True)
        self._presence = Reach(sampling.presence_context_size, count, has_prompt=False)
        self._frequency = Reach(sampling.frequency_context_size, count, has_prompt=False)
        self._reaches = [
            reach
            for reach, is_used in (
                (self._repetition, sampling.repetition_penalty != 1),
                (self._presence, sampling.presence_penalty != 0),
                (self._frequency, sampling.frequency_penalty != 0),
            )
            if is_used
        ]
        self._ends = np.asarray(sorted(ends) if sampling.min_tokens else [], dtype=np.int64)
        self._begin(prompt)

    @staticmethod
    def are_wanted(sampling: Sampling) -> bool:
        """Whether a request asks for any of it."""
        return bool(
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or sampling.logit_bias
            or sampling.min_tokens
        )

    @property
    def num_answer_tokens(self) -> int:
        """How many have been pushed."""
        return len(self._tokens) - self._num_prompt

    def push(self, token_ids: Sequence[int]) -> None:
        """The answer goes on."""
        for token_id in token_ids:
            count = len(self._tokens)
            self._tokens.append(token_id)
            for reach in self._reaches:
                self._count(reach, count, 1)
                for position in range(reach.start(count), reach.start(count + 1)):
                    self._count(reach, position, -1)
        self._lift_or_lay_ban()

    def pop(self, count: int) -> None:
        """The answer's last tokens are taken back."""
        assert count <= self.num_answer_tokens, "the prompt stays"
        for _ in range(count):
            last = len(self._tokens) - 1
            for reach in self._reaches:
                self._count(reach, last, -1)
                for position in range(reach.start(last), reach.start(last + 1)):
                    self._count(reach, position, 1)
            self._tokens.pop()
        self._lift_or_lay_ban()

    def changes(self) -> TokenChanges | None:
        """Of the next token's logits. Views, until the next push or pop."""
        if not self._reaches and not self._sampling.logit_bias and not self._is_banning:
            return None
        count = self._num_entries
        if not count:
            return None
        return TokenChanges(
            self._ids[:count], self._biases[:count], self._factors[:count], self._offsets[:count]
        )

    @property
    def _is_banning(self) -> bool:
        return bool(self._ends.size) and self.num_answer_tokens < self._sampling.min_tokens

    @property
    def _num_entries(self) -> int:
        return len(self._of_prompt) + len(self._entry_of)

    def _begin(self, prompt: Prompt) -> None:
        """Entries of what the prompt holds in reach, and of what is named."""
        first = min((reach.first for reach in self._reaches), default=self._num_prompt)
        self._of_prompt, counts = prompt.tally if first == 0 else _tally(prompt.token_ids[first:])
        self._entry_of: dict[int, int] = {}
        """Of tokens that the prompt does not hold in reach."""
        named = [*(token_id for token_id, _ in self._sampling.logit_bias), *self._ends.tolist()]
        others = [token_id for token_id in dict.fromkeys(named) if self._place(token_id) is None]
        self._entry_of.update(zip(others, range(len(counts), len(counts) + len(others)), strict=True))
        size = self._num_entries
        self._ids = np.concatenate([self._of_prompt, np.asarray(others, dtype=np.int64)])
        self._own_biases = np.zeros(size, dtype=np.float32)
        for token_id, bias in self._sampling.logit_bias:
            self._own_biases[self._entry(token_id)] = _bounded(bias)
        self._biases = self._own_biases.copy()
        self._factors = np.ones(size, dtype=np.float32)
        self._offsets = np.zeros(size, dtype=np.float32)
        for reach in (self._repetition, self._presence, self._frequency):
            reach.counts = np.zeros(size, dtype=np.int32)
            if reach in self._reaches and reach.first == first:
                reach.counts[: len(counts)] = counts
            elif reach in self._reaches:
                ids, some = _tally(prompt.token_ids[reach.first :])
                reach.counts[np.searchsorted(self._of_prompt, ids)] = some
        self._refresh(slice(0, size))
        self._is_laid = False
        self._lift_or_lay_ban()

    def _count(self, reach: Reach, position: int, step: int) -> None:
        entry = self._entry(self._tokens[position])
        reach.counts[entry] += step
        self._refresh(entry)

    def _place(self, token_id: int) -> int | None:
        """The entry of a token that the prompt holds in reach."""
        at = int(np.searchsorted(self._of_prompt, token_id))
        return at if at < len(self._of_prompt) and self._of_prompt[at] == token_id else None

    def _entry(self, token_id: int) -> int:
        place = self._place(token_id)
        if place is not None:
            return place
        entry = self._entry_of.setdefault(token_id, self._num_entries)
        if entry == len(self._ids):
            self._grow()
        self._ids[entry] = token_id
        return entry

    def _grow(self) -> None:
        room = max(len(self._ids), 64)
        self._ids = np.pad(self._ids, (0, room))
        self._own_biases = np.pad(self._own_biases, (0, room))
        self._biases = np.pad(self._biases, (0, room))
        self._factors = np.pad(self._factors, (0, room), constant_values=1)
        self._offsets = np.pad(self._offsets, (0, room))
        for reach in (self._repetition, self._presence, self._frequency):
            reach.counts = np.pad(reach.counts, (0, room))

    def _refresh(self, entries: int | slice) -> None:
        sampling = self._sampling
        has_come = self._repetition.counts[entries] > 0
        factor = min(max(sampling.repetition_penalty, 1 / MAX_FACTOR), MAX_FACTOR)
        self._factors[entries] = np.where(has_come, factor, 1.0)
        of_frequency = _bounded(sampling.frequency_penalty) * self._frequency.counts[entries]
        of_presence = _bounded(sampling.presence_penalty) * (self._presence.counts[entries] > 0)
        self._offsets[entries] = of_frequency + of_presence

    def _lift_or_lay_ban(self) -> None:
        if self._is_laid == self._is_banning:
            return
        self._is_laid = self._is_banning
        entries = [self._entry(token_id) for token_id in self._ends.tolist()]
        self._biases[entries] = -np.inf if self._is_laid else self._own_biases[entries]


def _tally(token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)


def _bounded(change: float) -> float:
    return min(max(change, -MAX_CHANGE), MAX_CHANGE)
