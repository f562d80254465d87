"""Real segments in the tree and on disk: bit for bit, whatever the rows are made of."""

from __future__ import annotations

import random

import numpy as np
import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip

from serve.cache.disk import Disk
from serve.cache.precision import PLAIN, precision
from serve.cache.prefix import PrefixCache, Space
from serve.cache.segment import Segment
from serve.cache.segment_bytes import SegmentCodec
from tests.children.kept import values_of

FORMS = {"plain": PLAIN, "8 bit": precision(8), "3.5 bit": precision(3.5)}
HEADS, DIM, WINDOW = 2, 64, 8


def segment(tokens, start: int, dtype, form, *, keeps_state: bool) -> Segment:
    """As a row gives it: its numbers depend on the tokens before them."""

    def numbers(width, kind):
        seeds = values_of(tokens)[start:, None, None].astype(np.uint64)  # [T, 1, 1]
        factors = np.arange(1, HEADS * width + 1, dtype=np.uint64).reshape(1, HEADS, width)
        values = mx.array((seeds * factors % 2**32).astype(np.uint32)).swapaxes(0, 1)  # [H, T, width]
        return mx.contiguous(values if kind == mx.uint32 else (values % 1000 / 7).astype(kind))

    if form.is_plain:
        full = (numbers(DIM, dtype), numbers(DIM, dtype))
    elif form.scheme == "affine":
        full = tuple(numbers(width, kind) for width, kind in ((16, mx.uint32), (1, dtype), (1, dtype)) * 2)
    else:
        full = tuple(numbers(width, kind) for width, kind in ((7, mx.uint32), (1, mx.float16)) * 2)
    window = tuple(mx.contiguous(numbers(DIM, dtype)[:, -WINDOW:]) for _ in range(2))
    state = (mx.full((3, 5), len(tokens), dtype),) if keeps_state else ()
    made = Segment(
        form,
        len(tokens) - start,
        {0: full},
        {1: window},
        {2: state} if state else {},
        min(WINDOW, len(tokens) - start),
        keeps_state,
    )
    mx.eval(made.arrays())
    return made


def same(one: Segment, other: Segment) -> bool:
    """All bits."""
    ours, theirs = one.arrays(), other.arrays()
    return (
        one.meta() == other.meta()
        and ours.keys() == theirs.keys()
        and all(
            ours[name].dtype == theirs[name].dtype
            and ours[name].shape == theirs[name].shape
            and bool((ours[name].view(mx.uint8) == theirs[name].view(mx.uint8)).all())
            for name in ours
        )
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_segments_come_back_bit_for_bit_after_a_restart(tmp_path, dtype, form):
    space = Space("base", "", FORMS[form].label)
    tokens = [random.randrange(1000) for _ in range(40)]
    made = segment(tokens, 0, dtype, FORMS[form], keeps_state=True)
    odd = made.full[0][0]
    if odd.dtype != mx.uint32:
        odd[0, 0, :3] = mx.array([float("nan"), float("inf"), -0.0], odd.dtype)
        mx.eval(odd)
    for _ in range(2):
        disk = Disk(tmp_path, 1 << 30, "base", SegmentCodec())
        cache = PrefixCache(max_bytes=1 << 30, window=WINDOW, has_state=True, disk=disk)
        match = cache.match(space, tokens, 40)
        if match is None:
            cache.insert(space, tokens, 0, made)
        else:
            assert match.num_disk_tokens == 40
            assert same(match.segments[0], made)
            cache.release(match)
        cache.close()
    assert match is not None


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_segments_are_those_of_the_whole(tmp_path, form):
    """Random texts that share beginnings, cut by each other, evicted, read again: each position's numbers stay."""
    rng = random.Random(form)
    space = Space("base", "", FORMS[form].label)
    base = [rng.randrange(1000) for _ in range(60)]
    texts = [
        [*base[: rng.randrange(60)], *(rng.randrange(1000) for _ in range(rng.randrange(1, 30)))]
        for _ in range(12)
    ]
    num_disk_tokens = 0
    for _ in range(2):
        disk = Disk(tmp_path, 1 << 30, "base", SegmentCodec())
        cache = PrefixCache(max_bytes=100_000, window=WINDOW, disk=disk)
        for tokens in [*texts, *texts]:
            known = cache.known(space, tokens)
            if known < len(tokens):
                made = segment(tokens, known, mx.bfloat16, FORMS[form], keeps_state=False)
                cache.insert(space, tokens, known, made)
            assert disk.flush()
            match = cache.match(space, [*tokens, 5], len(tokens))
            if match is not None:
                num_disk_tokens += match.num_disk_tokens
                whole = segment(tokens[: match.num_tokens], 0, mx.bfloat16, FORMS[form], keeps_state=False)
                joined = [
                    mx.concatenate(parts, axis=1)
                    for parts in zip(*(one.full[0] for one in match.segments), strict=True)
                ]
                for ours, theirs in zip(joined, whole.full[0], strict=True):
                    ours = ours[:, : match.num_tokens]
                    assert (ours.view(mx.uint8) == theirs.view(mx.uint8)).all()
                cache.release(match)
            cache.check_integrity()
            cache.shrink(100_000)
            assert cache.num_bytes <= 100_000
        cache.close()
    assert num_disk_tokens > 100


def test_what_a_cut_leaves_does_not_hold_on_to_the_rest():
    made = segment(list(range(1000)), 0, mx.float32, PLAIN, keeps_state=False)
    first, second = made.cut(10)
    assert first.num_bytes + second.num_bytes == made.num_bytes
    del made
    before = mx.get_active_memory()
    num_bytes = second.num_bytes
    del second
    assert before - mx.get_active_memory() >= num_bytes
    assert first.num_tokens == 10
