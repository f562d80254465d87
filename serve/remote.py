"""A server at an address that somebody typed: a client for it, its models, what it says when it refuses.

Knows HTTP and OpenAI's paths, and nothing of what serves; any compatible server will do.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx

from serve.argument_text import readable
from serve.errors import (
    ConfigError,
    LatheError,
    NotFoundError,
    OverloadedError,
    RequestError,
    ResponseNotFoundError,
    StoppedError,
)

ANSWER_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 15.0
MODELS_TIMEOUT_S = 30.0
ENDING = re.compile(r"(/v1(/(chat/)?completions|/models)?)?/*$")
"""What may stand behind the base of an address: nothing, /v1, or one of the endpoints."""
NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
"""OpenSSL's words for an answer that is none of TLS, by its version."""
QUOTED_CHARACTERS = 200
"""How much of an answer that is not understood a message quotes."""


def base_url(typed: str) -> str:
    """The address before `/v1/…`, from any form in which people write it.

    `lathe serve` prints it with /v1, as OpenAI's clients want it; a scheme may be left out. Raises ConfigError.
    """
    text = typed.strip()
    if "://" not in text and not re.match(r"https?:/?", text, re.IGNORECASE):
        text = f"http://{text}"
    try:
        url = httpx.URL(text)
        is_usable = url.scheme in ("http", "https") and bool(url.host) and 0 < (url.port or 80) < 2**16
        is_usable = is_usable and not (url.query or url.fragment or re.search(r"\s", text))
    except (httpx.InvalidURL, UnicodeError):
        is_usable = False
    if not is_usable:
        raise ConfigError(f"{typed!r} is not a server's address; expected one like http://127.0.0.1:8000/v1")
    return str(url.copy_with(path=ENDING.sub("", url.path) or "/")).rstrip("/")


def connect(url: str, api_key: str | None = None) -> httpx.Client:
    """A client whose paths begin at the address's base. Raises ConfigError."""
    settings = _settings(url, api_key)
    try:
        return httpx.Client(**settings)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise _no_proxy(error) from error


def connect_async(url: str, api_key: str | None, limits: httpx.Limits) -> httpx.AsyncClient:
    """As `connect`, for many requests at a time: over aiohttp, whose parser of HTTP takes less than half of a
    processor's time for a streamed token that httpx's own does."""
    from httpx_aiohttp import AiohttpTransport  # takes a while, and few need it

    settings = _settings(url, api_key)
    try:
        # A proxy that the environment names goes before the transport.
        return httpx.AsyncClient(**settings, transport=AiohttpTransport(limits=limits), limits=limits)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise _no_proxy(error) from error


def _settings(url: str, api_key: str | None) -> dict[str, Any]:
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("the API key holds characters that no header can; expected printable ASCII")
    base = base_url(url)
    return {
        "base_url": base,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        # No proxy that the environment names can reach this machine's own loopback.
        "trust_env": not _is_loopback(httpx.URL(base).host),
    }


def _no_proxy(error: Exception) -> ConfigError:
    return ConfigError(f"the proxy that the environment names cannot be used: {error}")


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def served_models(url: str, api_key: str | None = None) -> list[str]:
    """The names a request's `model` may hold. Raises ConfigError saying what is there instead of such a server."""
    return [str(entry["id"]) for entry in _listed(url, api_key)]


def _listed(url: str, api_key: str | None) -> list[dict[str, Any]]:
    """What /v1/models lists, each with an id. Raises ConfigError."""
    listed = _got(url, "/v1/models", api_key)
    if listed.status_code in (401, 403):
        raise ConfigError(
            f"{url} answered {listed.status_code}: {message_of(listed.text)}; give its key with --api-key "
            "or LATHE_API_KEY"
        )
    if listed.has_redirect_location:
        raise ConfigError(
            f"{url} sends on to {listed.headers['Location']}; give the address that it moved to"
        )
    try:
        return [{**entry, "id": entry["id"]} for entry in listed.json()["data"]]
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{url}: what answers there is no OpenAI-compatible server: {listed.url} gave "
            f"{listed.status_code}, {message_of(listed.text) or 'nothing'}\n"
            "  expected the address that `lathe serve MODEL` prints"
        ) from None


