"""The one prompt renderer: messages -> token ids as served, and the spans of them that a loss may use.

A training sequence is what serving would see, token for token: the prompt as `render` gives it, then the answer.
Where a template rewrites earlier turns (Qwen3 drops <think> from history), or where the joint between prompt and
answer would be tokenized differently, a conversation becomes one sequence for each supervised turn.
What a message says is words: a control token inside it is encoded as its characters, in both (`words.py`).
It knows chat templates and tokenizers; no data files, no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import takewhile
from typing import Any, Literal

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from serve.errors import RequestError
from serve.model.jinja import TooSlowError
from serve.model.messages import Conversation, data, leaves, plain_message, plain_tools
from serve.model.renderer import Message as Message
from serve.model.renderer import renderer_of
from serve.model.words import ControlTokens, Encoder, NamedControl, Veil, spare_characters

SpecialTokens = Literal["words", "control"]
"""What a special token's text inside a message is: its characters, or the token."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_TAILS, MAX_TAIL_CHARS = 1024, 256
"""Ends of prompts whose tokens are remembered; nearly all prompts of a template share one."""


@dataclass(frozen=True)
class Written:
    """A prompt as text, which may be made on any thread; encoding it is the tokenizer's work."""

    veiled: str
    veil: Veil | None
    _encode: Callable[[str, Veil | None], tuple[int, ...]]

    def __len__(self) -> int:
        """Characters."""
        return len(self.veiled)

    @property
    def text(self) -> str:
        """As a person reads it; what is words and what is a control token is no longer told."""
        return self.veil.reveal(self.veiled) if self.veil else self.veiled

    def encode(self, num_chars: int | None = None) -> tuple[int, ...]:
        """Token ids, of the first `num_chars` characters if that is given.

        RequestError if this tokenizer cannot tell words from control tokens.
        """
        return self._encode(self.veiled[:num_chars], self.veil)


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
    """A tokenizer's chat template; `tokenizer` is mlx_lm's TokenizerWrapper. Made by `template_rules.make_template`.

    defaults  variables that the template reads where a call does not set them
    today     the day that the template prints; None: the real one, each time
    """

    def __init__(
        self,
        tokenizer: Any,
        special_tokens_in_messages: SpecialTokens = "words",
        *,
        defaults: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.defaults: dict[str, Any] = dict(defaults or {})
        self._custom = getattr(tokenizer, "_chat_template", None)
        template = None if self._custom is not None else tokenizer.chat_template
        self._renderer = renderer_of(tokenizer, today)
        self.exists: bool = self._renderer is not None
        self.variables: frozenset[str] = self._renderer.variables if self._renderer else frozenset()
        """Names of `variables` that `write` takes: those that the template reads and that are not set here."""
        prints_day = today is not None and self._renderer is not None and self._renderer.reads_clock
        self.day: str = today.isoformat() if today is not None and prints_day else ""
        """The day that its prompts are frozen to, YYYY-MM-DD; empty if they are not, or name no day."""
        self.hash: str = f"sha256:{hashlib.sha256(_identity(self._custom, template).encode()).hexdigest()}"
        self._has_markers = isinstance(template, str) and _MARKER.search(template) is not None
        self._added = {
            int(number): token for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        }
        special = {number for number, token in self._added.items() if token.special}
        self._end_ids = special | set(tokenizer.eos_token_ids)
        self._cut_ids = {number for number, token in self._added.items() if _cuts(token)}
        self._blank: dict[int, bool] = {}
        self._reader = _Reader(Encoder(tokenizer._tokenizer), self._cut_ids)
        self._is_open = special_tokens_in_messages == "control"
        markup = self._markup()
        control = {self._added[number].content for number in special | self._ends()} | self._frame(markup)
        control = {text for text in control if not text.isspace()}
        self._control = ControlTokens(control)
        self._control_of_answers = ControlTokens(control - markup) if control & markup else self._control
        self._named: tuple[NamedControl, _Reader] | None = None  # made when it is first needed

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose token ids it gives."""
        return self._tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that can end a turn: the model's end tokens, and control tokens but for the marks inside answers."""
        around = set(self._control.texts) - self._markup()
        control_ids = {number for number, token in self._added.items() if token.content in around}
        return frozenset(control_ids | set(self._tokenizer.eos_token_ids))

    def render(self, messages: Sequence[Message], **options: Any) -> tuple[int, ...]:
        """Token ids, as served: `write`, encoded."""
        return self.write(messages, **options).encode()

    def write(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        limit_s: float | None = None,
    ) -> Written:
        """The prompt as text. RequestError if there is no template, or it refuses the messages, or takes too long.

        Content given as parts of text is joined, a null content is "", and a tool call's arguments may be JSON text:
        templates then see one form.
        add_generation_prompt   open the next turn; true unless a message is continued
        continue_final_message  end with the last message's own words, for the answer to go on from
        variables               what the template reads besides, `self.variables`; another is refused by name
        limit_s                 seconds of this thread's CPU that the template may take
        """
        self._check_variables(variables or {})
        conversation = replace(self._conversation(messages, tools, variables or {}), limit_s=limit_s)
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other: an answer goes on from the "
                    "last message or begins a turn; send one of them",
                    "continue_final_message",
                )
            veiled = self._open(conversation)
        else:
            veiled = self._raw(conversation, add_generation_prompt is not False)
        return Written(veiled, conversation.veil, self._encode)

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
        if not indices:
            return []
        conversation = self._conversation(messages, tools, {})
        turns = [
            self._turn(
                conversation, i, train_on_eos == "turn" or (train_on_eos == "last" and i == indices[-1])
            )
            for i in indices
        ]
        # Of several turns the last may end before the conversation does; of one, nothing after it is learned from.
        ends_it = len(turns) == 1 or indices[-1] == len(messages) - 1
        whole = turns[-1].text if ends_it else self._text(conversation, False)
        reader = self._reader_of(conversation.veil)
        joint = self._joint(reader, whole, turns)
        return [joint] if joint is not None else [self._alone(reader, turn) for turn in turns]

    # What is a control token, and what is words

    def _markup(self) -> set[str]:
        """Added tokens that answers hold beside their words: around thoughts and tool calls, as mlx-lm knows them."""
        names = ("think_start", "think_end", "tool_call_start", "tool_call_end")
        around = [str(getattr(self._tokenizer, name, None) or "") for name in names]
        return {
            token.content
            for token in self._added.values()
            if any(token.content in text for text in around if text)
        }

    def _ends(self) -> set[int]:
        return {number for number in self._tokenizer.eos_token_ids if number in self._added}

    def _frame(self, markup: set[str]) -> set[str]:
        """Added tokens that are not called special, and that the template puts around turns all the same."""
        plain = {t.content for t in self._added.values() if not (t.special or t.content.isspace())} - markup
        if not plain or self._renderer is None:
            return set()
        asked = ({"role": "system", "content": "a"}, {"role": "user", "content": "a"})
        said = ({"role": "assistant", "content": "a"}, {"role": "user", "content": "a"})
        written = ""
        for messages in ((*asked, *said), (asked[1], *said)):
            try:
                written += self._renderer.render(messages, None, True, self.defaults, None)
            except Exception:  # it has no system turn, or refuses every conversation like this
                continue
        return {text for text in plain if text in written}

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> Conversation:
        if self._renderer is None:
            raise RequestError(
                "this model's tokenizer has no chat template; send a prompt instead", "messages"
            )
        try:
            plain = tuple(plain_message(message, i) for i, message in enumerate(messages))
            said_tools, said_variables = plain_tools(tools), data({**self.defaults, **variables})
            veil = None if self._is_open else self._veil([plain, said_tools, said_variables])
            if veil is None:
                return Conversation(plain, plain, said_tools, said_variables, None)

            def words(text: str) -> str:
                return veil.hide(text, self._control)

            hidden = tuple(self._hidden(message, veil) for message in plain)
            return Conversation(plain, hidden, data(said_tools, words), data(said_variables, words), veil)
        except RecursionError:
            raise RequestError("messages: found values nested too deeply", "messages") from None

    def _veil(self, said: Any) -> Veil | None:
        """Stand-ins for all that is said, or None if there is nothing in it to hide."""
        texts = list(leaves(said))
        if not any(self._control.starts(text) for text in texts):
            return None
        characters = sorted(set("".join(self._control.texts)))
        return Veil(dict(zip(characters, spare_characters(len(characters), texts), strict=True)))

    def _hidden(self, message: Message, veil: Veil) -> dict[str, Any]:
        """A message without control tokens, but for the markup in an answer's content, which models write themselves.

        Templates build headers of a role, so its ends stay as they are.
        """
        hidden = {
            key: data(value, lambda text: veil.hide(text, self._control)) for key, value in message.items()
        }
        if message.get("role") == "assistant":
            hidden["content"] = veil.hide(message["content"], self._control_of_answers)
        role = message.get("role")
        if isinstance(role, str):
            hidden["role"] = veil.hide(role, self._control, is_edged=False)
        return hidden

    def _reader_of(self, veil: Veil | None) -> _Reader:
        return self._reader if veil is None else self._naming()[1]

    def _naming(self) -> tuple[NamedControl, _Reader]:
        if self._named is None:
            named = NamedControl(self._tokenizer._tokenizer, self._control)
            self._named = named, _Reader(named.encoder, self._cut_ids)
        return self._named

    def _seen(self, text: str, veil: Veil | None) -> str:
        """What a template wrote, as its reader takes it."""
        return text if veil is None else veil.reveal(self._naming()[0].name(text))

    # Text

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name not in self.variables:
                reads = ", ".join(sorted(self.variables)) or "none"
                raise RequestError(
                    f"chat_template_kwargs: found {name!r}; this model's chat template reads these variables from "
                    f"requests: {reads}",
                    "chat_template_kwargs",
                )

    def _text(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        return self._seen(self._raw(conversation, add_generation_prompt), conversation.veil)

    def _raw(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        """What the template writes, still under the veil."""
        if not conversation.messages:
            raise RequestError("messages: found none; expected at least one message", "messages")
        assert self._renderer is not None
        try:
            return self._renderer.render(
                conversation.messages,
                conversation.tools,
                add_generation_prompt,
                conversation.variables,
                conversation.limit_s,
            )
        except TooSlowError:
            raise RequestError(
                f"the chat template took more than {conversation.limit_s:g} s over these "
                f"{len(conversation.messages)} messages; send fewer or shorter ones",
                "messages",
            ) from None
        except Exception as error:  # a template is foreign code: what it raises is how it refuses
            roles = ", ".join(str(message.get("role")) for message in conversation.plain[:20])
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RequestError(
                f"the chat template refuses these messages ({roles}): {said}", "messages"
            ) from error

    def _open(self, conversation: Conversation) -> str:
        """Everything up to the end of the last message's content, which the answer goes on from, under the veil."""
        if not conversation.messages or conversation.plain[-1].get("role") != "assistant":
            found = conversation.plain[-1].get("role") if conversation.messages else "none"
            raise RequestError(
                f"continue_final_message: the last message is of role {found}; expected assistant",
                "continue_final_message",
            )
        content = str(conversation.messages[-1].get("content", ""))
        trimmed = content.rstrip()
        if trimmed != content and self._raw(conversation, False) == self._raw(
            conversation.ending(trimmed), False
        ):
            content = trimmed  # this template never lets a model see white space there
        stand_ins = conversation.veil.stand_ins.values() if conversation.veil else ()
        texts = [*leaves([conversation.plain, conversation.tools, conversation.variables]), *stand_ins]
        (mark,) = spare_characters(1, texts)
        raw = self._raw(conversation.ending(content + mark), False)
        if mark not in raw:
            raise RequestError(
                "continue_final_message: the chat template leaves out the last message's content",
                "continue_final_message",
            )
        return raw[: raw.rindex(mark)]

    def _turn(self, conversation: Conversation, index: int, with_eos: bool) -> _Turn:
        """Turn `index` as the end of its conversation, which is how serving makes it."""
        upto = conversation.first(index + 1)
        raw = self._raw(upto, False)
        text = self._seen(raw, upto.veil)
        message = conversation.plain[index]
        is_answer = message.get("role") == "assistant"
        if is_answer and self._has_markers and (start := self._marked_start(upto, raw)):
            return _Turn(text, start, with_eos)
        prompt = self._text(conversation.first(index), is_answer) if index else ""
        if is_answer and index:
            if text.startswith(prompt):
                return _Turn(text, len(prompt), with_eos)
            raise RequestError(_mismatch(prompt, text), f"messages.{index}")
        # Nothing is served before this turn, or it is not an answer: its own words start at its content.
        content = str(message.get("content", "")).strip()
        start = text.find(content, len(prompt) if text.startswith(prompt) else 0)
        if not content or start < 0:
            raise RequestError(
                f"the content of this {message.get('role')} turn is not found in what the chat template makes of it",
                f"messages.{index}",
            )
        return _Turn(text, start, with_eos)

    def _marked_start(self, conversation: Conversation, raw: str) -> int | None:
        """Where the template's last {% generation %} block begins; None if that does not hold for this turn."""
        rendered, indices = render_jinja_template(
            conversations=[list(conversation.messages)],
            tools=conversation.tools,
            chat_template=self._tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            enable_thinking=self._tokenizer.has_thinking,
            **self._tokenizer.special_tokens_map,
        )
        if not indices[0] or rendered[0] != raw:
            return None
        return len(self._seen(raw[: int(indices[0][-1][0])], conversation.veil))

    # Tokens

    def _encode(self, veiled: str, veil: Veil | None) -> tuple[int, ...]:
        return self._reader_of(veil).encoder.encode(self._seen(veiled, veil))

    def _joint(self, reader: _Reader, whole: str, turns: Sequence[_Turn]) -> Supervised | None:
        """All turns in one sequence, if each prompt, as served, is a prefix of it; otherwise None."""
        if not all(whole.startswith(turn.text) for turn in turns):
            return None
        ids, begins = reader.encoder.encode_with_begins(whole)
        spans = []
        for turn in turns:
            start = reader.prompt_length(turn.prompt, ids, begins)
            if start is None:
                return None
            stop = len(ids)
            if turn.text != whole and begins is not None:
                stop = bisect_left(begins, len(turn.text))
            elif turn.text != whole:
                stop = _common(ids, reader.encoder.encode(turn.text))
            spans.append(self._span(ids, start, stop, turn.with_eos))
        return Supervised(ids, tuple(spans))

    def _alone(self, reader: _Reader, turn: _Turn) -> Supervised:
        """One turn after its prompt as served; what follows the turn is cut off."""
        joint = self._joint(reader, turn.text, [turn])
        if joint is None:
            prompt = reader.encoder.encode(turn.prompt)
            ids = (*prompt, *reader.encoder.encode(turn.text[turn.start :]))
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


class _Reader:
    """An encoder that remembers the ends of prompts."""

    def __init__(self, encoder: Encoder, cut_ids: Collection[int]) -> None:
        """cut_ids: tokens that are found in a text before anything else, and part it."""
        self.encoder = encoder
        self._cut_ids = cut_ids
        self._tails: dict[str, tuple[int, ...]] = {}

    def prompt_length(self, prompt: str, ids: tuple[int, ...], begins: Sequence[int] | None) -> int | None:
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
            found = self.encoder.encode(words)
            if len(self._tails) < MAX_TAILS and len(words) <= MAX_TAIL_CHARS:
                self._tails[words] = found
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
