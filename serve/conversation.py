"""A conversation with an OpenAI-compatible server: a user's turn in, the answer's pieces out, streamed.

The messages are here, not in the server: one that died and came back goes on where it was. Knows no terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve.errors import RequestError, StoppedError
from serve.remote import EventData, connect, message_of, refusal, trouble

Message = Mapping[str, str]
HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


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


class Conversation:
    """The messages so far, and how to get the next one."""

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self.model = speaker.model
        self.finish: str | None = None
        """Why the last answer ended, in the server's word; None if it was broken off."""
        self._speaker = speaker
        self._opening: tuple[Message, ...] = (_message("system", system),) if system else ()
        self._last: _Turn | None = None
        self.messages: tuple[Message, ...] = self._opening

    @property
    def has_turn(self) -> bool:
        """True when there is something that `retry` would ask again."""
        return self._last is not None

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = self._opening
        self._last = None

    def say(self, text: str) -> Generator[str, None, None]:
        """Send the next user turn and yield the answer's pieces as they come.

        Raises RequestError or OverloadedError when the server refuses, StoppedError when it is gone or the stream
        breaks. An answer that was broken off, by that or by closing this generator, is kept as far as it came;
        where nothing came, the conversation is as it was before. Either way `retry` asks again.
        """
        return self._ask(_Turn(self.messages, text))

    def retry(self) -> Generator[str, None, None]:
        """As `say`, with the last turn once more: its new answer takes the place of the old. RequestError if none."""
        if self._last is None:
            raise RequestError("nothing has been asked yet")
        return self._ask(self._last)

    def _ask(self, turn: _Turn) -> Generator[str, None, None]:
        self._last, self.finish = turn, None
        asked = (*turn.before, _message("user", turn.text))
        pieces: list[str] = []
        try:
            for piece in self._stream(asked):
                pieces.append(piece)
                yield piece
        finally:
            if pieces or self.finish is not None:
                self.messages = (*asked, _message("assistant", "".join(pieces)))

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
                    content = (choice.get("delta") or {}).get("content")
                    if content:
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


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": _encodable(content)}


def _encodable(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs: that is how Python reads bytes that are not UTF-8."""
    return HALF_OF_A_PAIR.sub("\N{REPLACEMENT CHARACTER}", text)
