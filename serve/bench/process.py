"""A server as a child process: started on a free port, waited for, paused, stopped. Any server with /health."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve.errors import StoppedError

POLL_S = 0.1
STOP_S = 15.0
QUOTED_LINES = 15
START_S = 300.0
"""Seconds are usual; a machine that does other things as well takes minutes."""


def free_port() -> int:
    """A TCP port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_s(pid: int) -> float:
    """Seconds on a processor that a process and those it started have had: no other process's work is in them."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def see_end(process: subprocess.Popen[Any]) -> None:
    """Return once a process that was asked to end is gone; one that takes too long is made to."""
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail_of(log: Path) -> str:
    """The last lines of what a process wrote, indented, to stand in a message."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  {line}" for line in lines[-QUOTED_LINES:]) or "  it printed nothing"


class ServerProcess:
    """A context manager: inside it the server answers /health with 200; after it the process is gone.

    It is of the session of whoever asks it: Linux shares the processors among sessions (autogroup), and one that does
    next to nothing, as a client, waits up to 100 ms beside one that keeps them all busy, and for the server, so it
    seems.

    command  its words may hold {port}
    env      added to the environment it inherits
    log      where its output goes; the end of it is quoted if it does not start
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.command = [word.replace("{port}", str(self.port)) for word in command]
        self._env = [f"{key}={value}" for key, value in (env or {}).items()]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the process; it does not see the terminal's Ctrl-C, its owner stops it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                ["env", *self._env, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Return once /health answers 200. Raises StoppedError if the process ends or takes too long."""
        deadline_s = time.monotonic() + timeout_s
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                raise StoppedError(f"{self.name} ended while starting:\n{tail_of(self.log)}")
            if time.monotonic() > deadline_s:
                raise StoppedError(
                    f"{self.name} did not answer within {timeout_s:.0f} s:\n{tail_of(self.log)}"
                )
            time.sleep(POLL_S)

    def pause(self) -> None:
        """Take it off the processor; memory and open sockets stay."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ask it to end, then make it."""
        if self._process is None or self._process.poll() is not None:
            return
        self.resume()
        self._process.terminate()
        see_end(self._process)

    def __enter__(self) -> ServerProcess:
        with ExitStack() as undone:
            undone.callback(self.stop)
            self.start()
            self.wait_ready()
            undone.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False
