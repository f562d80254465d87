"""What messages say, kept apart from what a chat template writes: control tokens in a message stay words.

Before rendering, each control token inside a message loses its first character to a stand-in, a private-use character
that the conversation has nowhere else: no template and no tokenizer then takes it for one. After rendering, the
control tokens that are left are the template's own. Each is given a secret name, the words get their characters back,
and a twin of the tokenizer that knows control tokens by those names alone encodes the whole at once: joints, prefix
spaces and offsets are the tokenizer's own. It knows text and tokenizers; no messages' roles and no templates.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from serve.errors import RequestError

_SPARE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
SEPARATOR = "\0"
"""Between tokens that are searched at once; in none of them."""
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")


class ControlTokens:
    """Texts of tokens that only a template may write, and where they stand in a text."""

    def __init__(self, texts: Collection[str]) -> None:
        self.texts: frozenset[str] = frozenset(texts)
        self._longest = max(map(len, self.texts), default=0)
        self._token = re.compile(_any_of(self.texts))
        self._start = re.compile(f"(?={self._token.pattern})")

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """(where, which) from left to right, the longest first, none inside another: as a tokenizer takes them."""
        return ((found.start(), found.group()) for found in self._token.finditer(text))

    def starts(self, text: str) -> set[int]:
        """Where control tokens begin, inside each other too; and where one may, with what stands around the text."""
        starts = {found.start() for found in self._start.finditer(text)}
        num = len(text)
        lengths = range(1, min(num, self._longest - 1) + 1)
        starts |= {num - length for length in lengths if text[num - length :] in self._beginnings}
        if num and (self._holds(text) or any(text[:length] in self._ends for length in lengths)):
            starts.add(0)
        return starts

    def _holds(self, text: str) -> bool:
        """Whether the text stands inside a control token, and is more than a name."""
        return (
            len(text) < self._longest and _is_marked(text) and SEPARATOR not in text and text in self._joined
        )

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(filter(_is_marked, (t[:n] for t in self.texts for n in range(1, len(t)))))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(filter(_is_marked, (t[n:] for t in self.texts for n in range(1, len(t)))))

    @cached_property
    def _joined(self) -> str:
        return SEPARATOR.join(sorted(self.texts))


def _any_of(texts: Collection[str]) -> str:
    """A pattern of any of the texts, the longest first: one pass, however many there are and whatever it reads."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return _branches(tree) if tree else "(?!)"


def _branches(node: Mapping[str, Any]) -> str:
    paths = [re.escape(character) + _branches(rest) for character, rest in node.items() if character]
    if "" not in node and len(paths) == 1:
        return paths[0]
    return f"(?:{'|'.join(paths)})" + ("?" if "" in node else "") if paths else ""


def _is_marked(text: str) -> bool:
    """Whether it holds more than a name does: templates compare names, as `function` or `tool_calls`."""
    return re.search(r"\W", text) is not None


@dataclass(frozen=True)
class Veil:
    """The stand-ins of one conversation: what `hide` took out, `reveal` puts back."""

    stand_ins: Mapping[str, str]
    """Character -> private-use character."""

    def hide(self, text: str, control: ControlTokens, *, is_edged: bool = True) -> str:
        """The text with no control token left in it, as long as before.

        is_edged  also take out what could become one together with what a template writes around the text
        """
        starts = control.starts(text) if is_edged else {begin for begin, _ in control.find(text)}
        if not starts:
            return text
        characters = list(text)
        for start in starts:
            characters[start] = self.stand_ins[characters[start]]
        return "".join(characters)

    @cached_property
    def _originals(self) -> dict[int, str]:
        return {ord(stand_in): character for character, stand_in in self.stand_ins.items()}

    def reveal(self, text: str) -> str:
        """The text with the characters that were hidden."""
        return text.translate(self._originals)


def spare_characters(count: int, texts: Collection[str]) -> list[str]:
    """Private-use characters that occur in none of the texts. RequestError if there are too few."""
    used = {character for text in texts for character in _PRIVATE.findall(text)}
    free = (chr(code) for codes in _SPARE for code in codes if chr(code) not in used)
    found = [character for character, _ in zip(free, range(count), strict=False)]
    if len(found) < count:
        raise RequestError("found nearly all private-use characters of Unicode; send fewer", "messages")
    return found


class Encoder:
    """Text -> ids, by a tokenizer of transformers, with its offsets where it has any."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the text, and of nothing around it."""
        backend = _backend_of(self._tokenizer)
        if backend is not None:
            return tuple(backend.encode(text, add_special_tokens=False).ids)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_with_begins(self, text: str) -> tuple[tuple[int, ...], list[int] | None]:
        """Ids, and where in the text each token begins; None of a tokenizer that does not say."""
        encoded = self._tokenizer([text], add_special_tokens=False)
        begins = [begin for begin, _ in encoded.encodings[0].offsets] if encoded.is_fast else None
        return tuple(encoded["input_ids"][0]), begins


