"""A tokenizer → llguidance's, which reads every token as the text that an answer shows for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from serve.model.token_bytes import TokenBytes

SAMPLES = ('{"a": 1, "b": [true, null]}', "yes", " x ", "\n  ", "é😀", "0.5e-10", "The answer: 42.", "<b>")
"""Texts that a tokenizer must give back byte for byte."""


class GrammarVocabulary:
    """One model's tokens, as masks know them."""

    def __init__(self, tokenizer: TokenizerWrapper, tokens: TokenBytes, size: int) -> None:
        """Takes seconds for a large vocabulary. `size`: of the logits, which may have room for more tokens than there
        are; those never come."""
        self.size = size
        texts = [b"" if tokens.is_silent(number) else tokens[number] for number in range(size)]
        silent = [number for number, text in enumerate(texts) if not text]
        ends = [number for number in tokenizer.eos_token_ids if number in set(silent)]
        self.end_id = (ends or silent or [size])[0]
        """By which llguidance says that an answer may end."""
        listed = _Listed(
            tokenizer, [*texts, b""][: max(size, self.end_id + 1)], silent or [size], self.end_id
        )
        self.tokenizer = _by_rust(tokenizer, texts, self.end_id) or LLTokenizer(cast(Any, listed))
        self.firsts = _firsts(tokens, texts)
        """[ceil(V / 32)] uint32: tokens that say at a text's beginning what they say elsewhere; None: all do."""

    @property
    def num_words(self) -> int:
        """Of a mask."""
        return -(-self.size // 32)


def _by_rust(tokenizer: TokenizerWrapper, texts: Sequence[bytes], end_id: int) -> LLTokenizer | None:
    """llguidance's own reading of a fast tokenizer, which needs no Python when masks are made; None where it reads
    anything otherwise than answers are written."""
    python = tokenizer._tokenizer
    if not isinstance(python, PreTrainedTokenizerFast) or end_id >= len(texts):
        return None
    try:
        found = from_tokenizer(python, n_vocab=len(texts), eos_token=end_id)
    except Exception:  # kinds that it does not know, and more tokens than logits
        return None
    if found.vocab_size != len(texts):
        return None
    agrees = all(
        found.decode_bytes([number]) == text if text else found.is_special_token(number)
        for number, text in enumerate(texts)
        if text or number == end_id
    )
    agrees = agrees and all(
        b"".join(texts[number] for number in found.tokenize_str(sample)) == sample.encode()
        for sample in SAMPLES
    )
    return found if agrees else None


class _Listed:
    """A vocabulary as llguidance takes it from Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: TokenizerWrapper, texts: Sequence[bytes], silent: Sequence[int], end_id: int
    ) -> None:
        self.tokens = texts
        self.special_token_ids = silent
        self.eos_token_id = end_id
        backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
        # A copy of its own: two threads may not use one.
        self._backend = Tokenizer.from_str(backend.to_str()) if isinstance(backend, Tokenizer) else None
        self._lock = threading.Lock()
        self._ids = {text: number for number, text in reversed(list(enumerate(texts))) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens whose bytes are the text's: the tokenizer's own where they are, else the longest from the left."""
        data = text.encode() if isinstance(text, str) else text
        if self._backend is not None:
            with self._lock:
                ids = self._backend.encode(data.decode("utf-8", "replace"), add_special_tokens=False).ids
            is_known = all(number < len(self.tokens) for number in ids)
            if is_known and b"".join(self.tokens[number] for number in ids) == data:
                return list(ids)
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            for stop in range(min(start + self._longest, len(data)), start, -1):
                if (number := self._ids.get(data[start:stop])) is not None:
                    ids.append(number)
                    start = stop
                    break
            else:
                break
        return ids


def _firsts(tokens: TokenBytes, texts: Sequence[bytes]) -> np.ndarray | None:
    spaced = [number for number, text in enumerate(texts) if text.startswith(b" ")]
    if all(tokens.first(number) == texts[number] for number in spaced[:64]):
        return None
    allowed = np.ones(-(-len(texts) // 32) * 32, dtype=bool)
    allowed[[number for number in spaced if tokens.first(number) != texts[number]]] = False
    return np.packbits(allowed, bitorder="little").view("<u4")
