"""What a chat's body and the server say of thoughts → variables of the template, and Thinking for the engine."""

from __future__ import annotations

from collections.abc import Sequence

from serve.api.schemas import ChatBody
from serve.engine.thinking import Thinking
from serve.errors import RequestError
from serve.model.template import SWITCHES, ChatTemplate
from serve.model.thoughts import Thoughts
from serve.runtime import Runtime


def thinking_variables(
    runtime: Runtime, template: ChatTemplate, thoughts: Thoughts | None, body: ChatBody
) -> dict[str, bool]:
    """`enable_thinking`, the request's or the server's, by the name under which the template reads it.

    RequestError where a request asks for what this template cannot be told, and does not do by itself.
    """
    switches = [name for name in SWITCHES if name in template.variables]
    wanted = body.enable_thinking
    if wanted is None:
        said = {*template.defaults, *(body.chat_template_kwargs or {})}
        default = runtime.config.enable_thinking
        return {} if default is None or said & set(switches) else dict.fromkeys(switches, default)
    if not switches and wanted != (thoughts is not None) and body.insists_on_thinking:
        does = "thinks in any case" if thoughts is not None else "does not think"
        raise RequestError(
            f"enable_thinking: found {str(wanted).lower()}, but this model {does}: its chat template has no switch",
            "enable_thinking",
        )
    return dict.fromkeys(switches, wanted)


def thoughts_of(runtime: Runtime, template: ChatTemplate, body: ChatBody) -> Thoughts | None:
    """By which marks answers are read; None: there are none. To be called when it is the tokenizer's turn.

    RequestError names the field that cannot be done.
    """
    thoughts = runtime.thoughts.of(template, body.thinking_start_token, body.thinking_end_token)
    if thoughts is None and body.budget is not None and body.insists_on_thinking:
        name = "thinking_budget" if body.thinking_budget is not None else "thinking_token_budget"
        raise RequestError(
            f"{name}: found {body.budget}, but answers of this model have no thoughts with marks; name the marks "
            "with thinking_start_token and thinking_end_token",
            name,
        )
    return thoughts


def thinking_of(
    runtime: Runtime,
    template: ChatTemplate,
    thoughts: Thoughts | None,
    body: ChatBody,
    prompt: Sequence[int],
    *,
    tells_calls: bool = False,
) -> Thinking | None:
    """How the answer to a prompt's tokens is told from its thoughts, and what these may take.

    tells_calls  as Thinking has it
    """
    if thoughts is None:
        return None
    budget = runtime.config.thinking_budget if body.budget is None else body.budget
    return Thinking(thoughts, thoughts.cue(prompt, template.end_ids), budget, tells_calls)