def _got(url: str, path: str, api_key: str | None) -> httpx.Response:
    try:
        with connect(url, api_key) as http:
            return http.get(path, timeout=MODELS_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"{url}: no server answers there ({trouble(error)}); start one with `lathe serve MODEL`"
        ) from error


def served_adapters(url: str, api_key: str | None = None) -> list[str]:
    """Those of its models that say they stand on another one, in its order. Raises ConfigError."""
    return [name for name, parent in served_parents(url, api_key).items() if parent]


def served_parents(url: str, api_key: str | None = None) -> dict[str, str | None]:
    """Its models in its order, each with the one that it stands on, if any. Raises ConfigError."""
    return {str(entry["id"]): entry.get("parent") for entry in _listed(url, api_key)}


def choose_model(url: str, model: str | None, api_key: str | None = None) -> str:
    """`model` if the server has it, its first one if none is asked for. Raises NotFoundError naming all."""
    if model is None:
        known = served_models(url, api_key)
        if not known:
            raise NotFoundError(f"{url} has no model; it has: none")
        return known[0]
    served_card(url, model, api_key)
    return model


def served_card(url: str, model: str, api_key: str | None = None) -> dict[str, Any]:
    """What the server tells of a model that it has, listed or not: `name@version`, an alias, a sum of adapters.
    Raises NotFoundError naming all that it lists."""
    listed = _listed(url, api_key)
    for entry in listed:
        if entry["id"] == model:
            return entry
    answer = _got(url, f"/v1/models/{quote(readable(model), safe='')}", api_key)
    try:
        card = answer.json()
        if answer.status_code == 200 and isinstance(card["id"], str):
            return dict(card)
    except (ValueError, LookupError, TypeError):  # it tells of no single model
        pass
    known = ", ".join(str(entry["id"]) for entry in listed)
    raise NotFoundError(f"{url} has no model {model!r}; it has: {known or 'none'}")


def trouble(error: httpx.HTTPError) -> str:
    """What went wrong on the way, in words."""
    if isinstance(error, httpx.TimeoutException):
        return "it did not answer in time"
    if any(reason in str(error) for reason in NO_TLS):
        return f"what answers there does not speak TLS; is it http, not https? ({error})"
    if isinstance(error, httpx.ReadError | httpx.WriteError | httpx.RemoteProtocolError):
        return f"the connection broke: {str(error) or type(error).__name__}"
    return str(error) or type(error).__name__


def refusal(status: int, body: str) -> LatheError:
    """The error that an HTTP answer other than 200 is; what the server says is its message."""
    message = message_of(body) or f"the server answered {status} and said nothing"
    if told := _told(body, message, status):
        return told
    if status == 404:
        return NotFoundError(message)
    if status == 429:
        return OverloadedError(message)
    return StoppedError(message) if status >= 500 else RequestError(message)


def failure(data: str) -> LatheError:
    """The error that a stream holds."""
    return _told(data, message_of(data)) or StoppedError(message_of(data))


def _told(body: str, message: str, status: int | None = None) -> LatheError | None:
    """The error of ours whose code the body has, and whose status it came with; None where there is none."""
    try:
        error = json.loads(body)["error"]
        code, param = error.get("code"), error.get("param")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    kind = next((each for each in _kinds(LatheError) if each.code == code), None)
    if kind is None or status not in (None, kind.status):
        return None
    made = kind(message)
    if isinstance(made, RequestError | ResponseNotFoundError):
        made.param = param
    return made


def _kinds(kind: type[LatheError]) -> Iterator[type[LatheError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


def message_of(body: str) -> str:
    """The message inside an OpenAI-style error body, or the beginning of whatever it is, on one line."""
    try:
        error = json.loads(body)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        message = None
    return str(message or " ".join(body[:QUOTED_CHARACTERS].split()))


class EventData:
    """Bytes of a server-sent event stream in, the text of its `data:` lines out, up to [DONE].

    A line ends at a line feed and nowhere else: JSON may hold U+2028 and its like as they are.
    """

    def __init__(self) -> None:
        self.is_done = False
        """True once [DONE] has come."""
        self._rest = b""

    def feed(self, some: bytes) -> Iterator[str]:
        """The data that `some` completes."""
        *lines, self._rest = (self._rest + some).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            self.is_done = self.is_done or data == b"[DONE]"
            if data and not self.is_done:
                yield data.decode(errors="replace")
