"""A tokenizer → llguidance's, which reads every token as the text that an answer shows for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import numpy as np
from llguidance import LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from serve.model.token_bytes import TokenBytes

NO_TEXT = b"\xff"
"""Is in no UTF-8; llguidance knows special tokens by it."""
NUM_SAMPLES = 512
"""Tokens by which a tokenizer shows whether it writes the first of a text otherwise."""


class GrammarVocabulary:
    """One model's tokens, as masks know them."""

    def __init__(self, tokenizer: TokenizerWrapper, tokens: TokenBytes, size: int) -> None:
        """Takes seconds for a large vocabulary. `size`: of the logits, which may have room for more tokens than there
        are; those never come."""
        self.size = size
        texts = [b"" if NO_TEXT in text else text for text in (tokens[number] for number in range(size))]
        silent = [number for number, text in enumerate(texts) if not text]
        self.silent = frozenset(silent)
        """Tokens without text."""
        self._joined = NO_TEXT + NO_TEXT.join(texts) + NO_TEXT
        self._ends_at = np.cumsum([len(text) + 1 for text in texts])  # [V], of each in `_joined`
        ends = [number for number in tokenizer.eos_token_ids if number in self.silent]
        self.end_id = (ends or silent or [size])[0]
        """By which llguidance says that an answer may end."""
        names = {number: tokens.name(number, b"").encode() for number in silent}
        listed = [names.get(number, text) for number, text in enumerate([*texts, b""])]
        # Room for tokens that there are not has no name, and would be the beginning of any special token's.
        special = [*(number for number in silent if names[number]), self.end_id]
        self.tokenizer = LLTokenizer(
            cast(Any, _Listed(listed[: max(size, self.end_id + 1)], special, self.end_id))
        )
        self.firsts = _firsts(tokens, texts)
        """[ceil(V / 32)] uint32: tokens that say at a text's beginning what they say elsewhere; None: all do."""

    @property
    def num_words(self) -> int:
        """Of a mask."""
        return -(-self.size // 32)

    def all_but(self, token_ids: Collection[int]) -> np.ndarray:
        """[ceil(V / 32)] uint32."""
        allowed = np.ones(32 * self.num_words, dtype=bool)
        allowed[list(token_ids)] = False
        return np.packbits(allowed, bitorder="little").view("<u4")

    def holding(self, text: bytes) -> set[int]:
        """Tokens that hold this, and more behind it. Takes a tenth of a millisecond at 150,000 tokens."""
        return set(self._followed(text))

    def ending(self, text: bytes) -> set[int]:
        """Tokens that begin with an end of this, and hold more behind it. Takes as much for each byte of it."""
        return {number for at in range(len(text)) for number in self._followed(NO_TEXT + text[at:])}

    def _followed(self, part: bytes) -> Iterator[int]:
        at = self._joined.find(part)
        while at >= 0:
            if self._joined[at + len(part)] != NO_TEXT[0]:
                yield int(np.searchsorted(self._ends_at, at + part.startswith(NO_TEXT), side="right"))
            at = self._joined.find(part, at + 1)


class _Listed:
    """A vocabulary as llguidance takes it from Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, texts: Sequence[bytes], special: Sequence[int], end_id: int) -> None:
        """`special`: those that are no text, and have names here."""
        self.tokens = texts
        self.special_token_ids = special
        self.eos_token_id = end_id

    def __call__(self, text: str | bytes) -> list[int]:
        """Nobody asks: grammars here force no tokens, so a mask lets through whatever spells what may come."""
        raise NotImplementedError


def _firsts(tokens: TokenBytes, texts: Sequence[bytes]) -> np.ndarray | None:
    said = [number for number, text in enumerate(texts) if text]
    spaced = [number for number in said if texts[number].startswith(b" ")]
    sample = {*said[:: len(said) // NUM_SAMPLES + 1], *spaced[:NUM_SAMPLES]}
    if all(tokens.first(number) == texts[number] for number in sample):
        return None
    allowed = np.ones(-(-len(texts) // 32) * 32, dtype=bool)
    allowed[[number for number in said if tokens.first(number) != texts[number]]] = False
    return np.packbits(allowed, bitorder="little").view("<u4")
