"""What one app has: the models that answer, and what is counted of all requests. Endpoints get it as StateDep."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated

from fastapi import Depends, Request

from serve.api.bases import Base, Bases
from serve.api.drain import Drain
from serve.api.exchange import Exchange
from serve.api.leaving import unless_gone
from serve.api.metrics import Metrics
from serve.api.opening import expect_long
from serve.api.responses.kept import Responses
from serve.api.services import Services
from serve.api.texts import Texts
from serve.config import ServeConfig
from serve.errors import DeadlineError, LatheError, StoppedError
from serve.keys.keeper import Keeper
from serve.mcp.config import read_servers
from serve.mcp.servers import McpServers
from serve.pool.pool import Lease, Waiter
from serve.runtime import Runtime
from serve.tracing import Tracer


class AppState:
    """One app's belongings."""

    def __init__(self, models: Runtime | Bases) -> None:
        """models: those of the server; of one runtime, that alone."""
        self.bases = models if isinstance(models, Bases) else Bases.around(models)
        self.metrics = Metrics(self.bases)
        config = self.bases.config
        self.keys = _keys_of(config)
        """None: everybody may ask for everything."""
        self.exchanges: set[Exchange] = set()
        """Requests that have come and whose answers have not been sent."""
        endpoint = config.otlp_endpoint
        self.tracer = None if endpoint is None else Tracer(endpoint, version("mlx-lathe"))
        """None: no spans are sent."""
        self.drain = Drain(self.exchanges, config.drain_timeout_s)
        servers = read_servers(config.mcp_servers) if config.mcp_servers is not None else {}
        self.mcp = McpServers(servers, config.mcp_timeout_s, config.mcp_max_result_chars)
        """Whose tools are run for requests; none where the configuration names none."""
        weakref.finalize(self, self.mcp.close)
        self.responses = Responses(self.bases.config)
        """Those of /v1/responses that run or are kept."""
        self.texts = Texts(
            self.bases.text_models,
            self.bases.config,
            self.bases.run,
            self.metrics.registry,
            lambda name: self.bases.of_model(name) is not None or name in self.bases.experiments.runs,
        )
        """What makes vectors of texts."""

    def close(self) -> None:
        """Send the spans that wait. The models stay their maker's."""
        if self.tracer is not None:
            self.tracer.close()

    @property
    def services(self) -> Services:
        """The first model's, for a look; StoppedError while it is not in memory. Who works with it holds it: see
        `held_base`."""
        found = self.bases.pool.loaded().get(self.bases.first.name)
        if found is None:
            raise StoppedError(f"model {self.bases.first.name!r} is not loaded")
        return found

    @property
    def config(self) -> ServeConfig:
        """The server's."""
        return self.bases.config


@asynccontextmanager
async def held_base(
    state: AppState,
    base: Base | None = None,
    http: Request | None = None,
    deadline_s: float | None = None,
) -> AsyncIterator[Lease[Services]]:
    """A base, the first if none is named: brought where it is not in memory, and held inside the block.

    http        the request that waits for it: ClientGoneError once its client has left
    deadline_s  until when, by time.monotonic: then DeadlineError
    Raises what loading it does.
    """
    name = (base or state.bases.first).name
    waiter = state.bases.pool.ask(name)
    try:
        yield await (waiter.taken() if waiter.is_served else _awaited(waiter, name, http, deadline_s))
    finally:
        waiter.leave()


async def _awaited(
    waiter: Waiter[Services], name: str, http: Request | None, deadline_s: float | None
) -> Lease[Services]:
    try:
        async with asyncio.timeout(None if deadline_s is None else deadline_s - time.monotonic()):
            if http is None:
                return await waiter.taken()
            expect_long(http)
            return await unless_gone(http.receive, waiter.taken())
    except TimeoutError as error:
        if isinstance(error, LatheError):
            raise
        raise DeadlineError(
            f"timeout: the time that the request has set has passed while it waited for model {name!r} to be loaded"
        ) from None


def _keys_of(config: ServeConfig) -> Keeper | None:
    """The keys that requests need. ConfigError where their file is wrong."""
    if not config.has_keys:
        return None
    return Keeper(config.api_keys, config.api_key.get_secret_value() if config.api_key else None)


async def state_of(request: Request) -> AppState:
    """The app's that a request came to. A dependency, as all are, that runs on the event loop: FastAPI sends others
    to a thread and back."""
    found = request.app.state.belongings
    assert isinstance(found, AppState)
    return found


StateDep = Annotated[AppState, Depends(state_of)]
