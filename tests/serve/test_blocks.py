"""Blocks: tokens that see one another whatever their order, in the rows' own masks and in the trainer's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from vision_rows import Batch, away, messages_for, prompt_of
from vlm_families import Reference

from serve.cache.capacity import Bucket
from serve.cache.precision import PLAIN
from serve.cache.spans import Span, SpanPart
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.model.loading import LoadedModel, load
from serve.model.packed import packed_cache
from serve.model.prompt import Prompt
from serve.model.vision import Placed

Ranges = list[tuple[int, int]]


def random_blocks(rng: random.Random, start: int, stop: int) -> Ranges:
    """Up to two, which do not overlap."""
    cuts = sorted(rng.sample(range(start, stop + 1), min(4, stop - start + 1)))
    return [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if rng.random() < 0.7]


def sees(query: int, key: int, window: int | None, blocks: Ranges) -> bool:
    """The definition."""
    is_near = window is None or key > query - window
    return is_near and (key <= query or any(a <= query < b and a <= key < b for a, b in blocks))


@pytest.mark.parametrize("seed", range(40))
def test_a_spans_mask_is_causal_and_its_blocks(seed: int):
    """Rows of two buckets, in buffers as long as the rows and in rings."""
    rng = random.Random(seed)
    num_tokens, window = rng.randint(2, 12), rng.choice([None, 3, 7])
    buckets = [Bucket(PLAIN, 64), Bucket(PLAIN, 96)]
    parts, blocks = [], []
    for bucket in buckets:
        starts = [rng.randint(0, 40) for _ in range(rng.randint(1, 3))]
        parts.append(SpanPart(bucket, list(range(len(starts))), starts, [start == 0 for start in starts]))
        blocks += [random_blocks(rng, start, start + num_tokens) for start in starts]
    span = Span(parts, num_tokens, blocks=blocks)
    for run in span.runs:
        # A window's buffer has room for the window of a chunk's first token, and for the chunk.
        capacity = (
            run.bucket.num_positions if window is None else min(64, window + num_tokens + rng.randint(0, 9))
        )
        if run.sees_all(window, capacity):
            assert not any(blocks[run.batch])
            continue
        mask = np.array(run.mask(window, capacity))  # [b, 1, T, extent]
        for index, start in enumerate(run.starts.tolist()):
            last = start + num_tokens - 1
            held = {p % capacity if run.is_ring(capacity) else p: p for p in range(last + 1)}
            for token in range(num_tokens):
                for place in range(mask.shape[-1]):
                    key = held.get(place)
                    found = bool(mask[index, 0, token, place])
                    own = blocks[run.batch.start + index]
                    assert found == (key is not None and sees(start + token, key, window, own))


def test_a_decode_step_behind_blocks_is_causal():
    span = Span([SpanPart(Bucket(PLAIN, 64), [0], [0], [True])], 1, blocks=[[(0, 1)]])
    assert span.runs[0].block is not None
    assert span.next().runs[0].block is None


def test_a_block_that_is_cut_is_a_fault():
    with pytest.raises(AssertionError, match="a block is cut"):
        Span([SpanPart(Bucket(PLAIN, 64), [0], [4], [False])], 3, blocks=[[(2, 6)]])


def hidden_at_once(model: LoadedModel, prompt: Prompt) -> mx.array:
    """[T, D] as the trainer has it: the whole prompt in one forward, without rows."""
    assert model.vision is not None
    tokens = mx.array([prompt.token_ids])
    blocks = np.full((1, len(prompt.token_ids)), -1, dtype=np.int32)
    for number, (start, stop) in enumerate(prompt.blocks):
        blocks[0, start:stop] = number
    placed = [Placed(0, media.positions, model.vision.encode(media)) for media in prompt.media]
    cache = packed_cache(model.network, mx.zeros_like(tokens), mx.array(blocks))
    return model.network.hidden(tokens, cache, *model.vision.inputs(tokens, placed))[0]


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_rows_with_blocks_are_what_the_trainer_computes_of_them(
    family: str, opened: Callable[[str], LoadedModel], vlm_reference: Callable[..., Reference]
):
    """The engine in chunks beside other rows, the trainer at once; and both ways is not one way."""
    model = opened(family)
    assert model.vision is not None
    network = model.network
    prompts = [prompt_of(vlm_reference(family), model.vision, *parts)[1] for parts in messages_for(family)]
    found = Batch(model, prompts).prefill(random.Random(2), is_recurrent=False)
    for row, prompt in enumerate(prompts):
        expected = network.logits(hidden_at_once(model, prompt)[-1:])[0]
        assert away(found[row], expected) < 1e-4
        one_way = Prompt(prompt.token_ids, prompt.media, prompt.rope)
        causal = network.logits(hidden_at_once(model, one_way)[-1:])[0]
        assert (away(causal, expected) > 0.01) == bool(prompt.blocks)


@pytest.mark.parametrize(("family", "blocks"), [("paligemma", ((0, 3),)), ("qwen2_vl", ())])
def test_a_prompt_of_words_has_the_blocks_of_its_family(
    vlm_folder: Callable[[str], Path], family: str, blocks: tuple[tuple[int, int], ...]
):
    """Whoever asks for words alone makes no blocks; the engine knows what its model was trained with."""
    engine = Engine(load(str(vlm_folder(family))), EngineLimits(max_rows=1))
    try:
        request = engine.check(Request("r", Prompt((5, 6, 7)), Sampling(max_tokens=1)))
        assert request.prompt.blocks == blocks
    finally:
        engine.close()
