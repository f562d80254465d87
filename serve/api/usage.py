"""What a request used, as OpenAI's chat and completions say it."""

from __future__ import annotations

from typing import Any

from serve.api.turn import Turn


def usage_of(turn: Turn, *, has_answer: bool = True) -> dict[str, Any]:
    """The `usage` of all of it, as far as it has come. has_answer: False where no token counts as an answer."""
    generation = turn.generation
    return usage(
        turn, generation.num_answer_tokens * has_answer, num_reasoning_tokens=generation.num_reasoning_tokens
    )


def usage(turn: Turn, num_answer_tokens: int, *, num_reasoning_tokens: int) -> dict[str, Any]:
    """The `usage` of so many tokens of an answer."""
    details = _answer_details(turn, num_reasoning_tokens)
    return {
        "prompt_tokens": turn.num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": turn.num_prompt_tokens + num_answer_tokens,
        "prompt_tokens_details": {"cached_tokens": turn.generation.num_cached_tokens},
        **({"completion_tokens_details": details} if details else {}),
    }


def _answer_details(turn: Turn, num_reasoning_tokens: int) -> dict[str, int]:
    """What is said of the answers' tokens: how many think, where they are told apart, and how many were guessed,
    as far as rows have ended, where somebody guesses."""
    generation = turn.generation
    details = {"reasoning_tokens": num_reasoning_tokens} if generation.has_thoughts else {}
    if not generation.has_drafter:
        return details
    return details | {
        "accepted_prediction_tokens": generation.num_accepted,
        "rejected_prediction_tokens": generation.num_drafted - generation.num_accepted,
    }
