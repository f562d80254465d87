"""Chat rows whose token lengths are lognormal, as those of real conversations are. A tokenizer in, a JSONL file out.

Few rows are much longer than most, which is what makes padding expensive. The same seed gives the same rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serve.bench.prompts import WORDS
from serve.errors import ConfigError
from serve.model.template import ChatTemplate

EXCHANGES = ((1, 0.6), (2, 0.25), (3, 0.15))
"""(questions with their answers in a chat, share of the chats)."""
ANSWER_SHARE = (0.4, 0.8)
"""Bounds of the part of an exchange's words that is the answer."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a chat: median and spread of a lognormal, cut at `longest`."""

    median: float = 80.0
    sigma: float = 0.8
    longest: int = 512

    @property
    def mean(self) -> float:
        """Of the lognormal; the cut at `longest` is left out."""
        return self.median * float(np.exp(self.sigma**2 / 2))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count] int64 tokens."""
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return np.minimum(drawn, self.longest).astype(np.int64)


def write_chats(path: Path, count: int, lengths: Lengths, template: ChatTemplate, seed: int = 0) -> None:
    """`count` rows of {"messages": …} that this tokenizer renders to about the lengths drawn.

    ConfigError if the tokenizer has no chat template.
    """
    if not template.exists:
        raise ConfigError("--model: its tokenizer has no chat template; expected a chat model")
    rng = np.random.default_rng(seed)
    num_exchanges = rng.choice([n for n, _ in EXCHANGES], size=count, p=[share for _, share in EXCHANGES])
    cost = _Cost.of(template, rng)
    rows = []
    for tokens, exchanges in zip(lengths.draw(count, rng), num_exchanges, strict=True):
        num_words = max(round((tokens - cost.fixed - exchanges * cost.per_exchange) / cost.per_word), 0)
        rows.append({"messages": _chat(rng, int(exchanges), num_words)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _chat(rng: np.random.Generator, num_exchanges: int, num_words: int) -> list[dict[str, str]]:
    """Turns of at least one word, `num_words` in all where that is more."""
    cuts = np.sort(rng.integers(0, num_words + 1, num_exchanges - 1))
    messages = []
    for part in np.diff([0, *cuts, num_words]):
        num_answer = round(part * rng.uniform(*ANSWER_SHARE))
        messages.append({"role": "user", "content": _text(rng, part - num_answer)})
        messages.append({"role": "assistant", "content": _text(rng, num_answer)})
    return messages


def _text(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, max(int(num_words), 1)))


@dataclass(frozen=True)
class _Cost:
    """How a rendered chat's tokens grow with its exchanges and words."""

    fixed: float
    per_exchange: float
    per_word: float

    @classmethod
    def of(cls, template: ChatTemplate, rng: np.random.Generator) -> _Cost:
        """Measured on chats of one and two exchanges, short and long."""
        short, long, double = (
            np.mean([len(template.render(_chat(rng, exchanges, words))) for _ in range(8)])
            for exchanges, words in ((1, 40), (1, 240), (2, 240))
        )
        per_word, per_exchange = (long - short) / 200, double - long
        return cls(float(short - 40 * per_word - per_exchange), float(per_exchange), float(per_word))
