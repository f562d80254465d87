"""GET /openapi.json, made on a thread: two seconds of work, for the first who asks, that no stream is to wait for."""

from __future__ import annotations

import threading

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route


def describe_aside(app: FastAPI) -> None:
    """Put a route of the same path in place of FastAPI's, which describes on the event loop."""
    making = threading.Lock()

    def described() -> bytes:
        with making:
            return bytes(JSONResponse(app.openapi()).body)

    async def describe(_request: Request) -> Response:
        return Response(await anyio.to_thread.run_sync(described), media_type="application/json")

    routes = app.router.routes
    index = next(i for i, route in enumerate(routes) if getattr(route, "path", None) == app.openapi_url)
    assert app.openapi_url is not None
    routes[index] = Route(app.openapi_url, describe, include_in_schema=False)
