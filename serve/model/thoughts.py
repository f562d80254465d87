"""How a model marks its thoughts: from its vocabulary and template, or by name. Text in, thought and answer apart.

A mark is made of control tokens, of text, or of both (`<|channel>thought`). A token that belongs to one is written as
half of a surrogate pair, which no text holds, so that words never are a mark where the vocabulary has a token for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from serve.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from serve.model.template import ChatTemplate

Parser = Literal["auto", "qwen3", "deepseek_r1", "gpt_oss", "harmony", "gemma4", "mistral", "none"]
State = Literal["content", "reasoning", "header"]
"""Inside the answer, inside a thought, or in what says which of the two comes (gpt-oss)."""

PAIRS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "qwen3": ("<think>", "</think>"),
        "deepseek_r1": ("<think>", "</think>"),
        "gemma4": ("<|channel>thought", "<channel|>"),
        "mistral": ("[THINK]", "[/THINK]"),
    }
)
OTHER_PAIRS = (
    PAIRS["mistral"],
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
"""Looked for in a vocabulary after mlx-lm's: vLLM's of Mistral and Seed, mlx-vlm's of Cohere."""
START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
HARMONY_ENDS = (END, "<|return|>", "<|call|>")
HARMONY_ANSWER = f"{END}{START}assistant{CHANNEL}final{MESSAGE}"
"""What a thought's end is forced by: the answer's message begins."""
THOUGHT_CHANNEL = "analysis"
CALLED = "to=functions."
"""In a header: its message is a call of a tool."""
CALL_BEGINS, CALL_ENDS = "<|channel|>commentary to={}<|message|>", "<|call|>"
"""How a call's header is told among an answer's text."""
_RECIPIENT = re.compile(r"\bto=([\w.-]+)")
MAX_MARK_CHARS = 128
"""Each token is compared with all beginnings of a mark, on the thread that serves everyone."""
MAX_REMEMBERED = 256
NUM_CUE_TOKENS = 16
"""Of a prompt, looked at for a mark where no token of the template's tells where its last turn begins."""
_FIRST_HALF = 0xD800


class Mark(NamedTuple):
    """What stands between thought and answer."""

    text: str
    """Control tokens as halves of pairs."""
    goes: State | None
    """What comes after it; None: what the header before it says."""


@dataclass(frozen=True)
class Thoughts:
    """The marks of one model."""

    name: str
    marks: Mapping[State, tuple[Mark, ...]] = field(repr=False)
    """By where they count."""
    controls: Mapping[int, str] = field(repr=False)
    """Token id → how it is written."""
    close_ids: tuple[int, ...] = ()
    """Tokens that end a thought."""
    openings: tuple[tuple[int, ...], ...] = ()
    """Tokens that an answer may begin with instead of its text: of a mark each."""
    begins_inside: bool = False
    """An answer begins with a thought, unless the prompt has ended it."""
    turn_ids: frozenset[int] | None = None
    """Tokens that begin a turn; None: whatever the template ends one by."""

    def cue(self, token_ids: Sequence[int], turn_ids: frozenset[int]) -> tuple[int, ...]:
        """Of a prompt, what can have begun a thought: from the last token that begins or ends a turn."""
        turns = self.turn_ids if self.turn_ids is not None else turn_ids - self.controls.keys()
        for index in range(len(token_ids) - 1, -1, -1):
            if token_ids[index] in turns:
                return tuple(token_ids[index:])
        return tuple(token_ids[-NUM_CUE_TOKENS:])

    def in_grammar(self, cue: Sequence[int]) -> tuple[Thoughts, tuple[int, ...]]:
        """The same where a grammar says which header follows a thought; and what a prompt's cue has of the answer's
        messages, which that grammar has to let through."""
        channel = self.openings[-1][0]
        turn = self.close_ids[: self.close_ids.index(channel)]  # what ends a message, and begins the next
        begun = turn[1:]
        rest = tuple(cue[len(begun) :]) if tuple(cue[: len(begun)]) == begun else ()
        return replace(self, close_ids=turn), rest


class Piece(NamedTuple):
    """Text of one kind; "header" is what belongs to marks, and is not shown."""

    kind: State
    text: str
    is_thought: bool
    """Inside a thought, which a mark is that begins it once more."""


