"""What a server is told that is left running: who may ask, how long anything may take, what is written down.

Keys of the serving configuration, beside those of serve/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from serve.settings import Strict

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+\Z")


class OperatingConfig(Strict):
    """Part of the serving configuration."""

    api_key: SecretStr | None = Field(None, min_length=1)
    """The one key that every request needs, admin's included; better from LATHE_API_KEY than from a file or a
    command line that others read. With api_keys, one more beside that file's."""
    api_keys: Path | None = None
    """File of keys, each with a name, a tenant, limits and adapters; read again when it changes, and on SIGHUP.
    Without this and api_key, everybody may ask for everything."""
    open_metrics: bool = False
    """Where there are keys, /metrics needs an admin's, since its labels name everybody's adapters; true: it needs
    none."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages, extensions and programs that may ask from a browser, by their origins (https://chat.example,
    app://obsidian.md) or patterns of them (chrome-extension://*, https://*.example), or `*` for all; none but the
    server's own, if left out."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names by which the server may be asked for (Host), `*` for any. If left out, any, but on loopback without keys
    only loopback's: a page whose name was made to point here must not be taken for this machine's user."""
    header_timeout_s: float = Field(20, gt=0)
    """What a request's head may take to arrive, from the connection on, in seconds; then the connection is closed."""
    write_timeout_s: float = Field(120, gt=0)
    """A client that takes nothing of its answer for so many seconds is cut off, and its rows are freed."""
    max_request_s: float | None = Field(None, gt=0)
    """Longest that an answer may take, in seconds, whatever `timeout` its request asks for; then it is a 504. No
    bound, if left out."""
    max_connections: int = Field(4096, ge=1)
    """Open connections; one more is closed at once."""
    drain_timeout_s: float = Field(30, ge=0)
    """On SIGTERM or Ctrl-C: so long may running requests take to end, in seconds, before they end with an error.
    Meanwhile /health answers 503, and so do new requests. A second signal waits for nobody."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or JSON objects; on standard error, one for each request."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least that is written; requests are `info`, failures `error`."""
    log_prompts: bool = False
    """Write down what requests say, too. Nothing of prompts and answers is logged otherwise."""
    metrics_max_models: int = Field(100, ge=1)
    """Names of adapters that /metrics tells apart; those that come later are `other` together."""
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://\S+$")
    """OpenTelemetry collector that gets a span of each request, by OTLP over HTTP (http://host:4318/v1/traces); needs
    the extra `otel`. None, if left out."""
    ssl_certfile: Path | None = None
    """Certificate chain, PEM: the server then speaks HTTPS alone."""
    ssl_keyfile: Path | None = None
    """Its private key, if not in the same file."""
    ssl_keyfile_password: SecretStr | None = None
    """Of the private key, if it is encrypted."""
    ssl_ca_certs: Path | None = None
    """Authorities, PEM: clients must show a certificate of one of them."""

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return self.api_key is not None or self.api_keys is not None

    def operating_problems(self) -> Iterator[tuple[str, str]]:
        """Parts of a certificate without it, origins that are none, a key that no header can hold."""
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    yield name, "found without ssl_certfile; write that too"
        for index, origin in enumerate(self.allowed_origins):
            if origin != "*" and not ORIGIN.match(origin):
                yield (
                    f"allowed_origins.{index}",
                    f"found {origin!a:.80}; expected an origin like https://chat.example, without a path, a "
                    "pattern like chrome-extension://*, or *",
                )
        if self.api_key is not None and (expected := key_problem(self.api_key.get_secret_value())):
            yield "api_key", f"it cannot be a key; {expected}"


MAX_KEY_CHARS = 512


def key_problem(key: str) -> str | None:
    """What a key must be, where `key` is none: what a header can carry behind `Bearer`."""
    if 0 < len(key) <= MAX_KEY_CHARS and all("!" <= character <= "~" for character in key):
        return None
    return f"expected 1 to {MAX_KEY_CHARS} characters from ! to ~, without spaces"
