"""One key as the server knows it: whose it is and what it may do. Its text is not kept, only a hash."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from serve.errors import ForbiddenError
from serve.keys.limits import Limits

ANY_TENANT = "*"


@dataclass(frozen=True, eq=False)
class Key:
    """What was presented with a request that this server lets in."""

    name: str
    digest: bytes = field(repr=False)
    """SHA-256 of its text."""
    tenant: str
    """Whose prefixes its requests share; ANY_TENANT: whose a header says, as without keys."""
    is_admin: bool
    models: tuple[str, ...] | None
    """Names and patterns of what it may ask for; None: everything."""
    mcp_servers: tuple[str, ...] | None
    """Of the MCP servers whose tools its requests may have run; None: everyone's."""
    limits: Limits

    def allows(self, model: str) -> bool:
        """Whether it may ask for a model, an adapter or an experiment of that name, without a version."""
        return _matches(self.models, model)

    def allows_tools_of(self, server: str) -> bool:
        """Whether its requests may have tools of an MCP server run."""
        return _matches(self.mcp_servers, server)

    def tenant_for(self, named: str) -> str:
        """Whose a request is that names a tenant in a header ("": none). ForbiddenError where that is another's."""
        if self.tenant == ANY_TENANT:
            return named
        if named and named != self.tenant:
            raise ForbiddenError(f"X-Tenant: found {named}, but key {self.name!r} is tenant {self.tenant!r}")
        return self.tenant


def _matches(patterns: tuple[str, ...] | None, name: str) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
