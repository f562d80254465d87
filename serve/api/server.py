"""A ServeConfig in, a running HTTP server out. The port is bound before the model loads."""

from __future__ import annotations

import errno
import logging
import resource
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import uvicorn

from serve import device
from serve.api.app import create_app
from serve.api.bases import Bases
from serve.api.protocol import connections
from serve.api.state import AppState
from serve.config import ServeConfig
from serve.errors import ConfigError
from serve.keys.file import read_keys
from serve.logs import logging_to
from serve.runtime import Runtime
from serve.tracing import Tracer

logger = logging.getLogger(__name__)

LAST_WORDS_S = 2
"""What the last bytes of streams have to reach their clients, once all that ran has ended or has been ended."""
BACKLOG = 2048
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than any client keeps it, lest a request meet the closing."""
DEAD_AFTER_S = 60
"""A connection on which nothing has come for so long is asked whether it is still there."""
OTHER_FILES = 1024
"""That a server has open beside its connections."""


def run(config: ServeConfig, say: Callable[[str], None] = partial(print, flush=True)) -> None:
    """Serve until SIGINT or SIGTERM, then drain, and write what is queued. Main thread only.

    say  gets one line with the models' names and the URL, once requests are answered
    Raises ConfigError (port in use, keys or a certificate that cannot be read) before anything is loaded, and what
    Bases.start raises.
    """
    with (
        logging_to(config.log_level, config.log_format),
        _ended_by_sigterm(),
        bind(config.host, config.port) as listener,
    ):
        _check(config)
        _make_room_for(config.max_connections)
        # What lives as long as the server is looked through no more, a millisecond of a step each time; where models
        # come and go that is what was there before them.
        if config.has_several_models:
            device.set_aside()
        bases = Bases.start(config)
        if not config.has_several_models:
            device.set_aside()
        try:
            server = make_server(bases)
            scheme = "https" if server.config.is_ssl else "http"
            say(f"Lathe serves {', '.join(bases.names())} at {url_of(listener, scheme)}/v1")
            with _told_by_sighup(server):
                server.run(sockets=[listener])
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
            yield url_of(listener, "https" if server.config.is_ssl else "http")
        finally:
            server.should_exit = True
            thread.join()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; from here on clients queue until the server runs. ConfigError names the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of a socket that does not name its protocol, asyncio leaves Nagle's algorithm on: on a connection that is used
    # again, a stream's second part would wait for the client to acknowledge its first, 40 ms on Linux.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # as connections have it that are accepted
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_AFTER_S)
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


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """http://host:port, with the port that was really taken."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, which drains before it ends."""

    def __init__(self, config: uvicorn.Config, state: AppState) -> None:
        super().__init__(config)
        self.state = state
        self._is_forced = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Until it has ended."""
        try:
            super().run(sockets)
        finally:
            self.state.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain; a second one ends what runs at once."""
        self._captured_signals.append(sig)
        drain = self.state.drain
        self._is_forced = drain.is_on
        drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        drain = self.state.drain
        if drain.is_on and counter % 50 == 0:
            logger.info("draining: %d requests run, for %.0f s at most", drain.num_running, drain.left_s)
        if drain.is_over or self._is_forced:
            if num_ended := drain.end_all():
                logger.warning("%d requests are ended before their time", num_ended)
            self.should_exit = True
        return await super().on_tick(counter)

    def read_again(self) -> None:
        """Keys and certificate, as their files are now. From any thread."""
        if self.state.keys is not None:
            self.state.keys.look(is_asked=True)
        config = self.config
        if config.ssl is not None and config.ssl_certfile is not None:
            try:
                config.ssl.load_cert_chain(
                    config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password
                )
            except (OSError, ValueError) as error:
                logger.error("the certificate stays as it was: %s", error)


def make_server(models: Runtime | Bases) -> Server:
    """Not yet running, and bound to nothing."""
    told = models.config
    password = told.ssl_keyfile_password
    app = create_app(models)
    config = uvicorn.Config(
        app,
        http=connections(
            header_timeout_s=told.header_timeout_s,
            write_timeout_s=told.write_timeout_s,
            max_connections=told.max_connections,
        ),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=LAST_WORDS_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
        ssl_certfile=told.ssl_certfile,
        ssl_keyfile=told.ssl_keyfile,
        ssl_keyfile_password=password.get_secret_value() if password else None,
        ssl_ca_certs=told.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if told.ssl_ca_certs else ssl.CERT_NONE,
    )
    return Server(config, app.state.belongings)


def _check(config: ServeConfig) -> None:
    """ConfigError where keys or a certificate cannot be read. Tells whom an open door lets in."""
    if config.api_keys is not None:
        read_keys(config.api_keys)
    if config.ssl_certfile is not None:
        _check_certificate(config)
    if config.otlp_endpoint is not None:
        Tracer(config.otlp_endpoint, "").close()
    if not config.has_keys and not config.is_loopback:
        logger.warning(
            "everybody who reaches %s may ask for everything and load adapters: api_key and api_keys say who may",
            config.host,
        )


def _check_certificate(config: ServeConfig) -> None:
    password = config.ssl_keyfile_password
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        assert config.ssl_certfile is not None
        # Without a password it would be asked for in the terminal.
        context.load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile, password.get_secret_value() if password else ""
        )
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = ", ".join(
            map(str, filter(None, (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)))
        )
        raise ConfigError(
            f"ssl_certfile: {files} cannot be used: {error}; expected a certificate and its key, PEM"
        ) from None


def _make_room_for(num_connections: int) -> None:
    """Let this process open as many files as that takes, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + OTHER_FILES
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft not in (resource.RLIM_INFINITY,) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


@contextmanager
def _told_by_sighup(server: Server) -> Iterator[None]:
    """SIGHUP has keys and certificate read again. In a terminal it means that the terminal is gone, as ever."""
    if sys.stdin is not None and sys.stdin.isatty():
        yield
        return

    def read_again(_signal: int, _frame: object) -> None:
        threading.Thread(target=server.read_again, name="lathe-reload").start()

    before = signal.signal(signal.SIGHUP, read_again)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
