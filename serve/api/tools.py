"""What one chat's tools come to: what its prompt says of them, how its answers are read, and what these must be."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.api.answer import Piece
from serve.api.schemas import ChatBody, GenerationBody
from serve.api.services import Services
from serve.constraints.grammar import Grammar
from serve.constraints.spec import ConstraintSpec
from serve.engine.request import Event
from serve.engine.thinking import Thinking
from serve.errors import RequestError
from serve.model.template import ChatTemplate
from serve.model.thoughts import Thoughts
from serve.runtime import Runtime
from serve.tools.call import CallPiece
from serve.tools.grammar import Wanted, calls_grammar, schema_of, softened
from serve.tools.reader import ToolReader
from serve.tools.rules import FALLBACK, ToolMarks
from serve.tools.tool import Tool
from serve.tools.words import told_in_words

HARMONY = "gpt_oss"


@dataclass(frozen=True)
class ToolUse:
    """Of one request."""

    tools: tuple[Tool, ...] = ()
    """That the prompt tells of."""
    readable: tuple[Tool, ...] = ()
    """That answers may call; empty: answers are text."""
    marks: ToolMarks | None = None
    """How calls are written; None: they are not read."""
    is_single: bool = False
    """An answer ends with its first call."""
    wanted: Wanted | None = None
    """What answers must be, by grammar; None: what they like."""

    @property
    def is_read(self) -> bool:
        """Whether calls are told from the text."""
        return self.marks is not None and bool(self.readable)

    @property
    def is_in_headers(self) -> bool:
        """Whether calls begin in the headers by which thoughts are told from answers."""
        return self.is_read and self.marks is not None and self.marks.format.name == HARMONY

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the answers' text has to show."""
        return self.marks.shown_ids if self.marks is not None and self.is_read else frozenset()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end answers, besides the model's own."""
        return self.marks.stop_ids if self.marks is not None and self.is_read else ()

    def messages(
        self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """As the template can tell them."""
        format = FALLBACK if self.marks is None else self.marks.format
        return list(told_in_words(template, format, messages, self.tools))

    def for_template(self, template: ChatTemplate) -> list[dict[str, Any]] | None:
        """The tools, where the template tells of them itself."""
        if not self.tools or not template.renders_tools:
            return None
        return [tool.for_template() for tool in self.tools]

    def reader(self) -> RowReader | None:
        """One for each answer."""
        if self.marks is None or not self.is_read:
            return None
        return RowReader(ToolReader(self.marks.format, self.readable, is_single=self.is_single))


NO_TOOLS = ToolUse()


class RowReader:
    """One answer's events as pieces, its calls told from its text."""

    def __init__(self, reader: ToolReader) -> None:
        self._reader = reader

    @property
    def is_over(self) -> bool:
        """Whether the answer has said all that is wanted of it."""
        return self._reader.is_over

    def read(self, event: Event) -> list[Piece]:
        """What an event brought, at least one piece. Text that follows a call is a piece of its own."""
        piece = Piece.of(event)
        parts = self._reader.push(event.text).parts
        if event.finish is not None or self.is_over:
            parts += self._reader.finish(is_cut=event.finish == "length").parts
        finish = piece.finish
        if self.is_over or (finish == "stop" and self._reader.num_calls):
            finish = "tool_calls"
        said = _in_order(parts)
        pieces = [
            Piece(text=text, calls=calls, num_reasoning_tokens=piece.num_reasoning_tokens)
            for text, calls in said
        ]
        pieces[0] = piece._replace(text=said[0][0], calls=said[0][1], finish=None, stop_reason=None)
        pieces[-1] = pieces[-1]._replace(finish=finish, stop_reason=piece.stop_reason)
        return pieces


def _in_order(parts: Sequence[str | CallPiece]) -> list[tuple[str, tuple[CallPiece, ...]]]:
    """Pairs of text and the calls after it, at least one."""
    found: list[tuple[str, tuple[CallPiece, ...]]] = [("", ())]
    for part in parts:
        text, calls = found[-1]
        if isinstance(part, CallPiece):
            found[-1] = (text, (*calls, part))
        elif calls:
            found.append((part, ()))
        else:
            found[-1] = (text + part, ())
    return found


def tools_of(runtime: Runtime, template: ChatTemplate, thoughts: Thoughts | None, body: ChatBody) -> ToolUse:
    """What a body's tools come to under a template. To be called when it is the tokenizer's turn.

    RequestError where answers are to be held to calls that no grammar can say here.
    """
    tools = body.all_tools
    if not tools and not body.has_tool_history:
        return NO_TOOLS
    marks = runtime.tools.of(template, has_channels=thoughts is not None and thoughts.name == HARMONY)
    mode, may_call = body.mode, body.callable_tools
    if mode == "none" or not may_call:
        return ToolUse(tools, (), marks)
    wanted: Wanted | None = None
    if mode == "required":
        wanted, param = "required", "function_call" if body.function_call is not None else "tool_choice"
    elif any(tool.strict for tool in may_call):
        wanted, param = "auto", "functions" if body.uses_functions else "tools"
    if wanted is not None and marks is None:
        raise RequestError(
            f"{param}: answers are to be held to {'a call' if mode == 'required' else 'strict tools'}, but calls are "
            "not read here; send tool_choice auto, and no strict",
            param,
        )
    other = body.constraint
    if other is not None and other.kind == "json":  # an answer is of its schema, or a call
        if mode == "auto" and marks is not None:
            wanted = "auto"
        elif wanted == "auto":
            raise _found_beside(other, "strict tools")
    elif other is not None and wanted is not None:
        raise _found_beside(
            other, "strict tools" if wanted == "auto" else "tool_choice, by which it is a call"
        )
    return ToolUse(tools, may_call, marks, body.calls_one_at_most, wanted)


def _found_beside(other: ConstraintSpec, what: str) -> RequestError:
    name = other.place.partition(".")[0]
    return RequestError(f"{name}: found beside {what}; an answer keeps to one of them", name)


async def grammar_of(services: Services, body: GenerationBody, use: ToolUse) -> Grammar | None:
    """What an answer must be; None: anything. RequestError names the place that cannot be kept to."""
    spec = body.constraint
    if use.wanted is None:
        return None if spec is None else await services.grammars.get(spec)
    strict = [tool.name for tool in use.readable if tool.strict]
    loose = {tool.name for tool in use.readable} - set(strict) if use.wanted == "auto" else set()
    answer = json.loads(spec.text) if spec is not None and use.wanted == "auto" else None
    answer = {} if answer is True else answer
    soft: set[str] = set()
    try:
        return await services.grammars.get(_spec(use, loose, answer))
    except RequestError:
        # Whose schema it is; of those that need not be kept to, the arguments are any.
        if spec is not None and answer is not None:
            await services.grammars.get(spec)
        for number, tool in enumerate(use.tools):
            if tool not in use.readable or tool.name in loose:
                continue
            place = f"tools.{number}.function.parameters"
            try:
                await services.grammars.get(ConstraintSpec.of_schema(schema_of(tool), place))
            except RequestError:
                if tool.strict:
                    raise
                (soft if await _is_kept(services, softened(schema_of(tool)), place) else loose).add(tool.name)
    return await services.grammars.get(_spec(use, loose, answer, soft))


def headers_in_grammar(thinking: Thinking, grammar: Grammar) -> tuple[Thinking, Grammar]:
    """Both, where calls and thoughts are messages under headers, of which the grammar knows all. RequestError where
    the prompt has begun a message that it does not let through."""
    thoughts, begun = thinking.thoughts.in_grammar(thinking.cue)
    left = grammar.after(begun)
    if left is None:
        raise RequestError(
            "continue_final_message: the answer is to be held to a call, and has begun already as something else",
            "continue_final_message",
        )
    return replace(thinking, thoughts=thoughts, in_grammar=True), left


async def _is_kept(services: Services, schema: Mapping[str, Any], place: str) -> bool:
    try:
        await services.grammars.get(ConstraintSpec.of_schema(schema, place))
    except RequestError:
        return False
    return True


def _spec(
    use: ToolUse, loose: Collection[str], answer: Mapping[str, Any] | None, soft: Collection[str] = ()
) -> ConstraintSpec:
    assert use.marks is not None
    assert use.wanted is not None
    text = calls_grammar(
        use.marks, use.readable, use.wanted, is_single=use.is_single, loose=loose, soft=soft, answer=answer
    )
    return ConstraintSpec("grammar", text, "tools")
