"""A Runtime in, the ASGI application out."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import Depends, FastAPI

from serve.api import adapters, cache, chat, completions, errors, feedback, health, models, page, watch
from serve.api.bases import Bases
from serve.api.body import check_target
from serve.api.messages import endpoints as messages
from serve.api.messages.errors import error_response as anthropic_error
from serve.api.metrics import CountErrors
from serve.api.opening import Openings
from serve.api.state import AppState
from serve.runtime import Runtime


def create_app(served: Runtime | Bases) -> FastAPI:
    """The HTTP server's application. A runtime, or bases, stay their maker's to close."""
    app = FastAPI(
        title="Lathe",
        version=version("mlx-lathe"),
        dependencies=[Depends(check_target)],
        responses=errors.RESPONSES,
    )
    app.state.belongings = AppState(served)
    app.add_middleware(Openings, state=app.state.belongings)
    app.add_middleware(CountErrors, metrics=app.state.belongings.metrics)
    errors.install(app, {"/v1/messages": anthropic_error})
    for part in (chat, completions, messages, models, adapters, watch, cache, feedback, health):
        app.include_router(part.router)
    if app.state.belongings.config.ui:
        app.include_router(page.router)
    return app
