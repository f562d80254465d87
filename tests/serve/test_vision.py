"""Media among text on this project's own rows: every family's row is what mlx-vlm's code makes of it alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from vision_rows import Batch, away, messages_for, prompt_of
from vlm_families import VLM_FAMILIES, Reference

from serve.model.loading import LoadedModel

ANSWER_TOKENS = 8
CAUSAL = tuple(family for family in VLM_FAMILIES if family != "gemma3")
"""Those whose attention mlx-vlm computes as they were trained."""


@pytest.mark.parametrize("family", CAUSAL)
def test_rows_with_media_in_one_batch_are_each_alone_in_mlx_vlm(
    family: str, opened: Callable[[str], LoadedModel], vlm_reference: Callable[..., Reference]
):
    reference, model = vlm_reference(family), opened(family)
    assert model.vision is not None
    pairs = [prompt_of(reference, model.vision, *parts) for parts in messages_for(family)]
    answers = [reference.greedy(row, ANSWER_TOKENS) for row, _ in pairs]
    expected = [reference.logits(row, answer) for (row, _), answer in zip(pairs, answers, strict=True)]
    batch = Batch(model, [prompt for _, prompt in pairs])
    found = [batch.prefill(random.Random(0), is_recurrent=family == "qwen3_5"), *batch.decode(answers)]
    for row in range(len(pairs)):
        for step in range(ANSWER_TOKENS + 1):
            assert away(found[step][row], expected[row][step]) < 1e-4, f"{family}: row {row}, token {step}"
