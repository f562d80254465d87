"""Rows of many requests in, their vectors out, in pieces that hold up a running stream no longer than one piece.

Rows of one length run beside each other. Requests take turns: each piece begins with the oldest row of the next
request, so that one of thousands of texts keeps nobody out. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import numpy as np

from serve.embed.model import Encoded, Rows, TextModel
from serve.errors import GenerationError, LatheError, OverloadedError

Run = Callable[[Callable[[], None]], None]
"""Runs a function on the thread that owns the arrays, and waits for it."""


@dataclass
class DeskStats:
    """What has been encoded."""

    num_rows: int = 0
    num_tokens: int = 0
    num_padding: int = 0
    num_pieces: int = 0


@dataclass(eq=False)
class _Asked:
    """A request that has rows which have not run."""

    model: TextModel
    rows: Sequence[Encoded]
    done: asyncio.Future[None]
    waiting: deque[int]
    """Of its rows, those that are in no piece yet."""
    results: list[Rows | None]
    num_open: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_open = len(self.rows)


class EncodeDesk:
    """For one event loop."""

    def __init__(self, run: Run, piece_tokens: int, max_waiting: int) -> None:
        """piece_tokens: of one piece at most, padding included; or one row of any length. max_waiting: rows."""
        self._run = run
        self._piece_tokens = piece_tokens
        self._max_waiting = max_waiting
        self._asked: deque[_Asked] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._one = anyio.CapacityLimiter(1)
        self.stats = DeskStats()

    @property
    def num_waiting(self) -> int:
        """Rows that are in no piece yet."""
        return sum(len(asked.waiting) for asked in self._asked)

    async def encode(self, model: TextModel, rows: Sequence[Encoded]) -> Rows:
        """[len(rows), O]. Cancelled, it takes its rows back. OverloadedError, and what the engine's end raises."""
        if self._asked and self.num_waiting + len(rows) > self._max_waiting:
            raise OverloadedError(
                f"{self.num_waiting} texts wait to be encoded already; this server takes {self._max_waiting} at most"
            )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked = _Asked(model, rows, done, deque(range(len(rows))), [None] * len(rows))
        self._asked.append(asked)
        if self._pump is None:
            self._pump = asyncio.ensure_future(self._pumping())
        try:
            await done
        finally:
            if asked in self._asked:
                self._asked.remove(asked)
        return np.stack([result for result in asked.results if result is not None])

    async def _pumping(self) -> None:
        try:
            while self._asked:
                await self._piece(self._next_piece())
        finally:
            self._pump = None

    def _next_piece(self) -> list[tuple[_Asked, int]]:
        """The next request's oldest row, and those of its model that are nearest in length, as many as may run."""
        first = self._asked[0]
        index = first.waiting[0]
        wanted = len(first.rows[index].token_ids)
        others = [
            (len(asked.rows[i].token_ids), order, asked, i)
            for order, asked in enumerate(self._asked)
            if asked.model is first.model
            for i in asked.waiting
            if not (asked is first and i == index)
        ]
        others.sort(key=lambda each: (abs(each[0] - wanted), each[1], each[3]))
        piece, width = [(first, index)], wanted
        for length, _, asked, i in others:
            wider = max(width, length)
            if wider * (len(piece) + 1) > self._piece_tokens:
                break
            piece.append((asked, i))
            width = wider
        taken: dict[int, set[int]] = {}
        for asked, i in piece:
            taken.setdefault(id(asked), set()).add(i)
        for asked in self._asked:
            if chosen := taken.get(id(asked)):
                asked.waiting = deque(i for i in asked.waiting if i not in chosen)
        self._asked.rotate(-1)
        self._asked = deque(asked for asked in self._asked if asked.waiting)
        return piece

    async def _piece(self, piece: Sequence[tuple[_Asked, int]]) -> None:
        model = piece[0][0].model
        rows = [asked.rows[index] for asked, index in piece]
        found: list[Rows] = []
        try:
            await anyio.to_thread.run_sync(
                lambda: self._run(lambda: found.append(model.run(rows))), limiter=self._one
            )
        except Exception as error:  # whatever it is, those who wait must hear of it
            failure = (
                error if isinstance(error, LatheError) else GenerationError(f"encoding has failed: {error!r}")
            )
            for asked, _ in piece:
                _end(asked, failure)
            self._asked = deque(asked for asked in self._asked if not asked.done.done())
            return
        self._count(rows)
        for (asked, index), result in zip(piece, found[0], strict=True):
            if not np.isfinite(result).all():
                _end(
                    asked,
                    GenerationError(f"{model.name!r} gives numbers that are not finite of text {index}"),
                )
                continue
            asked.results[index] = result
            asked.num_open -= 1
            if not asked.num_open and not asked.done.done():
                asked.done.set_result(None)
        self._asked = deque(asked for asked in self._asked if not asked.done.done())

    def _count(self, rows: Sequence[Encoded]) -> None:
        lengths = [len(row.token_ids) for row in rows]
        self.stats.num_pieces += 1
        self.stats.num_rows += len(rows)
        self.stats.num_tokens += sum(lengths)
        self.stats.num_padding += len(rows) * max(lengths) - sum(lengths)


def _end(asked: _Asked, error: LatheError) -> None:
    if not asked.done.done():
        asked.done.set_exception(error)
