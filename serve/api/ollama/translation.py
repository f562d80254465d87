"""Bodies in Ollama's words in, the ChatBody or CompletionBody that means the same out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from serve.api.constraints import ObjectFormat
from serve.api.embedding_schemas import EmbeddingBody
from serve.api.ollama.body import OllamaChatBody, OllamaEmbedBody, OllamaGenerateBody, OllamaMessage, Options
from serve.api.schemas import ChatBody, CompletionBody
from serve.api.strict import made_of
from serve.errors import RequestError

LATEST = ":latest"
"""The tag that their clients append to a name without one."""
_SIGNATURES = {"/9j/": "jpeg", "iVBOR": "png", "R0lGO": "gif", "UklGR": "webp"}
"""How base64 begins."""
_NAMES = {"enable_thinking": "think", "reasoning_effort": "think"}


def chat_of(body: OllamaChatBody | OllamaGenerateBody, model: str) -> ChatBody:
    """The same request of a model by our name of it."""
    turns = _turns(body.messages) if isinstance(body, OllamaChatBody) else _prompt(body)
    fields: dict[str, Any] = {
        "model": model,
        "messages": list(turns),
        "stream": body.is_streamed,
        **_drawing(body),
    }
    if body.think is not None:
        fields["enable_thinking"] = bool(body.think)
    if isinstance(body.think, str):
        fields["reasoning_effort"] = body.think
    if isinstance(body, OllamaChatBody) and body.tools:
        fields["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if body.logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    with told_as_sent():
        return made_of(ChatBody, fields)


def completion_of(body: OllamaGenerateBody, model: str) -> CompletionBody:
    """A raw prompt's. RequestError for what needs a template."""
    for name in ("system", "images", "think"):
        if getattr(body, name):
            raise RequestError(f"{name}: found beside raw: true, which takes the prompt as it is", name)
    fields: dict[str, Any] = {
        "model": model,
        "prompt": body.prompt,
        "stream": body.is_streamed,
        **_drawing(body),
    }
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return made_of(CompletionBody, fields)


def embedding_of(body: OllamaEmbedBody, input: str | list[str]) -> EmbeddingBody:
    """The same texts of a body of OpenAI's."""
    fields: dict[str, Any] = {"model": body.model.removesuffix(LATEST), "input": input}
    if body.dimensions is not None:
        fields["dimensions"] = body.dimensions
    if body.truncate is not False:
        fields["truncate_prompt_tokens"] = -1
    return made_of(EmbeddingBody, fields)


@contextmanager
def told_as_sent() -> Iterator[None]:
    """A RequestError that names a field by the chat's word leaves the block with Ollama's."""
    try:
        yield
    except RequestError as error:
        name = _NAMES.get(error.param or "")
        if name is None:
            raise
        raise type(error)(re.sub(rf"^{error.param}", name, str(error)), name) from None


def _drawing(body: OllamaChatBody | OllamaGenerateBody) -> dict[str, Any]:
    """Options and form."""
    options = body.options or Options.model_validate({})
    fields: dict[str, Any] = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p or None,
        "min_p": options.min_p,
        "seed": options.seed,
        "stop": options.stop or None,
        "max_tokens": options.num_predict if (options.num_predict or 0) > 0 else None,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
    }
    if options.repeat_penalty is not None and options.repeat_last_n != 0:
        fields["repetition_penalty"] = options.repeat_penalty
        if options.repeat_last_n is not None and options.repeat_last_n > 0:
            fields["repetition_context_size"] = options.repeat_last_n
    if body.format == "json":
        fields["response_format"] = ObjectFormat(type="json_object", schema=None)
    elif isinstance(body.format, Mapping):
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": body.format},
        }
    return {name: value for name, value in fields.items() if value is not None}


def _prompt(body: OllamaGenerateBody) -> Iterator[dict[str, Any]]:
    if body.system:
        yield {"role": "system", "content": body.system}
    yield {"role": "user", "content": _content(body.prompt or "", body.images or ())}


def _turns(messages: Sequence[OllamaMessage]) -> Iterator[dict[str, Any]]:
    """Calls without ids get numbers, and results those of the calls they follow."""
    due: list[str] = []  # ids of calls whose results have not come
    count = 0
    for message in messages:
        turn: dict[str, Any] = {
            "role": message.role,
            "content": _content(message.content or "", message.images or ()),
        }
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            due, calls = [], []
            for call in message.tool_calls:
                due.append(call.id or f"call_{count}")
                count += 1
                function = {"name": call.function.name, "arguments": call.function.arguments or {}}
                calls.append({"id": due[-1], "type": "function", "function": function})
            turn["tool_calls"] = calls
        if message.role == "tool":
            turn["tool_call_id"] = message.tool_call_id or (due.pop(0) if due else f"call_{count}")
            if name := message.tool_name or message.name:
                turn["name"] = name
        yield turn


def _content(text: str, images: Sequence[str]) -> str | list[dict[str, Any]]:
    """Pictures stand before the words."""
    if not images:
        return text
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _address(image)}} for image in images
    ]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _address(image: str) -> str:
    if image.startswith(("data:", "http://", "https://")):
        return image
    kind = next((kind for begin, kind in _SIGNATURES.items() if image.startswith(begin)), "png")
    return f"data:image/{kind};base64,{image}"
