"""An MCP server without the mcp package, over its standard streams, or over HTTP on a port. A call makes its tools
more, or its sessions none, or its answer one that the protocol does not know."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event
from typing import Any
from uuid import uuid4

tools = ["grow", "forget", "hold", "release", "vanish", "lock", "odd"]
held, released, locked = Event(), Event(), Event()
sessions: set[str] = set()


def answer(asked: dict[str, Any], notify: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """To one message; None to a notification."""
    if "id" not in asked:
        return None
    told: dict[str, Any] = {"jsonrpc": "2.0", "id": asked["id"]}
    match asked["method"]:
        case "initialize":
            told["result"] = {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {"listChanged": True}},
                "serverInfo": {"name": "raw", "version": "1"},
            }
        case "tools/list":
            told["result"] = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in tools]}
        case "tools/call":
            match asked["params"]["name"]:
                case "grow":
                    tools.append(f"tool-{len(tools)}")
                    notify({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
                case "forget":  # once another call is being held
                    held.wait(60)
                    sessions.clear()
                case "hold":
                    held.set()
                    released.wait(60)
                case "release":
                    released.set()
                case "vanish":  # it has been done, and nothing more is known
                    tools.append(f"tool-{len(tools)}")
                    sessions.clear()
                case "lock":  # and no new session lasts
                    locked.set()
                    sessions.clear()
            kind = "widget" if asked["params"]["name"] == "odd" else "text"
            told["result"] = {"content": [{"type": kind, "text": str(len(tools))}]}
        case _:
            told["error"] = {"code": -32601, "message": "not here"}
    return told


def write(message: dict[str, Any]) -> None:
    """A line to the client."""
    print(json.dumps(message), flush=True)


class Handler(BaseHTTPRequestHandler):
    """Streamable HTTP with sessions."""

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        """One message."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_first = asked["method"] == "initialize"
        session = uuid4().hex if is_first else self.headers.get("mcp-session-id", "")
        if is_first and not locked.is_set():
            sessions.add(session)
        if not is_first and session not in sessions:
            error = {"code": -32000, "message": "Bad Request: No valid session ID provided"}
            status = 404 if len(tools) % 2 else 400  # as the protocol has it, and as many servers do
            return self.tell(status, {"jsonrpc": "2.0", "id": None, "error": error})
        told = answer(asked, lambda _: None)
        return self.tell(202 if told is None else 200, told, session)

    def tell(self, status: int, told: dict[str, Any] | None, session: str = "") -> None:
        """A response."""
        body = b"" if told is None else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("mcp-session-id", session)
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    for line in sys.stdin:
        if (told := answer(json.loads(line), write)) is not None:
            write(told)
