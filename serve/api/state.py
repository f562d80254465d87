"""What one app has: the models that answer, and what is counted of all requests. Endpoints get it as StateDep."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, Request

from serve.api.bases import Base, Bases
from serve.api.leaving import unless_gone
from serve.api.metrics import Metrics
from serve.api.services import Services
from serve.config import ServeConfig
from serve.errors import StoppedError
from serve.pool.pool import Lease
from serve.runtime import Runtime


class AppState:
    """One app's belongings."""

    def __init__(self, models: Runtime | Bases) -> None:
        """models: those of the server; of one runtime, that alone."""
        self.bases = models if isinstance(models, Bases) else Bases.around(models)
        self.metrics = Metrics(self.bases)

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
    state: AppState, base: Base | None = None, http: Request | None = None
) -> AsyncIterator[Lease[Services]]:
    """A base, the first if none is named: brought where it is not in memory, and held inside the block.

    http  the request that waits for it: ClientGoneError once its client has left
    Raises what loading it does.
    """
    waiter = state.bases.pool.ask((base or state.bases.first).name)
    try:
        if waiter.is_served or http is None:
            lease = await waiter.taken()
        else:
            lease = await unless_gone(http.receive, waiter.taken())
        yield lease
    finally:
        waiter.leave()


def state_of(request: Request) -> AppState:
    """The app's that a request came to."""
    found = request.app.state.belongings
    assert isinstance(found, AppState)
    return found


StateDep = Annotated[AppState, Depends(state_of)]
