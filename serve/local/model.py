"""A model and its adapters in this process, without a server: the Python API. `load` makes one.

Every request goes in as the body that HTTP would bring, to the endpoint that HTTP would bring it to, so whatever
the server's documentation says of a field holds here. Calls may come from any thread, and from a notebook.
"""

from __future__ import annotations

import base64
import json
import queue
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serve import blas
from serve.api.app import create_app
from serve.api.bases import Bases
from serve.config_file import load_config
from serve.errors import LatheError, RequestError
from serve.local.app_call import AppCaller, Response
from serve.local.ending import wait_for_ended
from serve.local.pictures import as_address
from serve.local.reply import Reply, Stream

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Conversation = str | Sequence[Mapping[str, Any]]
"""What a chat is asked: a user's words, or messages as OpenAI has them."""
Prompt = str | Sequence[int]
Texts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""One text or several, as they are or in tokens."""


def load(
    model: str | Path, adapters: Mapping[str, str | Path] | None = None, **serving_keys: Any
) -> LocalModel:
    """Load a model: a folder, a hub name, or a serving configuration (.yaml), whose keys `serving_keys` override.

    adapters  folders by name, loaded beside it
    Raises LatheError: ConfigError with every problem of the keys, ModelError, AdapterError.
    """
    _warn_of_slow_blas()
    keys = [f"{name}={json.dumps(value, default=str)}" for name, value in serving_keys.items()]
    named = [{"name": name, "path": str(path)} for name, path in (adapters or {}).items()]
    config = load_config(model, keys, adapters=named)
    # Whoever has the model in hand needs no key to it.
    return LocalModel(Bases.start(config.model_copy(update={"api_key": None, "api_keys": None})))


class LocalModel:
    """A context manager: closed at its end, or by `close`, or when the process ends."""

    def __init__(self, bases: Bases) -> None:
        """Takes them over."""
        self._bases = bases
        self._caller = AppCaller(create_app(bases))
        self._close = weakref.finalize(self, _close, self._caller, bases)

    @property
    def name(self) -> str:
        """The base's, or the first one's, which answers where no other `model` is named."""
        return self._bases.first.name

    @property
    def models(self) -> list[str]:
        """What `model` may be: the base, adapters, experiments; versions and sums of adapters beside them."""
        return [str(entry["id"]) for entry in self._get("/v1/models")["data"]]

    def chat(
        self, messages: Conversation, *, model: str | None = None, images: Sequence[Any] = (), **fields: Any
    ) -> Reply:
        """Answer a chat.

        images  shown before the words, where `messages` are a user's: files, addresses, bytes or PIL's images
        fields  of /v1/chat/completions: temperature, max_tokens, seed, tools, response_format, …
        Raises LatheError as the server would answer it.
        """
        return Reply(self._post(CHAT, self._chat(messages, model, images, fields)))

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, model: str | None = None, **fields: Any
    ) -> Reply:
        """Go on from a text as it is, or from token ids; of several the answers are the reply's `texts`. As `chat`,
        with the fields of /v1/completions."""
        return Reply(self._post(COMPLETIONS, self._completion(prompt, model, fields)))

    def stream(
        self,
        messages: Conversation | None = None,
        *,
        prompt: Prompt | None = None,
        model: str | None = None,
        images: Sequence[Any] = (),
        **fields: Any,
    ) -> Stream:
        """As `chat`, or with `prompt` as `generate`, a piece at a time."""
        if (messages is None) == (prompt is None):
            raise RequestError("a stream is of messages, or of a prompt: name one of them", "messages")
        for name in ("n", "best_of"):
            if fields.get(name) not in (None, 1):
                raise RequestError(f"{name}: found {fields[name]}; a stream here is of one answer", name)
        if messages is not None:
            path, body = CHAT, self._chat(messages, model, images, fields)
        else:
            path, body = COMPLETIONS, self._completion(prompt or "", model, fields)
        body = {"stream_options": {"include_usage": True}, **body, "stream": True}
        return Stream(str(body["model"]), self._caller.begin("POST", path, body), self)

    def batch(
        self, chats: Iterable[Conversation | Mapping[str, Any]], *, model: str | None = None, **fields: Any
    ) -> list[Reply]:
        """Answer many chats side by side, in one batch of rows; replies in their order, however many there are.

        chats   each a user's words, messages, or fields of its own ({"messages": …, "model": …, "seed": …})
        fields  of those that say nothing
        The first that fails ends the others, and is raised with its number.
        """
        bodies = []
        for each in chats:
            own: dict[str, Any] = dict(each) if isinstance(each, Mapping) else {"messages": each}
            whole = {**fields, **own}
            bodies.append(
                self._chat(whole.pop("messages"), whole.pop("model", model), whole.pop("images", ()), whole)
            )
        return [Reply(each) for each in self._side_by_side(bodies)]

    def embed(self, texts: Texts, *, model: str | None = None, **fields: Any) -> np.ndarray:
        """Vectors of a text, or of several, in their order.

        model   one of the keys' `embedding_models`; the first, if left out
        fields  of /v1/embeddings: dimensions, prompt_name, …
        Returns [N, D] float32. Raises LatheError; RequestError where no embedding model is loaded.
        """
        embedders = [each.name for each in self._bases.config.embedding_models]
        if model is None and not embedders:
            raise RequestError("no embedding model is loaded; load one with `embedding_models`", "model")
        body = {"model": model or embedders[0], "input": texts, **fields, "encoding_format": "base64"}
        found = self._post("/v1/embeddings", body)["data"]
        return np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in found])

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Load an adapter beside what runs; `replace`: over an earlier version of that name. AdapterError."""
        fields = {
            "lora_name": name,
            "lora_path": str(Path(path).expanduser().absolute()),
            "load_inplace": replace,
        }
        self._caller.begin("POST", "/v1/load_lora_adapter", fields).whole()

    def unload_adapter(self, name: str) -> None:
        """Refuse the name to new requests; those that run end with it. NotFoundError."""
        self._caller.begin("POST", "/v1/unload_lora_adapter", {"lora_name": name}).whole()

    def close(self) -> None:
        """End what runs, with an error to whoever waits for it, and give the memory back. Any number of times."""
        self._close()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _side_by_side(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As many at a time as fill the batch and some of its queue: more would be refused."""
        config = self._bases.config
        num_at_once = config.max_rows + config.max_waiting // 2
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        begun: list[Response] = []
        answers: dict[int, dict[str, Any]] = {}
        try:
            while len(answers) < len(bodies):
                while len(begun) < len(bodies) and len(begun) - len(answers) < num_at_once:
                    body, when_ended = _whole(bodies[len(begun)]), partial(ended.put, len(begun))
                    begun.append(self._caller.begin("POST", CHAT, body, when_ended))
                number = ended.get()
                answers[number] = _numbered(number, begun[number])
        except BaseException:
            for each in begun:
                each.cancel()
            raise
        return [answers[number] for number in range(len(bodies))]

    def _chat(
        self, messages: Conversation, model: str | None, images: Sequence[Any], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        if isinstance(messages, str):
            shown = [{"type": "image_url", "image_url": {"url": as_address(each)}} for each in images]
            content = [*shown, {"type": "text", "text": messages}] if shown else messages
            messages = [{"role": "user", "content": content}]
        elif images:
            raise RequestError("images go with a user's words; in messages they are parts of one", "images")
        return {"model": model or self.name, "messages": messages, **fields}

    def _completion(
        self, prompt: Prompt | Sequence[Prompt], model: str | None, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {"model": model or self.name, "prompt": prompt, **fields}

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._caller.begin("POST", path, _whole(body)).whole())
        return found

    def _get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._caller.begin("GET", path).whole())
        return found


def _close(caller: AppCaller, bases: Bases) -> None:
    threads = threading.enumerate()
    caller.close()
    bases.close()
    wait_for_ended(threads)


def _whole(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """A body whose answer is one JSON value."""
    if body.get("stream"):
        raise RequestError("stream: found true; call `stream` for an answer in pieces", "stream")
    return body


def _numbered(number: int, response: Response) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(response.whole())
    except LatheError as error:
        error.add_note(f"request {number} of the batch")
        raise
    return found


def _warn_of_slow_blas() -> None:
    """What imports mlx before Lathe is imported leaves it the reference BLAS."""
    if blas.is_needed() and not blas.is_answering():
        warnings.warn(
            "mlx was imported before serve, so matmul runs on the reference BLAS, about 60 times slower: "
            "`import serve` first",
            stacklevel=3,
        )