class ThoughtReader:
    """Tells which is which, piece by piece. What may still become a mark is held."""

    def __init__(self, thoughts: Thoughts, cue: str = "") -> None:
        """cue: the end of the prompt, which may have begun a thought."""
        self._thoughts = thoughts
        self.state: State = "content"
        self.held = ""
        self.last: Mark | None = None
        """The mark that has come last."""
        self._header = ""
        self._num_foreign = 0  # characters of `held` that are the prompt's
        self.push(cue)
        if thoughts.begins_inside and not any(
            mark.text in cue for marks in thoughts.marks.values() for mark in marks
        ):
            self.state = "reasoning"
        self._num_foreign = len(self.held)

    @property
    def is_answer(self) -> bool:
        """What follows is the answer's text, by a mark; where headers say which it is, nothing is before them."""
        if self.state != "content" or self.last is None:
            return False
        return self.last.goes is None or not self._thoughts.marks["header"]

    def push(self, text: str) -> list[Piece]:
        """What is certain now. The mark that is complete first counts, so it does not matter how the text is cut."""
        pieces: list[Piece] = []
        marks = self._thoughts.marks[self.state]
        if not self.held and not any(mark.text[0] in text for mark in marks):  # most text, most often
            self._tell(pieces, text)
            return pieces
        text = self.held + text
        while (found := self._first(text)) is not None:
            start, mark = found
            self._tell(pieces, text[:start])
            state: State = mark.goes if mark.goes is not None else self._of_header()
            stays_inside = self.state == state == "reasoning"
            self.state = "header"
            self._tell(pieces, mark.text, is_thought=stays_inside)
            self.state, self.last, self._header = state, mark, ""
            text = text[start + len(mark.text) :]
        keep = max((_overlap(text, mark.text) for mark in self._thoughts.marks[self.state]), default=0)
        self._tell(pieces, text[: len(text) - keep])
        self.held = text[len(text) - keep :]
        return pieces

    def finish(self) -> list[Piece]:
        """What was held, when nothing follows. The beginning of the mark that was to end a thought is none of it."""
        pieces: list[Piece] = []
        if self.state != "reasoning":
            self._tell(pieces, self.held)
        self.held = ""
        return pieces

    def _first(self, text: str) -> tuple[int, Mark] | None:
        """The mark that is complete first, of those the longest, and where it begins."""
        found = [
            (start + len(mark.text), start, mark)
            for mark in self._thoughts.marks[self.state]
            if (start := text.find(mark.text)) >= 0
        ]
        return min(found, key=lambda each: each[:2])[1:] if found else None

    def _of_header(self) -> State:
        is_thought = self._header.strip().startswith(THOUGHT_CHANNEL) and CALLED not in self._header
        return "reasoning" if is_thought else "content"

    def _tell(self, pieces: list[Piece], text: str, *, is_thought: bool | None = None) -> None:
        foreign = min(self._num_foreign, len(text))
        self._num_foreign -= foreign
        if self.state == "header":
            self._header += text
        if text[foreign:]:
            inside = self.state == "reasoning" if is_thought is None else is_thought
            pieces.append(Piece(self.state, text[foreign:], inside))


class Told(NamedTuple):
    """What is to be shown."""

    content: str
    reasoning: str


