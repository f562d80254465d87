"""What one app has: the model that answers, and what is counted of all requests. Endpoints get it as StateDep."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from serve.api.metrics import Metrics
from serve.api.services import Services
from serve.config import ServeConfig
from serve.runtime import Runtime


class AppState:
    """One app's belongings."""

    def __init__(self, runtime: Runtime) -> None:
        self.services = Services(runtime)
        """The model's."""
        self.metrics = Metrics(runtime, self.services.grammars.stats)

    @property
    def config(self) -> ServeConfig:
        """The server's."""
        return self.services.runtime.config


def state_of(request: Request) -> AppState:
    """The app's that a request came to."""
    found = request.app.state.belongings
    assert isinstance(found, AppState)
    return found


StateDep = Annotated[AppState, Depends(state_of)]
