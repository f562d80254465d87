"""A conversation with an OpenAI-compatible server: a user's turn in, the answer's pieces out, streamed.

A turn may bring pictures: an address is the server's to fetch, a file of this machine is read here and sent along.

The messages are here, not in the server: one that died and came back goes on where it was. Knows no terminal.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import re
import shlex
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from serve.errors import RequestError, StoppedError
from serve.remote import EventData, connect, message_of, refusal, trouble

Message = Mapping[str, Any]
HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")
ADDRESS = re.compile(r"(https?://|data:)", re.IGNORECASE)
MAX_PICTURE_MIB = 64


@dataclass(frozen=True)
class Speaker:
    """Who answers, and how."""

    url: str
    model: str
    api_key: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request besides model and messages: temperature, max_tokens, …"""


@dataclass(frozen=True)
class _Turn:
    """What was asked last, and after which messages."""

    before: tuple[Message, ...]
    text: str
    pictures: tuple[str, ...] = ()
    """Addresses, or data URIs."""

    @property
    def message(self) -> Message:
        """As it is sent: pictures before the words that speak of them."""
        if not self.pictures:
            return _message("user", self.text)
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in self.pictures]
        return {"role": "user", "content": [*shown, {"type": "text", "text": _encodable(self.text)}]}


class Thought(str):
    """A piece of what was thought before the answer."""


class Conversation:
    """The messages so far, and how to get the next one."""

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self.model = speaker.model
        self.finish: str | None = None
        """Why the last answer ended, in the server's word; None if it was broken off."""
        self.num_asked = 0
        """How often the server was asked for an answer."""
        self._speaker = speaker
        self._opening: tuple[Message, ...] = (_message("system", system),) if system else ()
        self._last: _Turn | None = None
        self._shown: tuple[str, ...] = ()  # with the next turn
        self.messages: tuple[Message, ...] = self._opening

    @property
    def has_turn(self) -> bool:
        """True when there is something that `retry` would ask again."""
        return self._last is not None

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = self._opening
        self._last, self._shown = None, ()

    def show(self, picture: str) -> None:
        """Send this picture with the next turn: an http(s) address, or a file. RequestError if it cannot be read."""
        self._shown = (*self._shown, picture if ADDRESS.match(picture) else _data_uri(picture))

    def say(self, text: str) -> Generator[str, None, None]:
        """Send the next user turn and yield the answer's pieces as they come, Thoughts among them.

        Raises RequestError or OverloadedError when the server refuses, StoppedError when it is gone or the stream
        breaks. An answer that was broken off, by that or by closing this generator, is kept as far as it came;
        where nothing came, the conversation is as it was before. Either way `retry` asks again.
        """
        turn = _Turn(self.messages, text, self._shown)
        self._shown = ()
        return self._ask(turn)

    def retry(self) -> Generator[str, None, None]:
        """As `say`, with the last turn once more: its new answer takes the place of the old. RequestError if none."""
        if self._last is None:
            raise RequestError("nothing has been asked yet")
        return self._ask(self._last)

    def _ask(self, turn: _Turn) -> Generator[str, None, None]:
        self._last, self.finish = turn, None
        self.num_asked += 1
        asked = (*turn.before, turn.message)
        pieces: list[str] = []
        try:
            for piece in self._stream(asked):
                pieces.append(piece)
                yield piece
        finally:
            if pieces or self.finish is not None:
                self.messages = (*asked, _answer(pieces))

    def _stream(self, messages: Sequence[Message]) -> Iterator[str]:
        model = _encodable(self.model)
        body = {"model": model, "messages": messages, "stream": True, **self._speaker.sampling}
        try:
            with (
                connect(self._speaker.url, self._speaker.api_key) as http,
                http.stream("POST", "/v1/chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    raise refusal(response.status_code, response.read().decode(errors="replace"))
                yield from self._pieces(response)
        except httpx.HTTPError as error:
            raise StoppedError(f"{self._speaker.url}: {trouble(error)}") from error

    def _pieces(self, response: httpx.Response) -> Iterator[str]:
        events = EventData()
        for some in response.iter_bytes():
            for data in events.feed(some):
                for choice in _choices(data):
                    self.finish = choice.get("finish_reason") or self.finish
                    delta = choice.get("delta") or {}
                    thought = delta.get("reasoning_content") or delta.get("reasoning")
                    if thought:
                        yield Thought(thought)
                    if content := delta.get("content"):
                        yield str(content)
        if self.finish is None and not events.is_done:
            raise StoppedError(f"{self._speaker.url}: the stream ended before the answer did")
        self.finish = self.finish or "stop"


def _choices(data: str) -> Sequence[Mapping[str, Any]]:
    try:
        chunk = json.loads(data)
        error, choices = chunk.get("error"), chunk.get("choices")
    except (ValueError, AttributeError):
        raise StoppedError(f"the server's stream cannot be read: {data[:200]}") from None
    if error:
        raise StoppedError(message_of(data))
    return choices or ()


def _data_uri(typed: str) -> str:
    """The file's bytes, as an address that holds them."""
    path = _path(typed)
    try:
        size = path.stat().st_size
        if size > MAX_PICTURE_MIB * 2**20:
            raise RequestError(f"{path}: found {size / 2**20:,.0f} MiB; at most {MAX_PICTURE_MIB} are sent")
        content = base64.b64encode(path.read_bytes()).decode()
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{typed}: cannot be read: {error}; expected a picture's file or address"
        ) from None
    return f"data:{mimetypes.guess_type(path.name)[0] or 'application/octet-stream'};base64,{content}"


def _path(typed: str) -> Path:
    """A path as people write it, or as terminals do for a file dropped on them: quoted, or with escaped spaces."""
    try:
        path = Path(typed).expanduser()
        words = [] if path.exists() else shlex.split(typed)
        return Path(words[0]).expanduser() if len(words) == 1 else path
    except (OSError, RuntimeError, ValueError):
        return Path(typed)


def _answer(pieces: Sequence[str]) -> Message:
    """What was answered; with what was thought, which the template may want of the last turn."""
    said = "".join(piece for piece in pieces if not isinstance(piece, Thought))
    thought = "".join(piece for piece in pieces if isinstance(piece, Thought))
    message = _message("assistant", said)
    return {**message, "reasoning_content": _encodable(thought)} if thought else message


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": _encodable(content)}


def _encodable(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs: that is how Python reads bytes that are not UTF-8."""
    return HALF_OF_A_PAIR.sub("\N{REPLACEMENT CHARACTER}", text)
