"""Log-probabilities as OpenAI's two endpoints write them.

A token's `bytes` are what it adds to the text, so those of an answer join to the text's bytes, up to the stop string
that ended it; a token that adds nothing (the end of turn) has none. Half a character's name is written \\xNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.engine.request import TokenLogprob
from serve.engine.text import TextDecoder
from serve.model.token_bytes import TokenBytes

NO_PROBABILITY = -9999.0
"""What vLLM writes for minus infinity, which JSON has no number for."""


class LogprobWriter:
    """Writes one choice's entries, in the order of its tokens. `follows` as TextDecoder takes it."""

    def __init__(self, tokens: TokenBytes, follows: Sequence[int] | None) -> None:
        self._tokens = tokens
        self._decoder = TextDecoder(tokens, follows)

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The `logprobs` object of a chat choice."""
        content = []
        for entry in entries:
            top = [self._entry(token_id, logprob) for token_id, logprob in entry.top]
            content.append({**self._entry(entry.token_id, entry.logprob), "top_logprobs": top})
            self._decoder.push(entry.token_id)
        return {"content": content, "refusal": None}

    def completion(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The `logprobs` object of a completion choice; offsets are characters of the choice's text."""
        names: list[str] = []
        offsets: list[int] = []
        tops: list[dict[str, float]] = []
        for entry in entries:
            names.append(self._name(entry.token_id))
            offsets.append(self._decoder.offset_of(entry.token_id))
            tops.append(self._top(entry))
            self._decoder.push(entry.token_id)
        return {
            "tokens": names,
            "token_logprobs": [_number(entry.logprob) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The same of a prompt that stands before its answer; nothing is known of its first token."""
        names, offsets = [self._name(token_ids[0])], [0]
        self._decoder.push(token_ids[0])
        found = self.completion(entries)
        return {
            "tokens": names + found["tokens"],
            "token_logprobs": [None, *found["token_logprobs"]],
            "top_logprobs": [None, *found["top_logprobs"]],
            "text_offset": offsets + found["text_offset"],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By name; of two tokens with one name the likelier, which comes first."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            top.setdefault(self._name(token_id), _number(logprob))
        return top

    def _name(self, token_id: int) -> str:
        return self._tokens.name(token_id, self._decoder.bytes_of(token_id))

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._decoder.bytes_of(token_id)
        return {
            "token": self._tokens.name(token_id, data),
            "bytes": list(data),
            "logprob": _number(logprob),
        }


def prompt_logprobs(
    tokens: TokenBytes, entries: Sequence[TokenLogprob], count: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of each token, by id, itself and the `count` likeliest; none of the first."""
    found: list[dict[str, Any] | None] = [None]
    for entry in entries:
        ranked = [*enumerate(entry.top[:count], start=1), (entry.rank, (entry.token_id, entry.logprob))]
        found.append(
            {
                str(token_id): {
                    "logprob": _number(logprob),
                    "rank": rank,
                    "decoded_token": tokens.name(token_id, tokens[token_id]),
                }
                for rank, (token_id, logprob) in ranked
            }
        )
    return found


def _number(logprob: float) -> float:
    return logprob if logprob > NO_PROBABILITY else NO_PROBABILITY
