"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from serve.engine.request import TokenLogprob

UNNAMED = "token_id:"


class TokenTexts:
    """Single tokens as text. Half a character has none, and is called token_id:N, as vLLM does."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._text = lru_cache(maxsize=1 << 16)(self._decode)

    def __getitem__(self, token_id: int) -> str:
        return self._text(token_id)

    def _decode(self, token_id: int) -> str:
        text = str(self._tokenizer.decode([token_id]))
        return f"{UNNAMED}{token_id}" if "\ufffd" in text else text


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    content = [
        {
            **_entry(texts[entry.token_id], entry.logprob),
            "top_logprobs": [_entry(texts[token], logprob) for token, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts, offset: int) -> dict[str, Any]:
    """The `logprobs` object of a completion choice; `offset` is where its first token stands in the text."""
    tokens = [texts[entry.token_id] for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{texts[token]: logprob for token, logprob in entry.top} for entry in entries],
        "text_offset": offsets,
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {
        "token": text,
        "bytes": None if text.startswith(UNNAMED) else list(text.encode()),
        "logprob": logprob,
    }
