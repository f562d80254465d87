"""A server of tools by the mcp package, as a program of its own: over its standard streams, or HTTP on a port."""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from typing import Any

import mcp_types as types
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


FILE = "file:///notes.md"
RESULTS = {
    "link": {
        "content": [types.ResourceLink(type="resource_link", name="notes", uri=FILE, description="Of May.")]
    },
    "file": {
        "content": [
            types.EmbeddedResource(
                type="resource", resource=types.TextResourceContents(uri=FILE, text="# Notes")
            )
        ]
    },
    "packed": {
        "content": [
            types.EmbeddedResource(
                type="resource", resource=types.BlobResourceContents(uri=FILE, blob="AAAA")
            )
        ]
    },
    "data": {"content": [], "structured_content": {"total": 36}},
    "picture": {
        "content": [types.ImageContent(type="image", data="AAAA", mime_type="image/png")],
        "structured_content": {"total": 36},
    },
    "both": {
        "content": [types.TextContent(type="text", text='{ "total": 36 }')],
        "structured_content": {"total": 36},
    },
    "refused": {
        "content": [types.TextContent(type="text", text="ask a human")],
        "structured_content": {"code": "NEEDS_HUMAN"},
        "is_error": True,
    },
}
"""What a tool may give beside plain text."""


@server.tool()
def draw(side: int, packed: bool = False) -> types.CallToolResult:
    """Show a square; of no side, what is no picture."""
    from PIL import Image

    written = io.BytesIO()
    if side:
        Image.new("RGB", (side, side), "red").save(written, "PNG")
    data = base64.b64encode(written.getvalue() or b"none").decode()
    shown: Any = types.ImageContent(type="image", data=data, mime_type="image/png")
    if packed:
        inside = types.BlobResourceContents(uri=FILE, blob=data, mime_type="image/png")
        shown = types.EmbeddedResource(type="resource", resource=inside)
    return types.CallToolResult(content=[shown])


@server.tool()
def odd(kind: str) -> types.CallToolResult:
    """Give one of RESULTS."""
    return types.CallToolResult(**RESULTS[kind])


@server.tool()
def end() -> str:
    """End this process."""
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
