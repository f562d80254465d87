"""What one app has: the model that answers, and what is counted of all requests. Endpoints get it as StateDep."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from serve.api.metrics import Metrics
from serve.api.services import Services
from serve.api.texts import Texts
from serve.config import ServeConfig
from serve.runtime import Runtime


class AppState:
    """One app's belongings."""

    def __init__(self, runtime: Runtime) -> None:
        self.services = Services(runtime)
        """The model's."""
        self.metrics = Metrics(runtime, self.services.grammars.stats)
        self.texts = Texts(
            runtime.text_models,
            runtime.config,
            lambda work: self.services.runtime.worker.call(work),
            self.metrics.registry,
            self._generates,
        )
        """What makes vectors of texts."""

    def _generates(self, name: str) -> bool:
        """Whether text is generated under that name."""
        runtime = self.services.runtime
        return name == runtime.model.name or name in runtime.registry.names() or name in runtime.experiments

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
