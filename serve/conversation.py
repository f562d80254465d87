"""A conversation with an OpenAI-compatible server: a user's turn in, the answer's pieces out, streamed.

A turn may bring pictures: an address is the server's to fetch, a file of this machine is read here and sent along.

The messages are here, not in the server: one that died and came back goes on where it was. Knows no terminal.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import re
import shlex
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serve.argument_text import readable
from serve.errors import NotFoundError, RequestError, StorageError
from serve.remote import choose_model, served_card, served_parents
from serve.remote_adapters import RemoteAdapters
from serve.remote_answer import CHAT, RemoteAnswer, Thought

Message = Mapping[str, Any]
ADDRESS = re.compile(r"(https?://|data:)", re.IGNORECASE)
MAX_FILE_MIB = 64


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
        return {"role": "user", "content": [*shown, {"type": "text", "text": readable(self.text)}]}


class Conversation:
    """The messages so far, and how to get the next one."""

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self.model = speaker.model
        self.finish: str | None = None
        """Why the last answer ended, in the server's word; None if it was broken off."""
        self.num_asked = 0
        """How often the server was asked for an answer."""
        self._speaker = speaker
        self._opening = _opening(system)
        self._last: _Turn | None = None
        self._shown: tuple[str, ...] = ()  # with the next turn
        self.messages: tuple[Message, ...] = self._opening

    @property
    def has_turn(self) -> bool:
        """True when there is something that `retry` would ask again."""
        return self._last is not None

    @property
    def system(self) -> str | None:
        """The system prompt; setting it changes what the next turn is asked under, and forgets nothing."""
        return str(self._opening[0]["content"]) if self._opening else None

    @system.setter
    def system(self, text: str | None) -> None:
        num_before, self._opening = len(self._opening), _opening(text)
        self.messages = (*self._opening, *self.messages[num_before:])
        if self._last is not None:
            self._last = replace(self._last, before=(*self._opening, *self._last.before[num_before:]))

    def served(self) -> dict[str, str | None]:
        """The server's models, and which of them each stands on, if any. Raises ConfigError."""
        return served_parents(self._speaker.url, self._speaker.api_key)

    def choose(self, model: str) -> None:
        """Let another model or adapter answer from here on. NotFoundError."""
        self.model = choose_model(self._speaker.url, model, self._speaker.api_key)

    def switch(self, adapter: str | None) -> None:
        """Let another adapter answer from here on, or the base of the one that does (None). NotFoundError."""
        if adapter is None:
            self.model = self._parent(self.model) or self.model
        elif self._parent(adapter):
            self.model = adapter
        else:
            known = [name for name, parent in self.served().items() if parent]
            raise NotFoundError(f"no adapter {adapter!r} is loaded; found: {', '.join(known) or 'none'}")

    def _parent(self, model: str) -> str | None:
        """What it stands on; None: nothing, or there is no such model."""
        try:
            return served_card(self._speaker.url, model, self._speaker.api_key).get("parent")
        except NotFoundError:
            return None

    def load(self, name: str, path: str) -> None:
        """Load an adapter into the server, over an earlier one of that name, and switch to it."""
        RemoteAdapters(self._speaker.url, self._speaker.api_key).load(name, path, replace=True)
        self.switch(name)

    def save(self, path: Path) -> None:
        """Append the messages as a row, as recipes take it: {"messages": […]} on a line of its own.

        RequestError if nothing was said, StorageError if the file cannot be written.
        """
        if self.messages == self._opening:
            raise RequestError("nothing has been said yet")
        row = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    row = row if file.read(1) == b"\n" else "\n" + row
                file.write(row.encode())
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error}") from error

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = self._opening
        self._last, self._shown = None, ()

    def show(self, picture: str) -> None:
        """Send this picture with the next turn: an http(s) address, or a file. RequestError if it cannot be read."""
        self._shown = (*self._shown, address_of(picture))

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
        answer = self._answering(asked)
        pieces: list[str] = []
        try:
            for piece in answer:
                pieces.append(piece)
                yield piece
        finally:
            self.finish = answer.finish
            if pieces or self.finish is not None:
                self.messages = (*asked, _answer(pieces))

    def _answering(self, messages: Sequence[Message]) -> RemoteAnswer:
        speaker = self._speaker
        body = {"model": readable(self.model), "messages": messages, **speaker.sampling}
        return RemoteAnswer(speaker.url, CHAT, body, speaker.api_key)


def address_of(typed: str) -> str:
    """An address as it is; a file as an address that holds its bytes. RequestError if it cannot be read."""
    if ADDRESS.match(typed):
        return typed
    kind = mimetypes.guess_type(path_of(typed).name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{encoded(typed)}"


def encoded(typed: str) -> str:
    """A file's bytes in base64. RequestError if it cannot be read."""
    path = path_of(typed)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_MIB * 2**20:
            raise RequestError(f"{path}: found {size / 2**20:,.0f} MiB; at most {MAX_FILE_MIB} are sent")
        return base64.b64encode(path.read_bytes()).decode()
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{typed}: cannot be read: {error}; expected a file or an address") from None


def path_of(typed: str) -> Path:
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
    return {**message, "reasoning_content": readable(thought)} if thought else message


def _opening(system: str | None) -> tuple[Message, ...]:
    return (_message("system", system),) if system else ()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": readable(content)}
