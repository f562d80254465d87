"""Which tokens of prompts a step computes: sequences in their turn in, chunks out. No arrays, and no mlx."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from serve.cache.features import FeatureKey
from serve.engine.budget import Budget
from serve.engine.plan import Chunk, Encode, Restore, SequenceState
from serve.engine.providers import Features, Prefixes

MAX_SCORES = 1 << 23
"""Tokens of a forward times the positions that they look back on, of each head: backends without a kernel for it hold
all of them at once. Up to LEAST_CHUNK tokens are computed in any case."""
LEAST_CHUNK = 256
ALONE_TOKENS = 64
"""A chunk that would be computed in a step of its own costs about so many tokens more: what padding may take."""
MAX_SKIPPED = 4
"""Prompts that do not fit beside a step's others and are passed in it by those behind them."""


class Prefill(NamedTuple):
    """What one step computes of prompts."""

    restores: list[Restore]
    """The prefixes before its chunks."""
    chunks: list[Chunk]
    encodes: list[Encode]
    """Pictures for chunks to come."""


class PromptChunks:
    """Makes the chunks of each step's prompts."""

    def __init__(self, budget: Budget, prefixes: Prefixes, features: Features) -> None:
        self._budget = budget
        self._prefixes = prefixes
        self._features = features

    def make(self, order: Iterable[SequenceState], max_tokens: int, *, is_guessing: bool) -> Prefill:
        """The coming step's, padding included at most `max_tokens`. Holds features and prefixes.

        Rows are padded to the longest, and padding counts. A prefix is looked for when its row's turn has come, so
        that it may be what a neighbour has just computed. A row whose next token is a picture's that is not encoded
        waits, and lets others pass.
        In one step all chunks of recurrent rows have one length, and either all of them begin a sequence or none
        does: nothing may be padded there, and a row that begins has no state yet.

        is_guessing  decoding rows have drafts in this step
        """
        restores: list[Restore] = []
        chunks: list[Chunk] = []
        padded = _Padded(max_tokens)  # those of the second forward
        encodes = _Encodes(self._budget.encode_patches)
        num_skipped = 0
        for sequence in order:
            if padded.is_full or num_skipped > MAX_SKIPPED:
                break
            is_first = sequence.num_planned_tokens == 0 and not sequence.is_scoring
            prefix = self._prefixes.find(sequence) if is_first else None
            start = prefix.num_tokens if prefix else sequence.num_planned_tokens
            reach = self._reach(sequence, start, max_tokens)
            stop = self._sighted(sequence, start, reach, encodes)
            chunk = self._next_chunk(sequence, start, stop, padded, is_guessing) if stop > start else None
            if chunk is None:
                if prefix is not None:
                    self._prefixes.release(prefix)
                num_skipped += stop > start
                continue
            if prefix is not None:
                restores.append(Restore(sequence, prefix))
            chunks.append(chunk)
            if not self.is_single(chunk, is_guessing=is_guessing):
                padded.chunks.append(chunk)
        return Prefill(restores, chunks, encodes.planned)

    def is_single(self, chunk: Chunk, *, is_guessing: bool) -> bool:
        """Whether it runs beside decoding rows. A recurrent row that begins may not, for it has no state yet; nor may
        one go on where those guess, for it would be padded, and never come on."""
        return chunk.num_tokens == 1 and not ((chunk.begins or is_guessing) and self._budget.is_recurrent)

    def _reach(self, sequence: SequenceState, start: int, max_tokens: int) -> int:
        """Where the chunk that begins at `start` ends, if it is alone in its step and all pictures are encoded."""
        most = min(max_tokens, self._budget.row_chunk_tokens or max_tokens)
        most = min(most, max(MAX_SCORES // sequence.num_tokens, LEAST_CHUNK))
        stop = min(sequence.num_tokens, start + most)
        for end in (sequence.quantize_after, sequence.num_shared_tokens):
            if start < end:
                stop = min(stop, end)
        prompt = sequence.request.prompt
        stop = prompt.whole(stop)
        return stop if stop > start else prompt.block_stop(start)

    def _sighted(self, sequence: SequenceState, start: int, stop: int, encodes: _Encodes) -> int:
        """Before which of tokens [start, stop) features are missing. They are asked for; `stop` if none are."""
        if start >= sequence.num_sighted_tokens:
            return stop
        prompt, end = sequence.request.prompt, stop
        for number, media in enumerate(prompt.media):
            first = media.first_in(start, stop)
            if first is None or number in sequence.held or self._features.hold(sequence, number):
                continue
            encodes.ask(sequence, number)
            end = min(end, first)
        return prompt.whole(end)

    def _next_chunk(
        self, sequence: SequenceState, start: int, stop: int, padded: _Padded, is_guessing: bool
    ) -> Chunk | None:
        """The chunk, or as much of it as can be beside the others; None where nothing can."""
        chunk = _chunk(sequence, start, stop - start)
        if not padded.chunks or self.is_single(chunk, is_guessing=is_guessing):
            return chunk
        if self._budget.is_recurrent:
            first = padded.chunks[0]
            width = first.num_tokens
            is_cut = sequence.request.prompt.whole(start + width) < start + width
            if chunk.num_tokens < width or chunk.begins != first.begins or is_cut:
                return None
            chunk = _chunk(sequence, start, width)
        return chunk if padded.takes(chunk) else None


class _Padded:
    """The chunks of one forward, padded to the longest of them."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.chunks: list[Chunk] = []

    @property
    def width(self) -> int:
        """Of the forward as it is."""
        return max((chunk.num_tokens for chunk in self.chunks), default=0)

    @property
    def is_full(self) -> bool:
        """No further chunk has room, however short."""
        return self.width * (len(self.chunks) + 1) > self.max_tokens

    def takes(self, chunk: Chunk) -> bool:
        """Whether one more has room, and would not cost more here than in a step of its own."""
        before, width = self.width, max(self.width, chunk.num_tokens)
        num_tokens = width * (len(self.chunks) + 1)
        longest = max(chunk.stop, *(one.stop for one in self.chunks))
        is_dear = num_tokens - before * len(self.chunks) > 2 * chunk.num_tokens + ALONE_TOKENS
        return num_tokens <= min(self.max_tokens, max(MAX_SCORES // longest, LEAST_CHUNK)) and not is_dear


class _Encodes:
    """What one step encodes: as much as the budget of patches has room for, or one picture of any size."""

    def __init__(self, max_patches: int) -> None:
        self.planned: list[Encode] = []
        self._num_patches_left = max_patches
        self._keys: set[FeatureKey] = set()

    def ask(self, sequence: SequenceState, number: int) -> None:
        """Plan it, if there is room for it, and nobody else has asked for the same."""
        key, num_patches = sequence.feature_key(number), sequence.request.prompt.media[number].num_patches
        if key in self._keys or (self.planned and num_patches > self._num_patches_left):
            return
        self._keys.add(key)
        self._num_patches_left -= num_patches
        self.planned.append(Encode(sequence, number))


def _chunk(sequence: SequenceState, start: int, num_tokens: int) -> Chunk:
    stop = start + num_tokens
    return Chunk(sequence, start, stop, begins=start == 0, draws=stop == sequence.num_tokens)
