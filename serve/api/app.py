"""A Runtime in, the ASGI application out."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import Depends, FastAPI

from serve.api import adapters, cache, chat, completions, errors, feedback, health, models, page, watch
from serve.api.body import check_target
from serve.api.metrics import CountErrors
from serve.api.state import AppState
from serve.runtime import Runtime


def create_app(runtime: Runtime) -> FastAPI:
    """The HTTP server's application. The runtime stays its maker's to close."""
    app = FastAPI(
        title="Lathe",
        version=version("mlx-lathe"),
        dependencies=[Depends(check_target)],
        responses=errors.RESPONSES,
    )
    app.state.belongings = AppState(runtime)
    app.add_middleware(CountErrors, metrics=app.state.belongings.metrics)
    errors.install(app)
    for part in (chat, completions, models, adapters, watch, cache, feedback, health):
        app.include_router(part.router)
    if runtime.config.ui:
        app.include_router(page.router)
    return app
