"""A request's headers and key in, whose prefixes it may share out. A header names a tenant and proves nothing; a key
has one, which a header may only repeat."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header

from serve.api.exchange import current
from serve.errors import RequestError

MAX_TENANT_CHARS = 128

Headers = list[str] | None
"""All of one name: a proxy's and a client's may differ."""


async def _tenant(
    ours: Annotated[Headers, Header(alias="X-Tenant", description="Whose prefixes are shared.")] = None,
    theirs: Annotated[Headers, Header(alias="X-APC-Tenant", description="mlx-vlm's name of it.")] = None,
) -> str:
    """Empty where neither a key nor a header names one. RequestError for what is no name, lest it be everybody's;
    ForbiddenError for another key's."""
    named = [("X-Tenant", value) for value in ours or ()] + [
        ("X-APC-Tenant", value) for value in theirs or ()
    ]
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


TenantDep = Annotated[str, Depends(_tenant)]
