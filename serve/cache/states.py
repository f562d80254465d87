"""Recurrent state of a batch: one layer's arrays, a row each, beside the rows of keys and values of other layers.

What a recurrent layer keeps of a sequence has one size at any length and holds every token it was ever given, so
it cannot be masked or trimmed afterwards. Hence two rules, which the scheduler keeps: no forward gives a row a token
that is not its own (the chunks of a step have one length, nothing is padded), and rows at their first token share
no forward with rows further on. Such a first forward finds no state, as in a fresh cache of mlx-lm, and the family's
own code makes the initial one: whatever a row's last sequence left is never read.

A forward may run tokens that turn out to be nobody's. It is told so beforehand (`hold`), and rows that have taken in
one of those go back to the state before it (`put_back`): arrays never change, so what was is held by reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from serve.cache.spans import Span
from serve.errors import ModelError


class StateRows(ArraysCache):
    """One layer's state: `size` arrays [C, ...], C rows or more of them in use.

    An ArraysCache to the family's code, whose `lengths` and `left_padding` stay None: no token is padding. Inside a
    forward `self[i]` is state i of the span's rows, [B, ...], or None at their first token.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.cache: list[mx.array | None] = [None] * size
        self.span: Span | None = None
        self._held: list[mx.array | None] = []

    def __getitem__(self, index: int) -> mx.array | None:
        span, buffer = self.span, self.cache[index]
        assert span is not None
        if buffer is None or span.is_first:
            return None
        return span.read_states(buffer)

    def __setitem__(self, index: int, value: mx.array) -> None:
        span, buffer = self.span, self.cache[index]
        assert span is not None
        if span.is_everything and span.num_tokens == 1:
            # Decode alone: the new state takes the old one's place, nothing is copied.
            self.cache[index] = value
            return
        if buffer is not None:
            _check_same(index, buffer, value)
        if span.is_everything:
            # Families hand over a view of all their tokens; its few rows must not keep the rest in memory.
            self.cache[index] = mx.contiguous(value)
            return
        buffer = _grown(buffer, span.num_state_rows, value)
        span.write_states(buffer, value)
        self.cache[index] = buffer

    # mlx-vlm's contract, where recurrent layers hand their states over by name.

    history_capacity = 0
    is_speculating = False
    metadata_revision = 0

    def update_window(
        self, index: int, source: mx.array, width: int, *, lengths: mx.array | None = None
    ) -> mx.array:
        """Keep the last `width` steps of source [B, S, ...]. Returns what is kept."""
        assert lengths is None, "no token is padding"
        window = mx.contiguous(source[:, source.shape[1] - width :])
        self[index] = window
        return window

    def update_recurrent(
        self, index: int, length: int, update: Callable[[mx.array | None, int | None], tuple[Any, ...]]
    ) -> tuple[mx.array, mx.array]:
        """Run `update(state, None)` → (output, new state, …) and keep the state. Returns output and new state."""
        output, state = update(self[index], None)[:2]
        self[index] = state
        return output, state

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with a step."""
        return [array for array in self.cache if array is not None]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(array.nbytes for array in self.state)

    def gather(self, rows: mx.array) -> list[mx.array]:
        """A copy of whole rows, lazily: what `scatter` puts elsewhere."""
        return [array[rows] for array in self.state]

    def scatter(self, rows: mx.array, copies: Sequence[mx.array], num_rows: int) -> None:
        """Overwrite whole rows with copies made before. There are at least `num_rows` afterwards."""
        held = [index for index, array in enumerate(self.cache) if array is not None]
        for index, values in zip(held, copies, strict=True):
            buffer = _grown(self.cache[index], num_rows, values)
            buffer[rows] = values
            self.cache[index] = buffer

    def take(self, row: int) -> tuple[mx.array, ...]:
        """A copy of one row's arrays, lazily."""
        return tuple(array[mx.array([row])][0] for array in self.state)

    def put(self, row: int, arrays: Sequence[mx.array]) -> None:
        """Overwrite one row."""
        for index, array in enumerate(arrays):
            buffer = _grown(self.cache[index], row + 1, array[None])
            buffer[row] = array
            self.cache[index] = buffer

    def hold(self) -> None:
        """Keep what rows are now, until `put_back`."""
        # A copy is another name of the same memory, whatever is written to the buffer of this name afterwards.
        self._held = [copy(array) if array is not None else None for array in self.cache]

    def put_back(self, rows: mx.array | None) -> None:
        """These rows are again what they were held as, lazily; None: none of them. Nothing is held any more."""
        for index, before in enumerate(self._held if rows is not None else ()):
            buffer = self.cache[index]
            if before is not None and buffer is not None:
                buffer[rows] = before[rows]
        self._held = []

    def clear(self) -> None:
        """Give the memory back."""
        self.cache = [None] * len(self.cache)
        self._held = []


def _grown(buffer: mx.array | None, num_rows: int, value: mx.array) -> mx.array:
    """A buffer of `num_rows` rows or more, each as one of `value`."""
    missing = num_rows - (0 if buffer is None else buffer.shape[0])
    if buffer is not None and missing <= 0:
        return buffer
    more = mx.zeros((missing, *value.shape[1:]), value.dtype)
    return more if buffer is None else mx.concatenate([buffer, more])


def _check_same(index: int, buffer: mx.array, value: mx.array) -> None:
    if buffer.shape[1:] != value.shape[1:] or buffer.dtype != value.dtype:
        raise ModelError(
            f"state {index} of a layer was {tuple(buffer.shape[1:])} {buffer.dtype} a row and became "
            f"{tuple(value.shape[1:])} {value.dtype}; a row of state must keep its shape"
        )
