"""A Runtime in, the ASGI application out."""

from __future__ import annotations

import re
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from serve.api import (
    adapters,
    cache,
    chat,
    completions,
    embeddings,
    errors,
    feedback,
    health,
    models,
    page,
    rerank,
    status,
    tokenize,
    watch,
)
from serve.api.bases import Bases
from serve.api.description import describe_aside
from serve.api.front import Front
from serve.api.guard import Guard
from serve.api.messages import endpoints as messages
from serve.api.messages.errors import error_response as anthropic_error
from serve.api.ollama import endpoints as ollama
from serve.api.ollama.errors import error_response as ollama_error
from serve.api.opening import Openings
from serve.api.responses import endpoints as responses
from serve.api.state import AppState
from serve.runtime import Runtime

EXPOSED_HEADERS = [
    *("Retry-After", "X-Should-Retry", "Request-Id", "X-Request-Id"),
    *("X-Lathe-Model", "X-Lathe-Variant", "X-Lathe-Context-Overflow"),
    *(
        f"X-RateLimit-{which}-{what}"
        for which in ("Limit", "Remaining", "Reset")
        for what in ("Requests", "Tokens")
    ),
]
"""What pages of other origins may read."""

OPENINGS = {"/v1/messages": messages.OPENING, "/v1/responses": responses.OPENING, **ollama.OPENINGS}


def create_app(served: Runtime | Bases) -> FastAPI:
    """The HTTP server's application. A runtime, or bases, stay their maker's to close."""
    app = FastAPI(
        title="Lathe",
        version=version("mlx-lathe"),
        responses=errors.RESPONSES,
    )
    state = app.state.belongings = AppState(served)
    # The last one is the first that a request comes to.
    app.add_middleware(Openings, state=state, words=OPENINGS)
    app.add_middleware(Guard, state=state)
    if state.config.allowed_origins:
        patterns = [each for each in state.config.allowed_origins if "*" in each and each != "*"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[each for each in state.config.allowed_origins if each not in patterns],
            allow_origin_regex="|".join(re.escape(each).replace(r"\*", "[^/]*") for each in patterns) or None,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(Front, state=state)
    errors.install(app, {"/v1/messages": anthropic_error, "/api/": ollama_error})
    for part in (
        *(chat, completions, responses, messages, ollama, models),
        *(embeddings, rerank, tokenize),
        *(adapters, watch, cache, feedback, health, status),
    ):
        app.include_router(part.router)
    if state.config.ui:
        app.include_router(page.router)
    describe_aside(app)
    return app
