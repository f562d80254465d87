"""The one prompt renderer: messages -> token ids as served, and the spans of them that a loss may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Supervised:
    """One training sequence; `spans` are half-open token ranges that loss may use."""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A tokenizer's chat template; `tokenizer` is mlx_lm's TokenizerWrapper."""

    hash: str

    def __init__(self, tokenizer: Any) -> None:
        raise NotImplementedError

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> tuple[int, ...]:
        """Token ids, as served. RequestError on template errors."""
        raise NotImplementedError

    def supervise(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        roles: Sequence[str] = ("assistant",),
        train_on_eos: str = "turn",
    ) -> list[Supervised]:
        """Training sequences of a conversation, each exactly what serving would see."""
        raise NotImplementedError
