"""What one app has: the model that answers, and what is counted of all requests. Endpoints get it as StateDep."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from serve.api.drain import Drain
from serve.api.exchange import Exchange
from serve.api.metrics import Metrics
from serve.api.services import Services
from serve.config import ServeConfig
from serve.keys.keeper import Keeper
from serve.runtime import Runtime


class AppState:
    """One app's belongings."""

    def __init__(self, runtime: Runtime) -> None:
        self.services = Services(runtime)
        """The model's."""
        self.metrics = Metrics(runtime, self.services.grammars.stats)
        self.keys = _keys_of(runtime.config)
        """None: everybody may ask for everything."""
        self.exchanges: set[Exchange] = set()
        """Requests that have come and whose answers have not been sent."""
        self.drain = Drain(self.exchanges, runtime.config.drain_timeout_s)

    @property
    def config(self) -> ServeConfig:
        """The server's."""
        return self.services.runtime.config


def _keys_of(config: ServeConfig) -> Keeper | None:
    """The keys that requests need. ConfigError where their file is wrong."""
    if not config.has_keys:
        return None
    return Keeper(config.api_keys, config.api_key.get_secret_value() if config.api_key else None)


def state_of(request: Request) -> AppState:
    """The app's that a request came to."""
    found = request.app.state.belongings
    assert isinstance(found, AppState)
    return found


StateDep = Annotated[AppState, Depends(state_of)]
