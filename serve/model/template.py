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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Literal

from jinja2 import TemplateError

from serve.errors import RequestError
from serve.model.expansion import Expansion, expanded
from serve.model.forms import (
    Ends,
    Forms,
    Shown,
    cue_of,
    ends_of,
    forms_of,
    renders_broken,
    renders_system,
    renders_tools,
    shown_of,
)
from serve.model.jinja import TooSlowError
from serve.model.messages import (
    Conversation,
    data,
    dealt,
    leaves,
    plain_message,
    plain_tools,
)
from serve.model.renderer import Message as Message
from serve.model.renderer import renderer_of
from serve.model.spans import Reader, SpanWriter
from serve.model.spans import Supervised as Supervised
from serve.model.turns import Turns, told_to_all
from serve.model.words import ControlTokens, Encoder, NamedControl, Veil, spare_characters

SpecialTokens = Literal["words", "control"]
"""What a special token's text inside a message is: its characters, or the token."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_LIMIT_S = 0.5
"""Of this thread's CPU, for each conversation by which a template is tried out."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates are told not to open a thought."""


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
        self.forms = self._forms()
        """In which form the template gets what messages may say in several."""
        self.hash: str = f"sha256:{hashlib.sha256(_identity(self._custom, template).encode()).hexdigest()}"
        self.source: str = _source(template)
        """Its text; that which tools are rendered by, where there are several; empty of one written in Python."""
        self._has_markers = isinstance(template, str) and _MARKER.search(template) is not None
        self._added = {
            int(number): token for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        }
        special = {number for number, token in self._added.items() if token.special}
        self._end_ids = special | set(tokenizer.eos_token_ids)
        self._cut_ids = {number for number, token in self._added.items() if _cuts(token)}
        self._blank: dict[int, bool] = {}
        self._reader = Reader(Encoder(tokenizer._tokenizer), self._cut_ids)
        self._is_open = special_tokens_in_messages == "control"
        markup = self._markup()
        control = {self._added[number].content for number in special | self._ends()} | self._frame(markup)
        control = {text for text in control if not text.isspace()}
        self._control = ControlTokens(control)
        self._control_of_answers = ControlTokens(control - markup) if control & markup else self._control
        self._named: tuple[NamedControl, Reader] | None = None  # made when it is first needed
        self._hidden_texts: dict[frozenset[str], tuple[ControlTokens, ControlTokens]] = {}
        self._media_forms: dict[tuple[str, str], Shown | None] = {}
        self._ends_turns = self._ends_of_turns()
        self._quiet = [{name: False} for name in SWITCHES if name in self.variables]
        self._cues = self._openings()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose token ids it gives."""
        return self._tokenizer

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that can end a turn: the model's end tokens, and control tokens but for the marks inside answers."""
        around = set(self._control.texts) - self._markup()
        control_ids = {number for number, token in self._added.items() if token.content in around}
        return frozenset(control_ids | set(self._tokenizer.eos_token_ids))

    @cached_property
    def renders_tools(self) -> bool:
        """Whether prompts tell of tools that they are given."""
        return renders_tools(lambda messages, tools: self._probe(messages, True, tools=tools), self.forms)

    @cached_property
    def takes_system(self) -> bool:
        """Whether prompts hold what a system turn says."""
        return renders_system(lambda messages, tools: self._probe(messages, True), self.forms)

    @cached_property
    def renders_broken(self) -> bool:
        """Whether prompts can hold a call whose arguments are no JSON."""
        return renders_broken(lambda messages, tools: self._probe(messages, True), self.forms)

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
        media: Sequence[Expansion] = (),
    ) -> Written:
        """The prompt as text. RequestError if there is no template, or it refuses the messages, or takes too long.

        Content given as parts of text is joined, a null content is "", and a tool call's arguments may be JSON text:
        templates then see one form.
        add_generation_prompt   open the next turn; true unless a message is continued
        continue_final_message  end with the last message's own words, for the answer to go on from
        variables               what the template reads besides, `self.variables`; another is refused by name
        limit_s                 seconds of this thread's CPU that the template may take
        media                   what the messages' parts of media show, in their order; without, parts are text alone
        """
        self._check_variables(variables or {})
        conversation = replace(self._conversation(messages, tools, variables or {}, media), limit_s=limit_s)
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
        variables: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        train_on_eos: str = "turn",
        skip: Collection[int] = (),
        media: Sequence[Expansion] = (),
    ) -> list[Supervised]:
        """Training sequences of a conversation: spans run from a turn's first own token through its end-of-turn.

        roles         whose turns are supervised; headers never are, nor what follows the end-of-turn token
        train_on_eos  which end-of-turn tokens are: "turn" each, "last" the conversation's last one, "none"
        skip          indices of turns that are context only, whatever their role
        media         as `write` takes them
        Empty if no turn has one of the roles. RequestError as `render`, and for a turn of which nothing is rendered.
        """
        indices = [i for i, message in enumerate(messages) if message.get("role") in roles and i not in skip]
        if not indices:
            return []
        self._check_variables(variables or {})
        conversation = self._conversation(messages, tools, variables or {}, media)
        with_end = {
            i: train_on_eos == "turn" or (train_on_eos == "last" and i == indices[-1]) for i in indices
        }
        finder = Turns(
            self._raw,
            self._seen,
            control=self._control,
            ends=self._ends_turns,
            cues=self._cues,
            quiet=self._quiet,
            has_markers=self._has_markers,
        )
        turns = finder.find(conversation, with_end)
        writer = SpanWriter(
            self._reader_of(conversation.veil), self._is_blank, lambda token_id: token_id in self._end_ids
        )
        told = told_to_all(turns)
        if told is None:
            return [writer.alone(turn) for turn in turns]
        # Of several turns the last may end before the conversation does; of one, nothing after it is learned from.
        whole = turns[-1].whole
        if len(turns) > 1 and indices[-1] < len(messages) - 1:
            whole = self._text(replace(conversation, variables={**conversation.variables, **told}), False)
        joint = writer.joint(whole, turns)
        return [joint] if joint is not None else [writer.alone(turn) for turn in turns]

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

    def _forms(self) -> Forms:
        if self._renderer is None:
            return Forms()
        try:
            return forms_of(self._probe)
        except TooSlowError:
            return Forms()

    def _ends_of_turns(self) -> Ends:
        known = {self._added[number].content for number in self._ends()}
        if self._renderer is None:
            return Ends()
        try:
            return ends_of(self._probe, self.forms, self._control, known)
        except TooSlowError:
            return Ends(frozenset(known))

    def _openings(self) -> list[str]:
        """What is between a question and its answer as served: as it is, and told not to think."""
        if self._renderer is None:
            return []
        try:
            ways = [partial(self._probe, variables=way) for way in ({}, *self._quiet)]
            return list(dict.fromkeys(cue_of(way, self.forms) for way in ways))
        except TooSlowError:
            return []

    def _probe(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Message] | None = None,
    ) -> str:
        assert self._renderer is not None
        told = {**self.defaults, **variables}
        return self._renderer.render(messages, tools, add_generation_prompt, told, PROBE_LIMIT_S)

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
                written += self._probe([self.forms.shape(message) for message in messages], True)
            except Exception:  # it has no system turn, or refuses every conversation like this
                continue
        return {text for text in plain if text in written}

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        media: Sequence[Expansion] = (),
    ) -> Conversation:
        if self._renderer is None:
            raise RequestError(
                "this model's tokenizer has no chat template; send a prompt instead", "messages"
            )
        try:
            plain = tuple(plain_message(message, i, bool(media)) for i, message in enumerate(messages))
            shown = dealt(plain, media)
            said_tools, said_variables = plain_tools(tools), data({**self.defaults, **variables})
            control, control_of_answers = self._to_hide(media)
            veil = self._veil([plain, said_tools, said_variables], control)
            if veil is None:
                return Conversation(plain, plain, said_tools, said_variables, None, media=shown)

            def words(text: str) -> str:
                return veil.hide(text, control)

            hidden = tuple(self._hidden(message, veil, control, control_of_answers) for message in plain)
            return Conversation(
                plain, hidden, data(said_tools, words), data(said_variables, words), veil, media=shown
            )
        except RecursionError:
            raise RequestError("messages: found values nested too deeply", "messages") from None

    def _to_hide(self, media: Sequence[Expansion]) -> tuple[ControlTokens, ControlTokens]:
        """What words may not hold once they are rendered, in all messages and in answers.

        Where something is shown, the markers of its places are among it, whether they are tokens or not.
        """
        markers = frozenset(text for item in media for text in (item.marker, item.placeholder))
        if markers not in self._hidden_texts:
            self._add_control({item.placeholder for item in media})
            control, of_answers = (
                ControlTokens(markers if self._is_open else known.texts | markers)
                for known in (self._control, self._control_of_answers)
            )
            self._hidden_texts[markers] = control, of_answers
        return self._hidden_texts[markers]

    def _add_control(self, placeholders: set[str]) -> None:
        """Counts placeholders among control tokens, also those that the tokenizer does not call special."""
        tokens = {token.content for token in self._added.values()}
        new = (placeholders & tokens) - self._control.texts
        if new:
            self._control = ControlTokens(self._control.texts | new)
            self._control_of_answers = ControlTokens(self._control_of_answers.texts | new)
            self._named = None

    def _veil(self, said: Any, control: ControlTokens) -> Veil | None:
        """Stand-ins for all that is said, or None if there is nothing in it to hide."""
        texts = list(leaves(said))
        if not any(control.starts(text) for text in texts):
            return None
        characters = sorted(set("".join(control.texts)))
        return Veil(dict(zip(characters, spare_characters(len(characters), texts), strict=True)))

    def _hidden(
        self, message: Message, veil: Veil, control: ControlTokens, of_answers: ControlTokens
    ) -> dict[str, Any]:
        """A message without control tokens, but for the markup in an answer's content, which models write themselves.

        Templates build headers of a role, so its ends stay as they are; types of parts are nobody's words.
        """
        hidden = {
            key: data(value, lambda text: veil.hide(text, control))
            for key, value in message.items()
            if key not in ("role", "content")
        }
        in_content = of_answers if message.get("role") == "assistant" else control
        content = message["content"]
        hidden["content"] = (
            veil.hide(content, in_content)
            if isinstance(content, str)
            else [
                {key: veil.hide(text, in_content) if key == "text" else text for key, text in part.items()}
                for part in content
            ]
        )
        hidden["role"] = veil.hide(message["role"], control, is_edged=False)
        return hidden

    def _reader_of(self, veil: Veil | None) -> Reader:
        return self._reader if veil is None else self._naming()[1]

    def _naming(self) -> tuple[NamedControl, Reader]:
        if self._named is None:
            named = NamedControl(self._tokenizer._tokenizer, self._control)
            self._named = named, Reader(named.encoder, self._cut_ids)
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

    def _raw(
        self, conversation: Conversation, add_generation_prompt: bool, marks: tuple[str, str] | None = None
    ) -> str:
        """What the template writes, still under the veil."""
        if not conversation.messages:
            raise RequestError("messages: found none; expected at least one message", "messages")
        assert self._renderer is not None
        forms = self._forms_of_media(conversation)
        try:
            raw = self._renderer.render(
                [
                    self.forms.shape(message, media, forms)
                    for message, media in zip(conversation.messages, conversation.media, strict=True)
                ],
                conversation.tools,
                add_generation_prompt,
                conversation.variables,
                conversation.limit_s,
                marks,
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
        return expanded(raw, conversation.shown)

    def _forms_of_media(self, conversation: Conversation) -> dict[str, Shown]:
        """How the template wants each kind that is shown. RequestError for one that is written nowhere."""
        forms: dict[str, Shown] = {}
        for item in conversation.shown:
            key = (item.kind, item.marker)
            if key not in self._media_forms:
                try:
                    self._media_forms[key] = shown_of(self._probe, self.forms, item)
                except TooSlowError:
                    self._media_forms[key] = None
            form = self._media_forms[key]
            if form is None:
                raise RequestError(
                    f"the chat template writes no place for {item.kind}s ({item.marker})", "messages"
                )
            forms[item.kind] = form
        return forms

    def _open(self, conversation: Conversation) -> str:
        """Everything up to the end of the last message's content, which the answer goes on from, under the veil."""
        if not conversation.messages or conversation.plain[-1].get("role") != "assistant":
            found = conversation.plain[-1].get("role") if conversation.messages else "none"
            raise RequestError(
                f"continue_final_message: the last message is of role {found}; expected assistant",
                "continue_final_message",
            )
        content = conversation.messages[-1].get("content", "")
        if not isinstance(content, str):
            raise RequestError(
                "continue_final_message: the last message shows something; only words can be gone on from",
                "continue_final_message",
            )
        trimmed = content.rstrip()
        if trimmed != content and self._raw(conversation, False) == self._raw(
            conversation.ending(trimmed), False
        ):
            content = trimmed  # this template never lets a model see white space there
        (mark,) = conversation.spare(1)
        raw = self._raw(conversation.ending(content + mark), False)
        if mark not in raw:
            raise RequestError(
                "continue_final_message: the chat template leaves out the last message's content",
                "continue_final_message",
            )
        return raw[: raw.rindex(mark)]

    # Tokens

    def _encode(self, veiled: str, veil: Veil | None) -> tuple[int, ...]:
        return self._reader_of(veil).encoder.encode(self._seen(veiled, veil))

    def _is_blank(self, token_id: int) -> bool:
        found = self._blank.get(token_id)
        if found is None:
            found = self._blank[token_id] = not self._tokenizer.decode([token_id]).strip()
        return found


def _cuts(token: Any) -> bool:
    """Whether an added token is found in the text as it stands, so that it parts what is before it from the rest."""
    return not (token.normalized or token.lstrip or token.rstrip or token.single_word)


def _source(template: Any) -> str:
    if isinstance(template, Mapping):
        template = template.get("tool_use", template.get("default"))
    return template if isinstance(template, str) else ""


def _identity(custom: Any, template: Any) -> str:
    if custom is not None:
        return f"{custom.__module__}.{custom.__qualname__}"
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
