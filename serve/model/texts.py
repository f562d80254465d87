"""Plain text that is no chat -> token ids with one beginning, as training and serving both read it."""

from __future__ import annotations

from typing import Any


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids as the tokenizer begins a text; `tokenizer` is mlx_lm's TokenizerWrapper.

    A text that brings the beginning-of-text token itself does not get a second one.
    """
    ids = tuple(tokenizer.encode(text))
    begin = tokenizer.bos_token_id
    return ids[1:] if begin is not None and ids[:2] == (begin, begin) else ids


def brings_beginning(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer would begin this text a second time."""
    begin = tokenizer.bos_token_id
    return begin is not None and tuple(tokenizer.encode(text[:64]))[:2] == (begin, begin)


def brings_end(tokenizer: Any, text: str) -> bool:
    """Whether a text closes itself: nothing but white space stands after its last special token."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    begin, ends = tokenizer.bos_token_id, set(tokenizer.eos_token_ids)
    closing = tuple(
        token.content
        for number, token in added.items()
        if int(number) in ends or (token.special and int(number) != begin)
    )
    return bool(closing) and text.rstrip().endswith(closing)
