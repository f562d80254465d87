"""A ServeConfig in, a running HTTP server out. The port is bound before the model loads."""

from __future__ import annotations

import errno
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from serve.api.app import create_app
from serve.api.bases import Bases
from serve.config import ServeConfig
from serve.errors import ConfigError
from serve.runtime import Runtime

GRACEFUL_SHUTDOWN_S = 10
BACKLOG = 2048
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than any client keeps it, lest a request meet the closing."""


def run(config: ServeConfig, say: Callable[[str], None] = partial(print, flush=True)) -> None:
    """Serve until SIGINT or SIGTERM, then let streams end for a while and write what is queued. Main thread only.

    say  gets one line with the models' names and the URL, once requests are answered
    Raises ConfigError (port in use) before anything is loaded, and what Bases.start raises.
    """
    with _ended_by_sigterm(), bind(config.host, config.port) as listener:
        bases = Bases.start(config)
        gc.collect()
        gc.freeze()  # what lives as long as the server is looked through no more, a millisecond of a step each time
        try:
            say(f"Lathe serves {', '.join(bases.names())} at {url_of(listener)}/v1")
            make_server(bases).run(sockets=[listener])
        except KeyboardInterrupt:
            pass  # uvicorn has shut down and raised the signal again
        finally:
            bases.close()


@contextmanager
def serving(models: Runtime | Bases) -> Iterator[str]:
    """Serve them on a free loopback port from a thread; the URL, without /v1. For tests and the demo."""
    with bind("127.0.0.1", 0) as listener:
        server = make_server(models)
        thread = threading.Thread(target=server.run, args=([listener],), name="lathe-http")
        thread.start()
        try:
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; from here on clients queue until the server runs. ConfigError names the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = (
            "it is in use; choose another, or 0 for a free one" if error.errno == errno.EADDRINUSE else error
        )
        raise ConfigError(f"port {port} on {host} cannot be opened: {reason}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """http://host:port, with the port that was really taken."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does; by default it would end the process with writes still queued."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_server(models: Runtime | Bases) -> uvicorn.Server:
    """Not yet running, and bound to nothing."""
    config = uvicorn.Config(
        create_app(models),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
    )
    return uvicorn.Server(config)