class Teller:
    """Pieces in, what is shown of them out: without marks, and without the newlines that stand around thoughts.

    Several thoughts, and several parts of an answer, are joined by a newline each.
    """

    def __init__(
        self, thoughts: Thoughts, state: State, *, is_exact: bool = False, tells_calls: bool = False
    ) -> None:
        """state: where the answer begins. is_exact: an answer's newlines are its own. tells_calls: headers that call
        a tool are told, as text."""
        self._is_exact = is_exact
        self._tells_calls = tells_calls
        self._header = ""  # that no message has followed
        self._in_call = False
        self._hidden = {
            ord(half): None for half in thoughts.controls.values()
        }  # also where they mark nothing
        self._is_first = state != "reasoning"  # nothing but newlines has come
        self._is_fresh = not self._is_first  # a part begins, whose newlines are dropped
        self._newlines = ""  # that go on if words do
        self._has = {"content": False, "reasoning": False}

    def push(self, pieces: Sequence[Piece]) -> Told:
        """What these add."""
        told = {"content": "", "reasoning": ""}
        for kind, text, _ in pieces:
            if self._tells_calls:
                told["content"] += self._call(kind, text)
            if self._in_call and kind == "content":
                told["content"] += text.translate(self._hidden)
            elif kind == "content" and self._is_exact:
                told[kind] += text.translate(self._hidden)
            elif kind == "header":
                self._is_first, self._is_fresh, self._newlines = False, True, ""
            else:
                told[kind] += self._part(kind, text.translate(self._hidden))
        return Told(**told)

    def finish(self) -> Told:
        """What an answer of newlines alone is."""
        return Told(self._newlines if self._is_first else "", "")

    def _call(self, kind: State, text: str) -> str:
        """What is told of a header before its message, and behind that."""
        if kind == "header":
            self._header += text
            was_call, self._in_call = self._in_call, False
            return CALL_ENDS if was_call else ""
        recipient = _RECIPIENT.search(self._header) if kind == "content" else None
        self._header = ""
        if recipient is None:
            return ""
        self._in_call = True
        return CALL_BEGINS.format(recipient[1])

    def _part(self, kind: str, text: str) -> str:
        if self._is_fresh:
            text = text.lstrip("\n")
        if not text:
            return ""
        joint = "\n" if self._is_fresh and self._has[kind] else ""
        self._is_fresh = False
        text = joint + self._newlines + text
        words = (
            text.rstrip("\n") if kind == "reasoning" or not (self._has[kind] or text.strip("\n")) else text
        )
        self._newlines = text[len(words) :]
        if words:
            self._is_first, self._has[kind] = False, True
        return words


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class ThoughtRules:
    """Finds the marks of one base model, under the template of whoever answers.

    parser      whose marks; auto: what the vocabulary holds, as mlx-lm, mlx-vlm and vLLM know it, then the template
    start, end  other marks; one of them alone takes the place of the parser's
    """

    def __init__(
        self, tokenizer: Any, parser: Parser = "auto", start: str | None = None, end: str | None = None
    ) -> None:
        """`tokenizer`: mlx_lm's TokenizerWrapper. ConfigError where it has not what the parser needs."""
        self._tokenizer = tokenizer
        self._parser = parser
        self._marks = (start, end)
        self._vocabulary: Mapping[str, int] = tokenizer.get_vocab()
        self._added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._found: dict[tuple[str, str | None, str | None], Thoughts | None] = {}
        if parser in ("gpt_oss", "harmony", "gemma4", "mistral") and not self._has_tokens_of(parser):
            raise ConfigError(
                f"reasoning_parser: found {parser}, but this model's vocabulary has no such tokens; "
                "expected auto, or the family's own"
            )

    def of(self, template: ChatTemplate, start: str | None = None, end: str | None = None) -> Thoughts | None:
        """The marks of answers under this template; None: there are none. To be called when it is the
        tokenizer's turn.

        start, end  a request's own. RequestError names one that cannot be a mark, or lacks the other.
        """
        key = (template.hash, start, end)
        if key not in self._found:
            if len(self._found) >= MAX_REMEMBERED:
                self._found.clear()
            self._found[key] = self._make(template, start, end)
        return self._found[key]

    def check(self, template: ChatTemplate, budget: int | None) -> None:
        """ConfigError where the marks of these rules, or everybody's budget, cannot be under the base's template."""
        try:
            thoughts = self.of(template)
        except RequestError as error:
            raise ConfigError(str(error)) from None
        if thoughts is None and budget is not None:
            raise ConfigError(
                f"thinking_budget: found {budget}, but answers of this model have no thoughts with marks; name the "
                "marks with thinking_start_token and thinking_end_token, or leave it out"
            )

    def _make(self, template: ChatTemplate, start: str | None, end: str | None) -> Thoughts | None:
        start, end = start or self._marks[0], end or self._marks[1]
        name, pair = self._named(template)
        if start is None and end is None:
            if name == "gpt_oss":
                return self._harmony()
            return None if pair is None else self._pair(name, *pair)
        known = pair or (None, None)
        start, end = start or known[0], end or known[1]
        for given, param in ((start, "thinking_start_token"), (end, "thinking_end_token")):
            if given is None:
                raise RequestError(
                    f"{param}: found none, and this model has no marks of its own; send both thinking_start_token "
                    "and thinking_end_token",
                    param,
                )
        assert start is not None
        assert end is not None
        if start == end:
            raise RequestError(
                f"thinking_end_token: found {end!r}, which begins a thought too", "thinking_end_token"
            )
        return self._pair(name if (start, end) == pair else "own", start, end)

    def _named(self, template: ChatTemplate) -> tuple[str, tuple[str, str] | None]:
        """A parser's name and its marks; of gpt_oss there are more than two."""
        if self._parser == "none":
            return "none", None
        if self._parser != "auto":
            name = "gpt_oss" if self._parser == "harmony" else self._parser
            return name, PAIRS.get(name)
        if self._has_tokens_of("gpt_oss"):
            return "gpt_oss", None
        of_mlx_lm = (self._tokenizer.think_start, self._tokenizer.think_end)
        candidates = [of_mlx_lm] if all(of_mlx_lm) else []
        candidates += [pair for pair in OTHER_PAIRS if set(pair) <= self._vocabulary.keys()]
        source = str(template.tokenizer.chat_template or "") if template.exists else ""
        candidates += [pair for pair in (PAIRS["qwen3"],) if all(mark in source for mark in pair)]
        if not candidates:
            return "none", None
        names = {pair: name for name, pair in reversed(list(PAIRS.items()))}
        return names.get(candidates[0], "own"), candidates[0]

    def _has_tokens_of(self, name: str) -> bool:
        wanted = {START, CHANNEL, MESSAGE} if name in ("gpt_oss", "harmony") else set(PAIRS[name])
        if name == "gemma4":
            wanted = {"<|channel>", "<channel|>"}
        return wanted <= self._vocabulary.keys()

    def _pair(self, name: str, start: str, end: str) -> Thoughts:
        controls: dict[int, str] = {}
        opens, closes = self._written(start, controls), self._written(end, controls)
        return Thoughts(
            name,
            {
                "content": (Mark(opens, "reasoning"),),
                # As in mlx-vlm, a thought that begins twice begins once.
                "reasoning": (Mark(closes, "content"), Mark(opens, "reasoning")),
                "header": (),
            },
            controls,
            self._closing(end),
            (self._ids(start),),
            begins_inside=name == "deepseek_r1",
        )

    def _harmony(self) -> Thoughts:
        controls: dict[int, str] = {}
        start, channel, message = (self._written(each, controls) for each in (START, CHANNEL, MESSAGE))
        ends = [self._written(each, controls) for each in HARMONY_ENDS if each in self._vocabulary]
        around = (*(Mark(each, "content") for each in ends), Mark(start, "header"), Mark(channel, "header"))
        return Thoughts(
            "gpt_oss",
            {"content": around, "reasoning": around, "header": (Mark(message, None), *around)},
            controls,
            self._closing(HARMONY_ANSWER),
            tuple(self._ids(each) for each in (START, CHANNEL)),
            turn_ids=frozenset({self._vocabulary[START]}),
        )

    def _written(self, mark: str, controls: dict[int, str]) -> str:
        """A mark, with halves of pairs for the tokens in it, which are added to `controls`."""
        names = {token.content: number for number, token in self._added.items() if token.content in mark}
        if mark in self._vocabulary and self._ids(mark) == (self._vocabulary[mark],):
            names = {mark: self._vocabulary[mark]}
        for number in names.values():
            controls.setdefault(number, chr(_FIRST_HALF + len(controls)))
        if not names:
            return mark
        longest_first = sorted(names, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        return re.sub(pattern, lambda found: controls[names[found[0]]], mark)

    def _closing(self, end: str) -> tuple[int, ...]:
        """Tokens that are written `end`."""
        ids = self._ids(end)
        if end not in self._tokenizer.decode(list(ids)):
            raise RequestError(
                f"thinking_end_token: found {end!r}, which this model's tokens cannot write",
                "thinking_end_token",
            )
        return ids

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))
