"""Tools in words, for chat templates that know none: what there is to call, what was called, and what came of it.

Each of the three is said in words only where the template drops it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serve.tools.format import Parameters, ToolFormat, Writing
from serve.tools.tool import Tool
from serve.tools.values import kind_of

if TYPE_CHECKING:
    from serve.model.template import ChatTemplate

Message = Mapping[str, Any]
BROKEN = "arguments"
"""The key under which arguments that are no JSON object are told."""
INTRODUCTION = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, write the function's name and its arguments in this form:\n{example}"
)
"""As Hermes and Qwen say it."""


def told_in_words(
    template: ChatTemplate, format: ToolFormat, messages: Sequence[Message], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """The messages, with what this template would leave out said in them."""
    forms, writing = template.forms, format.writing
    told: list[dict[str, Any]] = []
    is_result = False
    for message in messages:
        said = dict(message)
        if said.get("tool_calls") and forms.renders_calls and not template.renders_broken:
            said["tool_calls"] = [_as_object(call) for call in said["tool_calls"]]
        if said.get("tool_calls") and not forms.renders_calls:
            calls = [written(writing, call, number) for number, call in enumerate(said.pop("tool_calls"))]
            words = writing.opening + writing.joint.join(calls) + writing.closing
            said["content"] = _joined(said.get("content"), words)
        if said["role"] == "tool" and not forms.renders_results:
            said = {"role": "user", "content": _around(said.get("content"))}
            if is_result:
                told[-1]["content"] = _joined(told[-1]["content"], said["content"])
                continue
            is_result = True
        elif is_result and said["role"] == "user":  # two turns of one role are refused by many templates
            told[-1]["content"] = _joined(told[-1]["content"], said.get("content"))
            is_result = False
            continue
        else:
            is_result = False
        told.append(said)
    if tools and not template.renders_tools:
        _introduce(template, told, introduction(writing, tools))
    return told


def introduction(writing: Writing, tools: Sequence[Tool]) -> str:
    """What there is to call, and how it is written."""
    signatures = "\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in tools)
    call = {"function": {"name": "<function-name>", "arguments": _EXAMPLE[writing.parameters is None]}}
    example = writing.opening + written(writing, call, 0) + writing.closing
    return INTRODUCTION.replace("{example}", example).replace("{tools}", signatures)


_EXAMPLE: Mapping[bool, Any] = {True: "<args-json-object>", False: {"<parameter-name>": "<value>"}}


def written(writing: Writing, call: Mapping[str, Any], number: int) -> str:
    """A call as models of this format write it. Arguments that are no object are written as they are."""
    function = call["function"]
    name, arguments = str(function["name"]), function.get("arguments")
    before = writing.before.replace("{name}", name).replace("{number}", str(number))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return before + arguments + writing.after
    parameters = writing.parameters
    if parameters is None or not isinstance(arguments, Mapping):
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return before + text + writing.after
    values = [
        parameters.opening(key, kind_of(value))
        + _value(parameters, value)
        + parameters.after.replace("{name}", key)
        for key, value in arguments.items()
    ]
    return before + parameters.joint.join(values) + writing.after


def _value(parameters: Parameters, value: Any) -> str:
    if isinstance(value, str) and parameters.quotes is not None:
        return parameters.quotes[0] + value + parameters.quotes[1]
    return json.dumps(value, ensure_ascii=False)


def _as_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call; arguments that are no JSON object, which the template would refuse, as the text of one."""
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        return call
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, Mapping):
        return call
    return {**call, "function": {**function, "arguments": {BROKEN: arguments}}}


def _introduce(template: ChatTemplate, told: list[dict[str, Any]], words: str) -> None:
    if told and told[0]["role"] == "system":
        told[0]["content"] = _joined(told[0].get("content"), words, "\n\n")
    elif template.takes_system:
        told.insert(0, {"role": "system", "content": words})
    else:
        first = next((message for message in told if message["role"] == "user"), None)
        if first is None:
            told.insert(0, {"role": "user", "content": words})
        else:
            first["content"] = _joined(words, first.get("content"), "\n\n")


def _around(content: Any) -> Any:
    """A tool's answer, between its marks."""
    return _joined(_joined("<tool_response>", content), "</tool_response>")


def _joined(first: Any, second: Any, joint: str = "\n") -> Any:
    """Two contents as one; parts where either has parts."""
    if isinstance(first, list) or isinstance(second, list):
        return [
            *_parts(first),
            *([{"type": "text", "text": joint}] if first and second else []),
            *_parts(second),
        ]
    return joint.join(text for text in (first, second) if text)


def _parts(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []
