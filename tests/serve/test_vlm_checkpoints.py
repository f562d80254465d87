"""The tiny checkpoints of mlx-vlm's families: real enough that what is proven on them means something."""

from __future__ import annotations

from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from vlm_families import LARGE_VLM_FAMILIES, chats_of, message, picture


def rows_of(reference, family):
    return [reference.row(chat) for chat in chats_of(family).values()]


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_answers_of_the_tiny_models_vary_and_hang_on_the_picture(family, vlm_reference):
    reference = vlm_reference(family)
    for row in rows_of(reference, family):
        assert len(set(reference.greedy(row, 16))) >= 4
    one, two = (reference.logits(reference.row([message(picture(seed), "what is this?")])) for seed in (1, 2))
    assert mx.abs(one - two).max().item() > 0.3


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_the_reference_is_what_mlx_vlm_generates(family, vlm_reference):
    from mlx_vlm.generate import generate_step

    reference = vlm_reference(family)
    for row in rows_of(reference, family):
        if family == "gemma3" and row.inputs:
            continue  # whose pictures mlx-vlm lets see themselves one way: see test_vlm_transformers.py
        expected = reference.logits(row, reference.greedy(row, 6)[:-1])
        ids, inputs = mx.array([row.token_ids]), dict(row.inputs)
        steps = generate_step(
            ids,
            reference.model,
            inputs.pop("pixel_values", None),
            mx.ones_like(ids),
            max_tokens=6,
            temperature=0.0,
            **inputs,
        )
        found = [logprobs for _, logprobs in islice(steps, 6)]
        expected = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(mx.stack(found), expected, atol=1e-4)


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_a_merged_adapter_moves_the_reference(family, vlm_reference, make_vlm_adapter):
    rows = rows_of(vlm_reference(family), family)
    merged = vlm_reference(family, make_vlm_adapter(family, 1))
    for row in rows:
        moved = mx.abs(merged.logits(row) - vlm_reference(family).logits(row)).max().item()
        assert moved > 0.3
