"""The desk takes turns: nobody starves, pieces are bounded, whoever leaves takes the rest along."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from serve.embed.desk import EncodeDesk
from serve.embed.model import Encoded, Rows
from serve.errors import GenerationError, OverloadedError, StoppedError


class Summing:
    """A model whose vector of a text is the sum of its tokens, and what it ran."""

    name = "sums"

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def run(self, rows: Sequence[Encoded]) -> Rows:
        self.pieces.append([len(row.token_ids) for row in rows])
        return np.array([[sum(row.token_ids)] for row in rows], np.float32)


def rows(lengths: Sequence[int], token: int = 1) -> list[Encoded]:
    return [Encoded((token,) * length, length) for length in lengths]


def at_once(work: Callable[[], None]) -> None:
    work()


def test_every_row_gets_its_own_vector_in_pieces_no_larger_than_allowed() -> None:
    model, desk = Summing(), EncodeDesk(at_once, 64, 10_000)
    asked = [rows(random.choices(range(1, 90), k=random.randint(1, 40)), i + 1) for i in range(20)]

    async def all_of_them() -> list[Rows]:
        return await asyncio.gather(*(desk.encode(model, each) for each in asked))

    for found, each in zip(asyncio.run(all_of_them()), asked, strict=True):
        assert found[:, 0].tolist() == [sum(row.token_ids) for row in each]
    for piece in model.pieces:
        assert len(piece) == 1 or max(piece) * len(piece) <= 64
    assert sum(map(len, model.pieces)) == sum(map(len, asked)) == desk.stats.num_rows
    assert desk.num_waiting == 0
    # Rows of one length run beside each other.
    assert desk.stats.num_padding < 0.25 * desk.stats.num_tokens


def test_one_text_does_not_wait_for_thousands() -> None:
    model, desk = Summing(), EncodeDesk(at_once, 40, 10_000)

    async def small_after_large() -> int:
        large = asyncio.ensure_future(desk.encode(model, rows([10] * 2000)))
        while not model.pieces:
            await asyncio.sleep(0)
        before = len(model.pieces)
        await desk.encode(model, rows([35], token=2))
        ran = len(model.pieces) - before
        large.cancel()
        return ran

    assert asyncio.run(small_after_large()) <= 4


def test_whoever_leaves_takes_what_has_not_run_along() -> None:
    model, desk = Summing(), EncodeDesk(at_once, 40, 10_000)

    async def leave() -> None:
        asked = asyncio.ensure_future(desk.encode(model, rows([40] * 100)))
        staying = asyncio.ensure_future(desk.encode(model, rows([40] * 3)))
        while len(model.pieces) < 4:
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait({asked})
        assert (await staying).shape == (3, 1)
        assert desk.num_waiting == 0

    asyncio.run(leave())
    assert len(model.pieces) < 20


def test_models_share_no_piece() -> None:
    one, other, desk = Summing(), Summing(), EncodeDesk(at_once, 1000, 10_000)

    async def both() -> None:
        await asyncio.gather(desk.encode(one, rows([5] * 8)), desk.encode(other, rows([5] * 9)))

    asyncio.run(both())
    assert (sum(map(len, one.pieces)), sum(map(len, other.pieces))) == (8, 9)


class Poisoned(Summing):
    """Of token 13 it makes no number; of 14 it fails."""

    def run(self, rows: Sequence[Encoded]) -> Rows:
        found = super().run(rows)
        if any(14 in row.token_ids for row in rows):
            raise ValueError("fourteen")
        for index, row in enumerate(rows):
            if 13 in row.token_ids:
                found[index] = np.nan
        return found


@pytest.mark.parametrize(
    ("token", "words", "others_go_on"), [(13, "not finite", True), (14, "fourteen", False)]
)
def test_a_row_that_fails_is_told_to_who_asked(token: int, words: str, others_go_on: bool) -> None:
    model, desk = Poisoned(), EncodeDesk(at_once, 100, 10_000)

    async def both() -> list[object]:
        first = await asyncio.gather(
            desk.encode(model, [*rows([5] * 3), *rows([5], token)]),
            desk.encode(model, rows([5] * 3)),
            return_exceptions=True,
        )
        return [*first, await desk.encode(model, rows([5]))]

    bad, beside, after = asyncio.run(both())
    assert isinstance(bad, GenerationError)
    assert words in str(bad)
    assert isinstance(beside, np.ndarray) == others_go_on
    assert isinstance(after, np.ndarray)


def test_what_the_engine_s_end_raises_reaches_everyone() -> None:
    def stopped(_: Callable[[], None]) -> None:
        raise StoppedError("the engine is not running")

    model, desk = Summing(), EncodeDesk(stopped, 10, 10_000)

    async def several() -> list[object]:
        work = [desk.encode(model, rows([9] * 4)) for _ in range(3)]
        return await asyncio.gather(*work, return_exceptions=True)

    assert all(isinstance(each, StoppedError) for each in asyncio.run(several()))
    assert desk.num_waiting == 0


def test_more_than_may_wait_is_refused() -> None:
    model, desk = Summing(), EncodeDesk(at_once, 10, 20)

    async def too_many() -> None:
        first = asyncio.ensure_future(desk.encode(model, rows([9] * 20)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="at most"):
            await desk.encode(model, rows([9] * 20))
        assert (await first).shape == (20, 1)

    asyncio.run(too_many())
