"""`lathe chat`: a conversation in the terminal with any OpenAI-compatible server, over HTTP, streamed.

Lines come from a terminal or a pipe. The client knows no model: what it sends is what any client would.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

from serve.errors import ConfigError, LatheError, NotFoundError, RequestError, StoppedError

TIMEOUT_S = 600.0
HELP = "/reset forgets the conversation, /model NAME switches, /exit ends."


@dataclass(frozen=True)
class Speaker:
    """Who answers, and how."""

    url: str
    model: str
    api_key: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request besides model and messages: temperature, max_tokens, …"""


class Conversation:
    """The messages so far, and how to get the next one."""

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self.model = speaker.model
        self._speaker = speaker
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._opening)

    def say(self, text: str) -> Iterator[str]:
        """Send the next user turn and yield the answer's pieces as they come.

        Raises RequestError when the server refuses, StoppedError when the stream breaks; the conversation is
        then as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        for piece in self._stream(asked):
            pieces.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _stream(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        body = {"model": self.model, "messages": messages, "stream": True, **self._speaker.sampling}
        with (
            _connect(self._speaker.url, self._speaker.api_key) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise RequestError(_refusal(response.read().decode(errors="replace"), response.status_code))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data and data != "[DONE]":
                    yield from _pieces(json.loads(data))


def _connect(url: str, api_key: str | None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers)


def _pieces(chunk: Mapping[str, Any]) -> Iterator[str]:
    if chunk.get("error"):
        raise StoppedError(_refusal(json.dumps(chunk), 500))
    for choice in chunk.get("choices") or ():
        content = (choice.get("delta") or {}).get("content")
        if content:
            yield content


def _refusal(body: str, status: int) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"the server answered {status}: {body[:500]}"


def served_models(url: str, api_key: str | None = None) -> list[str]:
    """The names a request's `model` may hold. Raises ConfigError where no such server answers."""
    try:
        with _connect(url, api_key) as http:
            listed = http.get("/v1/models", timeout=30.0)
            listed.raise_for_status()
            return [str(entry["id"]) for entry in listed.json()["data"]]
    except (httpx.HTTPError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{url}: no OpenAI-compatible server answers there ({type(error).__name__}: {error}); "
            "start one with `lathe serve MODEL`"
        ) from error


def choose_model(url: str, model: str | None, api_key: str | None = None) -> str:
    """`model` if the server has it, its first one if none is asked for. Raises NotFoundError naming all."""
    known = served_models(url, api_key)
    if model is None and known:
        return known[0]
    # name@version and other spellings may be served without being listed.
    if model is not None and model.split("@")[0] in known:
        return model
    raise NotFoundError(f"{url} has no model {model!r}; it has: {', '.join(known) or 'none'}")


def run(conversation: Conversation, lines: Iterable[str], console: Console, *, echo: bool) -> None:
    """Talk until /exit or the lines end. `echo` prints the user's lines too, for a pipe."""
    for line in lines:
        text = line.strip()
        if echo and text:
            console.print(f"> {text}", markup=False, highlight=False)
        if text in ("/exit", "/quit"):
            return
        if text.startswith("/"):
            _command(conversation, text, console)
        elif text:
            _answer(conversation, text, console)


def _command(conversation: Conversation, text: str, console: Console) -> None:
    word, _, rest = text.partition(" ")
    if word == "/reset":
        conversation.reset()
        console.print("(forgotten)", style="dim")
    elif word == "/model" and rest.strip():
        conversation.model = rest.strip()
        console.print(f"(now {conversation.model})", style="dim")
    else:
        console.print(HELP, style="dim", markup=False)


def _answer(conversation: Conversation, text: str, console: Console) -> None:
    try:
        for piece in conversation.say(text):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
    except LatheError as error:
        console.print(f"\n{error}", style="red", markup=False)
    except httpx.HTTPError as error:
        console.print(f"\nthe connection broke: {error}", style="red", markup=False)


def typed(console: Console) -> Iterator[str]:
    """Lines from the terminal, until Ctrl-D."""
    while True:
        try:
            yield console.input("[bold]you:[/bold] ")
        except EOFError:
            console.print()
            return
