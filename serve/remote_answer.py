"""One answer of an OpenAI-compatible server, streamed: a request's body in; its pieces out, and how it ended.

Chats and completions are read alike. Knows no terminal, and no messages before this one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx

from serve.argument_text import readable
from serve.errors import StoppedError
from serve.remote import EventData, connect, failure, refusal, trouble

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Thought(str):
    """A piece of what was thought before the answer."""


class AnswerReader:
    """Bytes of an answer's event stream in, pieces out; `finish`, `usage` and `calls` as they come to be known."""

    def __init__(self, of: str) -> None:
        """of: whose answer it is, for messages."""
        self.finish: str | None = None
        """Why it ended, in the server's word; None if it was broken off."""
        self.usage: Mapping[str, Any] | None = None
        """Where the request asks for it by stream_options."""
        self.calls: list[dict[str, Any]] = []
        """Of tools, as a whole message has them."""
        self._of = of

    def pieces(self, parts: Iterable[bytes]) -> Generator[str, None, None]:
        """Thoughts among them. StoppedError where the stream breaks, or holds an error."""
        events = EventData()
        for part in parts:
            for data in events.feed(part):
                for choice in self._choices(data):
                    self.finish = choice.get("finish_reason") or self.finish
                    delta = choice.get("delta") or {}
                    self._add_calls(delta.get("tool_calls") or ())
                    thought = delta.get("reasoning_content") or delta.get("reasoning")
                    if thought:
                        yield Thought(thought)
                    if content := delta.get("content") or choice.get("text"):
                        yield str(content)
        if self.finish is None and not events.is_done:
            raise StoppedError(f"{self._of}: the stream ended before the answer did")
        self.finish = self.finish or "stop"

    def _choices(self, data: str) -> Sequence[Mapping[str, Any]]:
        try:
            chunk = json.loads(data)
            error, choices = chunk.get("error"), chunk.get("choices")
        except (ValueError, AttributeError):
            raise StoppedError(f"the server's stream cannot be read: {data[:200]}") from None
        if error:
            raise failure(data)
        self.usage = chunk.get("usage") or self.usage
        return choices or ()

    def _add_calls(self, deltas: Iterable[Mapping[str, Any]]) -> None:
        """A call's first delta has its id and name; arguments come in parts."""
        for delta in deltas:
            function = delta.get("function") or {}
            index = delta.get("index", len(self.calls))
            while len(self.calls) <= index:
                self.calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
            call = self.calls[index]
            call["id"] += delta.get("id") or ""
            for name in ("name", "arguments"):
                call["function"][name] += function.get(name) or ""


class RemoteAnswer:
    """Iterate it once: the pieces as they come, Thoughts among them.

    Raises RequestError or OverloadedError when the server refuses, StoppedError when it is gone or the stream breaks.
    """

    def __init__(self, url: str, path: str, body: Mapping[str, Any], api_key: str | None = None) -> None:
        self.first_s: float | None = None
        """Until the first piece, from when iterating began."""
        self.total_s: float | None = None
        self._reader = AnswerReader(url)
        self._url, self._path, self._api_key = url, path, api_key
        self._body = readable({**body, "stream": True})

    @property
    def finish(self) -> str | None:
        """Why it ended, in the server's word; None if it was broken off."""
        return self._reader.finish

    @property
    def usage(self) -> Mapping[str, Any] | None:
        """Where the body asks for it by stream_options."""
        return self._reader.usage

    def __iter__(self) -> Iterator[str]:
        started_s = time.perf_counter()
        try:
            with (
                connect(self._url, self._api_key) as http,
                http.stream("POST", self._path, json=self._body) as response,
            ):
                if response.status_code != 200:
                    raise refusal(response.status_code, response.read().decode(errors="replace"))
                for piece in self._reader.pieces(response.iter_bytes()):
                    self.first_s = self.first_s or time.perf_counter() - started_s
                    yield piece
        except httpx.HTTPError as error:
            raise StoppedError(f"{self._url}: {trouble(error)}") from error
        finally:
            self.total_s = time.perf_counter() - started_s