def _backend_of(tokenizer: Any) -> Tokenizer | None:
    """What encodes for transformers, where that adds nothing of its own: one text of a chat takes it a fifth longer,
    since it makes a batch of it, which goes to other threads. None where it has more to do."""
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if (
        not issubclass(kind, plain)
        or kind.encode is not plain.encode
        or kind._encode_plus is not plain._encode_plus
    ):
        return None
    found: Tokenizer = tokenizer.backend_tokenizer
    is_set_up = (
        found.truncation or found.padding or found.encode_special_tokens or tokenizer.split_special_tokens
    )
    return None if is_set_up else found


class NamedControl:
    """Secret names of control tokens: `name` puts them into a text, `encoder` reads them there.

    The names are drawn at random, so nothing that a client sends holds one.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens) -> None:
        """tokenizer: one of transformers, whose ids and ways the encoder has."""
        secret = secrets.token_hex(12)
        # Their ends are the tokens' own: a neighbour may ask whether it stands beside a letter.
        names = {
            text: f"{text[0]}q{secret}x{number:05}q{text[-1]}"
            for number, text in enumerate(sorted(control.texts))
        }
        has_backend = getattr(tokenizer, "backend_tokenizer", None) is not None
        self.encoder: _Twin | _Piecewise = (_Twin if has_backend else _Piecewise)(tokenizer, names, control)

    def name(self, text: str) -> str:
        """The text with each control token in it under its secret name."""
        pieces, end = [], 0
        for begin, stop, name in self.encoder.written(text):
            pieces += [text[end:begin], name]
            end = stop
        return "".join([*pieces, text[end:]])


class _Named(Encoder):
    """An encoder that finds control tokens under their secret names."""

    def __init__(self, tokenizer: Any, names: Mapping[str, str]) -> None:
        super().__init__(tokenizer)
        unknown = getattr(tokenizer, "unk_token", None)
        self._names = names
        self._ids = {name: int(tokenizer.convert_tokens_to_ids(text)) for text, name in names.items()}
        # What has no token may be drawn as the unknown one: that is no control.
        self._texts = {self._ids[name]: text for text, name in names.items() if text != unknown}
        self._pattern = re.compile("|".join(map(re.escape, names.values())) or "(?!)")

    def _check(self, text: str, ids: Sequence[int]) -> None:
        """RequestError if the ids do not hold exactly the control tokens that the text names."""
        named = Counter(self._ids[name] for name in self._pattern.findall(text))
        drawn = Counter(token_id for token_id in ids if token_id in self._texts)
        for token_id, control in self._texts.items():
            if drawn[token_id] != named[token_id]:
                raise RequestError(
                    f"this tokenizer cannot tell {control!r} in words from the token; take it out of the messages, "
                    "or set special_tokens_in_messages: control",
                    "messages",
                )


class _Twin(_Named):
    """A fast tokenizer's copy in which control tokens have other names, and nothing else is different."""

    def __init__(self, tokenizer: Any, names: Mapping[str, str], _: ControlTokens) -> None:
        super().__init__(tokenizer, names)
        self._original = tokenizer.backend_tokenizer
        backend = Tokenizer.from_str(_renamed(self._original.to_str(), names))
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer._tokenizer = backend
        added = {
            backend.token_to_id(names.get(token.content, token.content)): number
            for number, token in tokenizer.added_tokens_decoder.items()
        }
        # A token that no vocabulary holds takes the next free number, which need not be the one it had.
        self._numbers = {number: as_before for number, as_before in added.items() if number != as_before}

    def written(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(begin, end, name) of each control token that the original tokenizer finds in the text."""
        encoded = self._original.encode(text, add_special_tokens=False)
        for token_id, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
            control = self._texts.get(token_id)
            if control is not None:
                found = text.find(control, begin, end)  # white space beside it may belong to it
                if found >= 0:
                    yield found, found + len(control), self._names[control]

    def encode(self, text: str) -> tuple[int, ...]:
        return self._as_before(text, super().encode(text))

    def encode_with_begins(self, text: str) -> tuple[tuple[int, ...], list[int] | None]:
        ids, begins = super().encode_with_begins(text)
        return self._as_before(text, ids), begins

    def _as_before(self, text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self._numbers:
            ids = tuple(self._numbers.get(i, i) for i in ids)
        self._check(text, ids)
        return ids


def _renamed(tokenizer: str, names: Mapping[str, str]) -> str:
    """A tokenizer.json in which neither added tokens nor the model's pieces have the old names."""
    content = json.loads(tokenizer)
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    return json.dumps(content)


def _makes(merge: Any, names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


class _Piecewise(_Named):
    """For a tokenizer written in Python, which cannot be copied under other names: piece by piece."""

    def __init__(self, tokenizer: Any, names: Mapping[str, str], control: ControlTokens) -> None:
        super().__init__(tokenizer, names)
        self._control = control
        self._parts = re.compile(f"({self._pattern.pattern})")

    def written(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(begin, end, name) of each control token in the text."""
        return (
            (begin, begin + len(control), self._names[control]) for begin, control in self._control.find(text)
        )

    def encode(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for piece in filter(None, self._parts.split(text)):
            ids += [self._ids[piece]] if piece in self._ids else self._words(piece)
        self._check(text, ids)
        return tuple(ids)

    def encode_with_begins(self, text: str) -> tuple[tuple[int, ...], list[int] | None]:
        return self.encode(text), None

    def _words(self, piece: str) -> list[int]:
        return list(self._tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True))
