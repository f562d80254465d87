"""Token id → the bytes that it adds to a text. The one reading of a vocabulary, for streams and log-probabilities.

A tokenizer's own `decode` is the authority; where a token is less than a character and `decode` can only say U+FFFD,
its bytes are read from its name: byte-level alphabets (GPT-2) and byte fallback (`<0xE2>`, SentencePiece).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

REPLACEMENT = "\ufffd"
ANCHORS = ("a", "x", "1", "the")
"""Words to decode a token behind, so that it is not the first of its text."""
_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of every token of one tokenizer, read when first asked for and kept.

    `self[token_id]` are a token's bytes behind other text; `first(token_id)` at the very beginning of one, where
    SentencePiece-like decoders leave a space out. A special token adds nothing, nor does an id that has no token.
    Joined bytes of a whole answer, decoded as UTF-8 with errors replaced, are its text.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._vocabulary = _vocabulary(tokenizer)
        self._later: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}
        self._anchor = self._find_anchor()

    def showing(self, token_ids: Collection[int]) -> TokenBytes:
        """The same, but that of the special tokens these are no silent ones: their names are their texts."""
        special = self._vocabulary.special
        shown = {number: special[number].encode() for number in token_ids if number in special}
        return _Showing(self, shown) if shown else self

    def __getitem__(self, token_id: int) -> bytes:
        found = self._later.get(token_id)
        if found is None:
            found = self._later[token_id] = self._read(token_id, self._anchor)
        return found

    def first(self, token_id: int) -> bytes:
        """As `self[token_id]`, of a token that begins its text."""
        found = self._first.get(token_id)
        if found is None:
            found = self._first[token_id] = self._read(token_id, None)
        return found

    def is_silent(self, token_id: int) -> bool:
        """True for what is no part of any text: special tokens, and ids that have no token."""
        return token_id in self._vocabulary.special or self._vocabulary.name(token_id) is None

    def name(self, token_id: int, data: bytes) -> str:
        """How log-probabilities call a token that adds `data`: its text, half characters as \\xNN; a special token's
        own name."""
        special = self._vocabulary.special.get(token_id)
        return special if special is not None else data.decode("utf-8", "backslashreplace")

    def ids_of(self, text: str) -> tuple[int, ...]:
        """A text's tokens, without what a tokenizer puts before and behind it."""
        return tuple(self._vocabulary.encode(text))

    def special_id(self, text: str) -> int | None:
        """The special token that is written `text`, if there is one."""
        return next((number for number, name in self._vocabulary.special.items() if name == text), None)

    def _find_anchor(self) -> int | None:
        for word in ANCHORS:
            ids = self._vocabulary.encode(word)
            if ids and self._vocabulary.decode(ids[-1:]).strip() and not self.is_silent(ids[-1]):
                return ids[-1]
        return None

    def _read(self, token_id: int, anchor: int | None) -> bytes:
        vocabulary = self._vocabulary
        if token_id in vocabulary.special:
            return b""
        name = vocabulary.name(token_id)
        if name is None:
            return b""
        if isinstance(name, bytes):
            return name
        text = self._decoded(token_id, anchor)
        if REPLACEMENT not in text or REPLACEMENT in name:
            return text.encode("utf-8", "replace")
        if vocabulary.has_byte_fallback and (byte := _BYTE_NAME.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if vocabulary.is_byte_level and all(character in BYTE_OF for character in name):
            return bytes(BYTE_OF[character] for character in name)
        return text.encode("utf-8", "replace")

    def _decoded(self, token_id: int, anchor: int | None) -> str:
        decode = self._vocabulary.decode
        if anchor is None:
            return decode([token_id])
        before, both = decode([anchor]), decode([anchor, token_id])
        return both[len(before) :] if both.startswith(before) else decode([token_id])


class _Showing(TokenBytes):
    """As `TokenBytes.showing` says."""

    def __init__(self, tokens: TokenBytes, shown: Mapping[int, bytes]) -> None:
        self._vocabulary = tokens._vocabulary
        self._tokens, self._shown = tokens, shown

    def __getitem__(self, token_id: int) -> bytes:
        return self._shown[token_id] if token_id in self._shown else self._tokens[token_id]

    def first(self, token_id: int) -> bytes:
        return self._shown[token_id] if token_id in self._shown else self._tokens.first(token_id)

    def is_silent(self, token_id: int) -> bool:
        return token_id not in self._shown and self._tokens.is_silent(token_id)


class _Vocabulary:
    """What is asked of a tokenizer, whichever library it is of."""

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        name: Callable[[int], str | bytes | None],
        special: Mapping[int, str],
        decoders: frozenset[str],
    ) -> None:
        self.encode = encode
        self.decode = decode
        self.name = name
        self.special = special
        self.is_byte_level = "ByteLevel" in decoders
        self.has_byte_fallback = "ByteFallback" in decoders


def _vocabulary(tokenizer: TokenizerWrapper) -> _Vocabulary:
    python = tokenizer._tokenizer
    backend = getattr(python, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        added = backend.get_added_tokens_decoder()
        return _Vocabulary(
            encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
            decode=lambda ids: backend.decode(list(ids), skip_special_tokens=True),
            name=backend.id_to_token,
            special={number: token.content for number, token in added.items() if token.special},
            decoders=frozenset(_decoder_types(backend)),
        )
    return _Vocabulary(
        encode=lambda text: list(python.encode(text, add_special_tokens=False)),
        decode=lambda ids: str(python.decode(list(ids), skip_special_tokens=True)),
        name=lambda token_id: _slow_name(python, token_id),
        special=dict(zip(python.all_special_ids, python.all_special_tokens, strict=False)),
        decoders=frozenset({"ByteFallback"}),
    )


def _slow_name(python: Any, token_id: int) -> str | bytes | None:
    """A tokenizer written in Python names some tokens by their bytes, and raises where there is none."""
    try:
        name = python.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, ValueError, TypeError, OverflowError):
        return None
    return name if isinstance(name, bytes) else None if name is None else str(name)


def _decoder_types(backend: Tokenizer) -> Iterator[str]:
    if backend.decoder is None:
        return
    pending = [json.loads(backend.decoder.__getstate__())]
    while pending:
        part = pending.pop()
        yield part["type"]
        pending += part.get("decoders", [])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character → byte (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
"""The byte of each character of a byte-level vocabulary."""
