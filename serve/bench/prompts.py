"""Prompts of a wanted number of tokens, all different, so that no cache of whole prompts helps.

How many tokens a word makes is not known here: it is measured, by asking the server or a tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TEXT = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home
water room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city community name team minute
idea kid body back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force order plan road light voice table paper river
market garden window summer winter station engine letter color green blue white black small large early
late strong open simple local public major common
"""
WORDS = TEXT.split()


@dataclass(frozen=True)
class WordCost:
    """How a prompt's tokens grow with its words: `fixed` for the template, `per_word` on average."""

    fixed: float
    per_word: float

    def words_for(self, num_tokens: int) -> int:
        """The number of words that comes closest to `num_tokens`, at least 1."""
        return max(1, round((num_tokens - self.fixed) / self.per_word))


def fit(short: tuple[int, int], long: tuple[int, int]) -> WordCost:
    """The cost from two measured (words, tokens) pairs of different lengths."""
    per_word = max((long[1] - short[1]) / (long[0] - short[0]), 1e-6)
    return WordCost(fixed=short[1] - per_word * short[0], per_word=per_word)


CALIBRATION_WORDS = (16, 64)
CALIBRATION_SEED = 0xCA11


def calibrate(tokens_of: Callable[[str], int]) -> WordCost:
    """The cost by which prompts are sized. The same two prompts are counted each time, so whoever counts them alike
    makes prompts of the same words."""
    maker = PromptMaker(CALIBRATION_SEED)
    short, long = ((words, tokens_of(maker.prompt(words))) for words in CALIBRATION_WORDS)
    return fit(short, long)


class PromptMaker:
    """An endless supply of distinct prompts; the same seed gives the same ones."""

    def __init__(self, seed: int, words: Sequence[str] = WORDS) -> None:
        self._random = random.Random(seed)
        self._words = words

    def prompt(self, num_words: int) -> str:
        """`num_words` random words."""
        return " ".join(self._random.choice(self._words) for _ in range(num_words))
