"""A route's endpoint, called with its body and its dependencies without FastAPI's solver, where that has nothing to
add: an answer that is a Response already, and dependencies that take the request and no more.

The solver looks for parameters in path, query, headers and cookies of each dependency and makes a response to be
changed by them: a third of a millisecond that a first token waits for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import iscoroutinefunction
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from pydantic import TypeAdapter, ValidationError

Endpoint = Callable[..., Awaitable[Response]]
Dependency = Callable[..., Awaitable[Any]]
PARAMETERS = ("path_params", "query_params", "header_params", "cookie_params")
SPECIAL = (
    *("websocket_param_name", "http_connection_param_name", "response_param_name"),
    *("background_tasks_param_name", "security_scopes_param_name"),
)


class Direct:
    """One endpoint. Made by `direct_of`."""

    def __init__(self, dependant: Dependant, body: type) -> None:
        """body: what the endpoint wants of it."""
        assert dependant.call is not None, "an endpoint"
        self._endpoint: Endpoint = dependant.call
        self._body_name, self._request_name = dependant.body_params[0].name, dependant.request_param_name
        self._adapter = TypeAdapter[Any](body)
        self._dependencies: list[tuple[str | None, str, Dependency]] = [
            (each.name, each.request_param_name, each.call)
            for each in dependant.dependencies
            if each.call is not None and each.request_param_name is not None
        ]

    async def __call__(self, request: Request, value: Any) -> Response | None:
        """The answer to a request whose body is `value`; None where that is no body of this endpoint's, which FastAPI
        is to say."""
        try:
            body = self._adapter.validate_python(value)
        except ValidationError:
            return None
        given = {self._body_name: body}
        if self._request_name is not None:
            given[self._request_name] = request
        for name, request_name, call in self._dependencies:
            found = await call(**{request_name: request})
            if name is not None:
                given[name] = found
        return await self._endpoint(**given)


def direct_of(dependant: Dependant) -> Direct | None:
    """None where FastAPI's solver has something to add."""
    hints = get_type_hints(dependant.call, include_extras=True)
    is_plain = (
        hints.get("return") is Response
        and len(dependant.body_params) == 1
        and not any(getattr(dependant, name) for name in (*PARAMETERS, *SPECIAL))
        and all(map(_is_plain, dependant.dependencies))
    )
    return Direct(dependant, hints[dependant.body_params[0].name]) if is_plain else None


def _is_plain(dependency: Dependant) -> bool:
    more = (*PARAMETERS, *SPECIAL, "body_params", "dependencies")
    has_more = any(getattr(dependency, name) for name in more)
    return iscoroutinefunction(dependency.call) and dependency.request_param_name is not None and not has_more
