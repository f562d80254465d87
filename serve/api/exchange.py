"""One HTTP request and its answer, as logs, metrics, limits and /v1/status have it; whoever runs within finds it."""

from __future__ import annotations

import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from starlette.datastructures import Headers
from starlette.types import Scope, Send

from serve.keys.key import Key

if TYPE_CHECKING:
    from serve.api.errors import Problem

PROBES = frozenset(("/", "/health", "/health/live", "/health/ready", "/ping"))
"""Whether the server is well: asked all day by machines, while it drains too."""
METRICS = "/metrics"
ASIDE = PROBES | {METRICS, "/version", "/v1/status"}
"""What looks at the server and gives it nothing to do."""
SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}\Z")
"""What a client's X-Request-Id may be: one that lines of a log and headers can hold."""

_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


class Running(Protocol):
    """Rows of an engine that work for an exchange."""

    def describe(self) -> list[dict[str, Any]]:
        """One entry a row that has not ended."""

    def abort(self) -> None:
        """End them by an error that says that the server ends."""


@dataclass(eq=False)
class Exchange:
    """Begins with a request's head and ends when its response has been sent."""

    id: str
    method: str
    path: str
    client: str
    traceparent: str | None = None
    """W3C's, of the span that this one belongs under."""
    route: str | None = None
    """The path as the application describes it, once it has ended."""
    started_s: float = field(default_factory=time.perf_counter)
    started_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    key: Key | None = None
    """None: none is needed, or none has been looked at yet."""
    tenant: str = ""
    asked: str | None = None
    """The `model` field."""
    served: str | None = None
    """`name@N`, or the base's name."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_answer_tokens: int = 0
    ttft_s: float | None = None
    finish: str | None = None
    status: int | None = None
    problem: Problem | None = None
    """What went wrong."""
    prompt: Any = None
    """The body, where the server is to write down what requests say."""
    send_body: Send | None = None
    """Where the bytes of a response go that has begun: nothing that stands between changes them any more."""
    running: list[Running] = field(default_factory=list)

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        """Of a request that has just come."""
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        client = scope.get("client")
        return cls(
            given if SANE_ID.match(given) else f"req_{secrets.token_hex(12)}",
            scope["method"],
            scope["path"],
            client[0] if client else "",
            headers.get("traceparent"),
        )

    @property
    def is_aside(self) -> bool:
        """It only looks at the server."""
        return self.path in ASIDE

    @property
    def key_name(self) -> str | None:
        """The key's, for whoever reads logs."""
        return self.key.name if self.key else None

    @property
    def age_s(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.started_s

    def add_prompt(self, num_tokens: int) -> None:
        """Tokens that the model is given to read."""
        self.num_prompt_tokens += num_tokens
        self._cost(num_tokens)

    def add_answer(self, num_tokens: int) -> None:
        """Tokens that it has written."""
        self.num_answer_tokens += num_tokens
        self._cost(num_tokens)

    def _cost(self, num_tokens: int) -> None:
        if self.key is not None:
            self.key.limits.take_tokens(num_tokens)


def current() -> Exchange | None:
    """The exchange that runs here; None outside of one, as in tests and programs that use no HTTP."""
    return _current.get()


def enter(exchange: Exchange) -> None:
    """What this task does from here on belongs to it."""
    _current.set(exchange)
