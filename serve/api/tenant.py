"""A request's headers and key in, whose prefixes it may share out. A header names a tenant and proves nothing; a key
has one, which a header may only repeat."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from serve.api.exchange import current
from serve.errors import RequestError

MAX_TENANT_CHARS = 128
HEADERS = {"X-Tenant": "Whose prefixes are shared.", "X-APC-Tenant": "mlx-vlm's name of it."}
_NAME = {"type": "string", "pattern": f"^[!-~]{{1,{MAX_TENANT_CHARS}}}$"}
PARAMETERS = [
    {"name": name, "in": "header", "required": False, "schema": _NAME, "description": meaning}
    for name, meaning in HEADERS.items()
]
"""As the OpenAPI description has them."""


async def tenant_of(request: Request) -> str:
    """Empty where neither a key nor a header names one. RequestError for what is no name, lest it be everybody's;
    ForbiddenError for another key's. Reads headers itself, which FastAPI takes as long for as for a whole body."""
    named = [(header, value) for header in HEADERS for value in request.headers.getlist(header)]
    for header, value in named:
        if not 0 < len(value) <= MAX_TENANT_CHARS or not all("!" <= character <= "~" for character in value):
            raise RequestError(
                f"{header}: found {value[:MAX_TENANT_CHARS]!a}; a tenant is 1 to {MAX_TENANT_CHARS} characters from "
                "! to ~, without spaces",
                header,
            )
        if value != named[0][1]:
            raise RequestError(
                f"{header}: found {value}, but also {named[0][0]}: {named[0][1]}; send one tenant", header
            )
    tenant, exchange = named[0][1] if named else "", current()
    if exchange is not None:
        exchange.tenant = tenant = exchange.key.tenant_for(tenant) if exchange.key else tenant
    return tenant


TenantDep = Annotated[str, Depends(tenant_of)]
