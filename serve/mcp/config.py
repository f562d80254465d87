"""A file of MCP servers, in the form that other clients know: {"mcpServers": {name: {command, args, env} | {url}}}.

What stands in it is run as this server's user; nothing else ever is: a request names a server, and never a command or
an address.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from serve.errors import ConfigError
from serve.settings import Strict

APPROVALS = ("autoApprove", "alwaysAllow")
"""Keys of other clients: tools that run without anybody being asked."""


VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_]\w*)(?::-([^}]*))?\}")
"""Of this process's environment, as Claude Code and others have it; `${env:NAME}` is VS Code's word."""
TYPES = {"stdio": ("stdio",), "http": ("http", "streamable-http", "streamableHttp", "streamable_http")}
"""What other clients call the two transports. An older one, sse, is not spoken."""


class McpServerConfig(Strict):
    """One server: a command that speaks over its standard streams, or the address of one that runs."""

    command: str | None = Field(None, min_length=1)
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = Field(default_factory=dict)
    """Beside PATH, HOME and the like; of this process's own environment it gets nothing else."""
    cwd: Path | None = None
    url: str | None = Field(None, pattern=r"^https?://")
    """Of a server that speaks streamable HTTP."""
    headers: Mapping[str, str] = Field(default_factory=dict)
    """Sent with every request to the address."""
    type: str | None = None
    """As other clients have it, one of TYPES; it follows from command or url."""
    disabled: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> McpServerConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("expected either command or url")
        kind = "stdio" if self.url is None else "http"
        if self.type is not None and self.type not in TYPES[kind]:
            raise ValueError(
                f"type: found {self.type!a:.80}; expected {' or '.join(TYPES[kind])} beside "
                f"{'command' if self.url is None else 'url'}"
            )
        if self.url is not None and (self.args or self.env or self.cwd):
            raise ValueError("args, env and cwd are a command's; found beside url")
        if self.command is not None and self.headers:
            raise ValueError("headers are an address's; found beside command")
        return self


class McpFile(Strict):
    """All of a file."""

    mcpServers: Mapping[str, McpServerConfig]


def read_servers(path: Path, environ: Mapping[str, str] = os.environ) -> dict[str, McpServerConfig]:
    """The servers of a file that are not disabled, by name. ConfigError names the file and what is wrong in it."""
    problems: list[str] = []
    try:
        written = json.loads(path.read_text())
        found = McpFile.model_validate(_filled(written, environ, (), problems))
    except OSError as error:
        raise ConfigError(f"mcp_servers: {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problems += (_told(each["loc"], each["type"], each["msg"]) for each in error.errors())
    except ValueError as error:
        raise ConfigError(f"mcp_servers: {path} is no JSON: {error}") from None
    if problems:
        raise ConfigError(f"mcp_servers: {path}: {'; '.join(problems)}")
    return {name: server for name, server in found.mcpServers.items() if not server.disabled}


def _filled(value: Any, environ: Mapping[str, str], place: tuple[str, ...], problems: list[str]) -> Any:
    """A file's part with what its variables stand for; a server that is disabled as it is."""
    if isinstance(value, dict):
        is_off = len(place) == 2 and value.get("disabled") is True
        return {
            key: inner if is_off else _filled(inner, environ, (*place, key), problems)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_filled(inner, environ, (*place, str(at)), problems) for at, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def stands_for(found: re.Match[str]) -> str:
        name, default = found.groups()
        if name not in environ and default is None:
            problems.append(
                f"{'.'.join(place)}: environment variable {name} is not set; set it, or write ${{{name}:-DEFAULT}}"
            )
        return environ.get(name) or default or ""

    return VARIABLE.sub(stands_for, value)


def _told(place: Sequence[int | str], kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        known = McpFile if len(place) == 1 else McpServerConfig
        message = f"unknown key; there are {', '.join(known.model_fields)}"
        if place[-1] in APPROVALS:
            message += ". Nobody is asked here before a tool runs: a request's allowed_tools says which may"
    return f"{'.'.join(map(str, place))}: {message}"
