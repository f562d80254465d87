"""The one prompt renderer: messages -> token ids as served, and the spans of them that a loss may use.

A training sequence is what serving would see, token for token: the prompt as `render` gives it, then the answer.
Where a template rewrites earlier turns (Qwen3 drops <think> from history), or where the joint between prompt and
answer would be tokenized differently, a conversation becomes one sequence for each supervised turn.
It knows chat templates and tokenizers; no data files, no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from serve.errors import RequestError

Message = Mapping[str, Any]
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_TAILS, MAX_TAIL_CHARS = 1024, 256
"""Ends of prompts whose tokens are remembered; nearly all prompts of a template share one."""


@dataclass(frozen=True)
class Supervised:
    """One training sequence; `spans` are half-open token ranges that loss may use."""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Turn:
    """A supervised turn: the conversation up to and with it, and where its own words start."""

    text: str
    start: int  # in characters of `text`
    with_eos: bool

    @property
    def prompt(self) -> str:
        return self.text[: self.start]


class ChatTemplate:
    """A tokenizer's chat template; `tokenizer` is mlx_lm's TokenizerWrapper."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._custom = getattr(tokenizer, "_chat_template", None)
        template = None if self._custom is not None else tokenizer.chat_template
        self.exists: bool = bool(tokenizer.has_chat_template)
        self.hash: str = f"sha256:{hashlib.sha256(_identity(self._custom, template).encode()).hexdigest()}"
        self._has_markers = isinstance(template, str) and _MARKER.search(template) is not None
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {int(number) for number, token in added.items() if token.special}
        self._end_ids = special | set(tokenizer.eos_token_ids)
        self._cut_ids = {int(number) for number, token in added.items() if _cuts(token)}
        self._tails: dict[str, tuple[int, ...]] = {}
        self._blank: dict[int, bool] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> tuple[int, ...]:
        """Token ids, as served.

        Content given as parts of text is joined, a null content is "", and a tool call's arguments may be JSON text:
        templates then see one form. RequestError if there is no template or it refuses the messages.
        """
        if continue_final_message:
            template_kwargs["continue_final_message"] = True
        return self._encode(self._text(messages, tools, add_generation_prompt, template_kwargs))

    def supervise(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        roles: Sequence[str] = ("assistant",),
        train_on_eos: str = "turn",
        skip: Collection[int] = (),
    ) -> list[Supervised]:
        """Training sequences of a conversation: spans run from a turn's first own token through its end-of-turn.

        roles         whose turns are supervised; headers never are, nor what follows the end-of-turn token
        train_on_eos  which end-of-turn tokens are: "turn" each, "last" the conversation's last one, "none"
        skip          indices of turns that are context only, whatever their role
        Empty if no turn has one of the roles. RequestError as `render`.
        """
        indices = [i for i, message in enumerate(messages) if message.get("role") in roles and i not in skip]
        turns = [
            self._turn(
                messages, i, tools, train_on_eos == "turn" or (train_on_eos == "last" and i == indices[-1])
            )
            for i in indices
        ]
        if not turns:
            return []
        # Of several turns the last may end before the conversation does; of one, nothing after it is learned from.
        ends_it = len(turns) == 1 or indices[-1] == len(messages) - 1
        whole = turns[-1].text if ends_it else self._text(messages, tools, False, {})
        joint = self._joint(whole, turns)
        return [joint] if joint is not None else [self._alone(turn) for turn in turns]

    # Text

    def _text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        if not self.exists:
            raise RequestError(
                "this model's tokenizer has no chat template; send a prompt instead", "messages"
            )
        plain = [_plain(message, i) for i, message in enumerate(messages)]
        try:
            text = self._tokenizer.apply_chat_template(
                plain,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_kwargs,
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise RequestError(
                f"the chat template refuses these messages ({roles}): {error}", "messages"
            ) from error
        return str(text)

    def _turn(
        self,
        messages: Sequence[Message],
        index: int,
        tools: Sequence[Mapping[str, Any]] | None,
        with_eos: bool,
    ) -> _Turn:
        """Turn `index` as the end of its conversation, which is how serving makes it."""
        text = self._text(messages[: index + 1], tools, False, {})
        is_answer = messages[index].get("role") == "assistant"
        if (
            is_answer
            and self._has_markers
            and (start := self._marked_start(messages[: index + 1], tools, text))
        ):
            return _Turn(text, start, with_eos)
        prompt = self._text(messages[:index], tools, is_answer, {}) if index else ""
        if is_answer and index:
            if text.startswith(prompt):
                return _Turn(text, len(prompt), with_eos)
            raise RequestError(_mismatch(prompt, text), f"messages.{index}")
        # Nothing is served before this turn, or it is not an answer: its own words start at its content.
        content = str(_plain(messages[index], index).get("content", "")).strip()
        start = text.find(content, len(prompt) if text.startswith(prompt) else 0)
        if not content or start < 0:
            role = messages[index].get("role")
            raise RequestError(
                f"the content of this {role} turn is not found in what the chat template makes of it",
                f"messages.{index}",
            )
        return _Turn(text, start, with_eos)

    def _marked_start(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, text: str
    ) -> int | None:
        """Where the template's last {% generation %} block begins; None if that does not hold for this turn."""
        rendered, indices = render_jinja_template(
            conversations=[[_plain(message, i) for i, message in enumerate(messages)]],
            tools=list(tools) if tools else None,
            chat_template=self._tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            enable_thinking=self._tokenizer.has_thinking,
            **self._tokenizer.special_tokens_map,
        )
        return int(indices[0][-1][0]) if indices[0] and rendered[0] == text else None

    # Tokens

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _joint(self, whole: str, turns: Sequence[_Turn]) -> Supervised | None:
        """All turns in one sequence, if each prompt, as served, is a prefix of it; otherwise None."""
        if not all(whole.startswith(turn.text) for turn in turns):
            return None
        encoded = self._tokenizer._tokenizer([whole], add_special_tokens=False)
        ids = tuple(encoded["input_ids"][0])
        begins = [begin for begin, _ in encoded.encodings[0].offsets] if encoded.is_fast else None
        spans = []
        for turn in turns:
            start = self._prompt_length(turn.prompt, ids, begins)
            if start is None:
                return None
            stop = len(ids)
            if turn.text != whole and begins is not None:
                stop = bisect_left(begins, len(turn.text))
            elif turn.text != whole:
                stop = _common(ids, self._encode(turn.text))
            spans.append(self._span(ids, start, stop, turn.with_eos))
        return Supervised(ids, tuple(spans))

    def _prompt_length(self, prompt: str, ids: tuple[int, ...], begins: Sequence[int] | None) -> int | None:
        """Tokens of `prompt` if `ids`, of a text that goes on from it, begin with them; otherwise None.

        A fast tokenizer looks for special tokens before anything else and encodes what is between them piece by
        piece, so only the prompt's tail from its last special token on is encoded: all before it is the same.
        """
        tail = 0
        if begins is not None:
            tail = max(bisect_left(begins, len(prompt)) - 1, 0)
            while tail and ids[tail] not in self._cut_ids:
                tail -= 1
        words = prompt[begins[tail] :] if begins is not None and tail else prompt
        found = self._tail(words)
        return tail + len(found) if ids[tail : tail + len(found)] == found else None

    def _tail(self, words: str) -> tuple[int, ...]:
        found = self._tails.get(words)
        if found is None:
            found = self._encode(words)
            if len(self._tails) < MAX_TAILS and len(words) <= MAX_TAIL_CHARS:
                self._tails[words] = found
        return found

    def _alone(self, turn: _Turn) -> Supervised:
        """One turn after its prompt as served; what follows the turn is cut off."""
        joint = self._joint(turn.text, [turn])
        if joint is None:
            prompt = self._encode(turn.prompt)
            ids = (*prompt, *self._encode(turn.text[turn.start :]))
            joint = Supervised(ids, (self._span(ids, len(prompt), len(ids), turn.with_eos),))
        return joint

    def _span(self, ids: tuple[int, ...], start: int, stop: int, with_eos: bool) -> tuple[int, int]:
        """`[start, stop)` without what follows the end-of-turn token, or without it too."""
        while stop > start and self._is_blank(ids[stop - 1]):
            stop -= 1
        if stop > start and not with_eos and ids[stop - 1] in self._end_ids:
            stop -= 1
        return start, stop

    def _is_blank(self, token_id: int) -> bool:
        found = self._blank.get(token_id)
        if found is None:
            found = self._blank[token_id] = not self._tokenizer.decode([token_id]).strip()
        return found


def _cuts(token: Any) -> bool:
    """Whether an added token is found in the text as it stands, so that it parts what is before it from the rest."""
    return not (token.normalized or token.lstrip or token.rstrip or token.single_word)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _identity(custom: Any, template: Any) -> str:
    if custom is not None:
        return f"{custom.__module__}.{custom.__qualname__}"
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _mismatch(prompt: str, text: str) -> str:
    tail = prompt[-30:]
    return (
        f"the chat template's prompt for this turn ends with {tail!r}, but the turn itself is rendered otherwise: "
        f"{text[max(0, len(prompt) - 30) : len(prompt) + 10]!r}; serving would never see the sequence that is trained"
    )


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message in the one form templates know: content as text, tool arguments as an object."""
    plain = dict(message)
    content = plain.get("content")
    if content is None:
        plain["content"] = ""
    elif isinstance(content, (list, tuple)):
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            other = ", ".join(sorted(map(str, kinds - {"text"})))
            raise RequestError(
                f"this model reads text; found a part of type {other}", f"messages.{index}.content"
            )
        plain["content"] = "".join(str(part["text"]) for part in content)
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}
