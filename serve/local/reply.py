"""What a model in this process answers: a whole Reply, or a Stream of its pieces that becomes one."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve.remote_answer import AnswerReader, Thought


@dataclass(frozen=True)
class Reply:
    """One request's answers. `str()` is the first one's text."""

    body: Mapping[str, Any]
    """As the server's JSON: choices, usage, log-probabilities and all."""

    @property
    def model(self) -> str:
        """Who was asked."""
        return str(self.body["model"])

    @property
    def texts(self) -> list[str]:
        """Of all choices, in their order."""
        return [
            str((each.get("message") or {}).get("content") or each.get("text") or "")
            for each in self._choices
        ]

    @property
    def text(self) -> str:
        """The first one's."""
        return self.texts[0]

    @property
    def reasoning(self) -> str | None:
        """What was thought before the first one."""
        return self._message.get("reasoning_content")

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The first one's calls of tools, as OpenAI has them: id, function.name, function.arguments."""
        return list(self._message.get("tool_calls") or ())

    @property
    def message(self) -> dict[str, Any]:
        """The first one as a message, to go on from."""
        return (
            {"role": "assistant", **self._message}
            if self._message
            else {"role": "assistant", "content": self.text}
        )

    @property
    def finish(self) -> str | None:
        """Why the first one ended: stop, length or tool_calls."""
        found: str | None = self._choices[0]["finish_reason"]
        return found

    @property
    def usage(self) -> Mapping[str, Any]:
        """prompt_tokens, completion_tokens, and their details."""
        found: Mapping[str, Any] = self.body["usage"]
        return found

    def __str__(self) -> str:
        return self.text

    @property
    def _choices(self) -> list[dict[str, Any]]:
        return list(self.body["choices"])

    @property
    def _message(self) -> dict[str, Any]:
        return dict(self._choices[0].get("message") or {})


class Stream:
    """An answer as it comes: iterate it once, for pieces of text, Thoughts among them. `reply` is the whole of it,
    once it has ended. Closed, or dropped, before that, it takes its row out of the engine."""

    def __init__(self, model: str, parts: Iterable[bytes], owner: object) -> None:
        """owner: what must not be closed before this has ended."""
        self._model = model
        self._owner = owner
        self._reader = AnswerReader("this model")
        self._pieces: list[str] = []
        self._iterator = self._read(parts)

    def __iter__(self) -> Iterator[str]:
        return self._iterator

    def __next__(self) -> str:
        return next(self._iterator)

    def close(self) -> None:
        """Want no more of it."""
        self._iterator.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def reply(self) -> Reply:
        """What has come so far, as a Reply; its `finish` is None before the end."""
        message: dict[str, Any] = {"role": "assistant", "content": _joined(self._pieces, of_thoughts=False)}
        if thought := _joined(self._pieces, of_thoughts=True):
            message["reasoning_content"] = thought
        if self._reader.calls:
            message["tool_calls"] = self._reader.calls
        choice = {"index": 0, "message": message, "finish_reason": self._reader.finish}
        return Reply({"model": self._model, "choices": [choice], "usage": self._reader.usage or {}})

    def _read(self, parts: Iterable[bytes]) -> Generator[str, None, None]:
        for piece in self._reader.pieces(parts):
            self._pieces.append(piece)
            yield piece


def _joined(pieces: Iterable[str], *, of_thoughts: bool) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, Thought) == of_thoughts)
