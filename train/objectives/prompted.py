"""What learning from answers takes, whoever gives them: prompts as the engine takes them, seeds, batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve.errors import DataError
from serve.model.prompt import Prompt
from train.data.batches import Batch, padded_length
from train.data.row_media import Standing, media_array
from train.data.tokens import TokenizedExample

PAD_TO = 8
UNBOUNDED_BYTES = 1 << 62
"""Of an engine's budget: what happens to be free is not to decide who shares a batch, and so how a draw rounds."""


def prompt_of(row: TokenizedExample) -> Prompt:
    """A row of a prompt alone, as the engine takes it."""
    token_ids = tuple(row.token_ids.tolist())
    return Prompt(token_ids) if row.media is None else row.media.prompt(token_ids)


def seed_of(*numbers: int) -> int:
    """64 bits that follow from the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def batch_of(
    prompts: Sequence[TokenizedExample], answers: Sequence[Sequence[int]], row_ids: tuple[int, ...]
) -> Batch:
    """Prompts with their answers' tokens, which alone are targets; [0, T] of none."""
    lengths = np.array([len(p) + len(ids) for p, ids in zip(prompts, answers, strict=True)])
    shape = (len(prompts), int(padded_length(lengths.max(initial=0), PAD_TO)))
    tokens, is_target = np.zeros(shape, np.int32), np.zeros(shape, bool)
    standing: list[list[Standing]] = []
    for place, (prompt, token_ids) in enumerate(zip(prompts, answers, strict=True)):
        tokens[place, : len(prompt)] = prompt.token_ids
        media = prompt.media
        standing.append([Standing(0, int(lengths[place]), media)] if media is not None else [])
        tokens[place, len(prompt) : lengths[place]] = token_ids
        is_target[place, len(prompt) : lengths[place]] = True
    return Batch(
        tokens, is_target, int(is_target.sum()), int(lengths.sum()), row_ids, media=media_array(standing)
    )


def check_context(
    max_context: int, model: str, rows: Sequence[TokenizedExample], longest_answer: int, objective: str
) -> None:
    """DataError where a prompt leaves no room for an answer of `max_completion_length` in a model's context."""
    longest = max(rows, key=len)
    if len(longest) + longest_answer > max_context:
        raise DataError(
            f"{longest.source}:{longest.line}: the prompt has {len(longest)} tokens, which with "
            f"{objective}.max_completion_length {longest_answer} is more than {model}'s context of {max_context}; "
            f"set max_seq_length to at most {max_context - longest_answer}, which drops longer prompts"
        )
