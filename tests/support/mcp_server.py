"""A server of tools by the mcp package, as a program of its own: over its standard streams, or HTTP on a port."""

from __future__ import annotations

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"the sum is {a + b}"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("it is broken")


@server.tool()
def wait(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "waited"


@server.tool()
def much(count: int) -> str:
    """Say much."""
    return "x" * count


@server.tool()
def secrets() -> str:
    """What this process knows of its environment."""
    return ",".join(sorted(os.environ))


@server.tool()
def end() -> str:
    """End this process."""
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
