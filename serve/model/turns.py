"""A conversation → its turns as a chat template renders them: where each begins, behind the prompt that serving
makes, and where it ends. Knows no tokens but by their text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from serve.errors import RequestError
from serve.model.forms import Ends, after_cue, leading, missing_calls, squeezed
from serve.model.messages import Conversation, around, says
from serve.model.renderer import Message
from serve.model.spans import Turn
from serve.model.words import ControlTokens, Veil

THOUGHTS = ("<think>", "<thinking>", "<|channel>thought")
REASONING = ("reasoning_content", "thinking", "reasoning")

Write = Callable[..., str]
"""(conversation, add_generation_prompt, marks=None) → what the template writes, under the veil; RequestError where it
refuses. marks: characters that stand around its {% generation %} blocks."""


class Turns:
    """How one template's turns are found.

    seen         what a template wrote, as its reader takes it
    control      tokens that frame turns
    ends         those that end them
    cues         what is between a question and its answer as served
    quiet        variables that tell the template not to open a thought, each way by itself
    has_markers  its text has {% generation %} blocks
    """

    def __init__(
        self,
        write: Write,
        seen: Callable[[str, Veil | None], str],
        *,
        control: ControlTokens,
        ends: Ends,
        cues: Sequence[str],
        quiet: Sequence[Mapping[str, Any]],
        has_markers: bool,
    ) -> None:
        self._write = write
        self._seen = seen
        self._control = control
        self._ends = ends
        self._cues = cues
        self._quiet = quiet
        self._has_markers = has_markers

    def find(self, conversation: Conversation, with_end: Mapping[int, bool]) -> list[Turn]:
        """The turns of these indices, all told the same where that can be; values: whether the end is learned."""
        ways = [{}, *(v for v in self._quiet if not v.keys() & conversation.variables.keys())]
        turns = [self._turn(conversation, index, ends, ways) for index, ends in with_end.items()]
        if told_to_all(turns) is None:
            for way in ways[1:]:
                with suppress(RequestError):
                    return [self._turn(conversation, index, ends, [way]) for index, ends in with_end.items()]
        return turns

    def _turn(
        self, conversation: Conversation, index: int, with_end: bool, ways: Sequence[Mapping[str, Any]]
    ) -> Turn:
        """Turn `index` as the end of its conversation, which is how serving makes it, told in one of these ways."""
        message = conversation.plain[index]
        turn = None
        if message.get("role") == "assistant" and index:
            turn = self._answer(conversation, index, ways)
        if turn is None:
            turn = self._unprompted(conversation, index)
        self._check_says(message, index, turn, conversation.veil)
        return self._as_read(turn, with_end, conversation.veil)

    def _answer(
        self, conversation: Conversation, index: int, ways: Sequence[Mapping[str, Any]]
    ) -> Turn | None:
        """An assistant's turn after its prompt as served, told in the first of these ways in which they agree.

        None if nothing is served before it: nobody has asked, and the template refuses what was said so far.
        """
        refused: RequestError | None = None
        for variables in ways:
            told = replace(conversation, variables={**conversation.variables, **variables})
            try:
                prompt = self._write(told.first(index), True)
            except RequestError:
                if any(message.get("role") == "user" for message in conversation.plain[:index]):
                    raise
                return None
            raw, blocks = self._marked(told.first(index + 1))
            if raw.startswith(prompt):
                return self._bounded(told, index, raw, len(prompt), blocks, variables)
            refused = refused or RequestError(
                _mismatch(self._shown(prompt, told.veil), self._shown(raw, told.veil)), f"messages.{index}"
            )
        assert refused is not None
        raise refused

    def _unprompted(self, conversation: Conversation, index: int) -> Turn:
        """A turn that nothing is served before, or that is no answer: its own words start where its header ends.

        It is found by characters that nobody says, put where its words are. A template that refuses such a turn
        alone gets the whole conversation; the turn then ends at its first end token.
        """
        asked, is_alone = conversation.first(index + 1), True
        try:
            raw, blocks = self._marked(asked)
        except RequestError:
            if index + 1 == len(conversation.messages):
                raise
            asked, is_alone = conversation, False
            raw, blocks = self._marked(asked)
        start = self._own_start(asked, index, raw)
        if is_alone:
            return self._bounded(conversation, index, raw, start, blocks, None)
        ends = (
            start + at + len(token)
            for at, token in self._control.find(raw[start:])
            if token in self._ends.stops
        )
        stop = next(ends, None)
        if stop is None:
            raise RequestError(
                "the chat template refuses this turn without those after it, and nothing shows where it ends",
                f"messages.{index}",
            )
        spans = [(max(a, start), min(b, stop)) for a, b in blocks if b > start and a < stop]
        return Turn(raw[:stop], "", start, tuple(spans) or ((start, stop),))

    def _own_start(self, asked: Conversation, index: int, raw: str) -> int:
        """Where the turn's own words start in `raw`, after its header."""
        message = asked.plain[index]
        opens, closes = asked.spare(2)
        is_answer = message.get("role") == "assistant"
        content = asked.messages[index]["content"]
        within = opens if is_answer else around(content, opens, closes)
        marked = self._write(asked.saying(index, within), False)
        start = marked.find(opens)
        if is_answer and start >= 0:
            start = after_cue(marked[:start], self._cues, self._control)
        is_said = is_answer or (says(content).strip() and raw.endswith(marked[marked.rfind(closes) + 1 :]))
        if start < 0 or not is_said or not raw.startswith(marked[:start]):
            raise RequestError(
                f"the content of this {message.get('role')} turn is not found in what the chat template makes of it",
                f"messages.{index}",
            )
        return start

    def _bounded(
        self,
        told: Conversation,
        index: int,
        raw: str,
        start: int,
        blocks: Sequence[tuple[int, int]],
        variables: Mapping[str, Any] | None,
    ) -> Turn:
        """The turn from `start` to its first end token; `raw` ends with the turn, or before it does."""
        stop = self._end(raw, start)
        if told.plain[index].get("role") == "assistant" and self._ends.before_user and stop is None:
            raw += self._marker_after(told, index, raw)
            stop = self._end(raw, start)
        stop = len(raw) if stop is None else stop
        spans = [(max(a, start), min(b, stop)) for a, b in blocks if b > start and a < stop]
        if spans and self._is_framing(raw[spans[-1][1] : stop]):
            spans[-1] = (spans[-1][0], stop)
        return Turn(raw[:stop], raw[stop:], start, tuple(spans) or ((start, stop),), True, variables)

    def _end(self, raw: str, start: int) -> int | None:
        """After the first end token among the control tokens that the text ends with; None if there is none."""
        end, last = len(raw.rstrip()), None
        for at, token in reversed(list(self._control.find(raw[start:]))):
            if start + at + len(token) != end:
                break
            if token in self._ends.stops:
                last = end
            end = start + len(raw[start : start + at].rstrip())
        return last

    def _marker_after(self, told: Conversation, index: int, raw: str) -> str:
        """What begins the next turn, which is all that ends this one."""
        if index + 1 < len(told.messages):
            following = self._write(told.first(index + 2), False)
            if following.startswith(raw) and (marker := leading(following[len(raw) :], self._control)):
                return marker
        calls = bool(told.plain[index].get("tool_calls"))
        return self._ends.before_result if calls else self._ends.before_user

    def _is_framing(self, text: str) -> bool:
        """Whether there is nothing in it but control tokens and white space."""
        rest, end = [], 0
        for at, token in self._control.find(text):
            rest.append(text[end:at])
            end = at + len(token)
        return not "".join([*rest, text[end:]]).strip()

    def _check_says(self, message: Message, index: int, turn: Turn, veil: Veil | None) -> None:
        """RequestError for a turn that had something to say, where what is learned of it says nothing."""
        learned = "".join(turn.text[start:stop] for start, stop in turn.spans)
        thoughts = next((message[name] for name in REASONING if message.get(name)), "")
        said = f"{thoughts}{says(message.get('content') or '')}".strip()
        written = self._shown(learned, veil)
        if said and squeezed(said[-20:]) in squeezed(written):
            return
        lost = next(missing_calls(message, written), None)
        if lost is not None:
            raise RequestError(
                f"messages.{index}.tool_calls: this model's chat template does not render the call of {lost!r}, so "
                "this turn would be learned as one that says nothing",
                f"messages.{index}.tool_calls",
            )
        if said and self._is_framing(learned):
            raise RequestError(
                f"messages.{index}: this model's chat template renders nothing of what this "
                f"{message.get('role')} turn says",
                f"messages.{index}",
            )

    def _as_read(self, turn: Turn, with_end: bool, veil: Veil | None) -> Turn:
        """The turn as its reader takes it, in whose text control tokens have other lengths."""
        if veil is None:
            return replace(turn, with_end=with_end)

        def index(num_chars: int) -> int:
            return len(self._seen(turn.text[:num_chars], veil))

        whole, text = self._seen(turn.whole, veil), self._seen(turn.text, veil)
        spans = tuple((index(start), index(stop)) for start, stop in turn.spans)
        return replace(
            turn,
            text=text,
            rest=whole[len(text) :],
            num_prompt=index(turn.num_prompt),
            spans=spans,
            with_end=with_end,
        )

    def _shown(self, raw: str, veil: Veil | None) -> str:
        return raw if veil is None else veil.reveal(raw)

    def _marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """What the template writes, and where its {% generation %} blocks stand."""
        raw = self._write(conversation, False)
        if not self._has_markers:
            return raw, []
        opens, closes = conversation.spare(2)
        pieces = re.split(f"([{opens}{closes}])", self._write(conversation, False, (opens, closes)))
        blocks: list[tuple[int, int]] = []
        text, begin = "", 0
        for piece in pieces:
            if piece == opens:
                begin = len(text)
            elif piece == closes:
                blocks.append((begin, len(text)))
            else:
                text += piece
        return raw, blocks if text == raw else []


def told_to_all(turns: Sequence[Turn]) -> Mapping[str, Any] | None:
    """What the template was told for all turns; None if that is not the same."""
    told = [turn.variables for turn in turns if turn.variables is not None]
    return None if any(variables != told[0] for variables in told) else told[0] if told else {}


def _mismatch(prompt: str, text: str) -> str:
    tail = prompt[-30:]
    opened = next((mark for mark in THOUGHTS if prompt.rstrip().endswith(mark)), None)
    why = ""
    if opened is not None:
        why = (
            f"the chat template's prompt opens a thought ({opened}) that this turn does not have, and no variable "
            "tells the template not to; "
        )
    beside = text[max(0, len(prompt) - 30) : len(prompt) + 10]
    return (
        f"{why}the chat template's prompt for this turn ends with {tail!r}, but the turn itself is rendered "
        f"otherwise: {beside!r}; serving would never see the sequence that is trained"
    )
