"""A child process that is asked by a line of JSON and answers by one. It does nothing between two but wait."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from serve.bench.process import see_end, tail_of
from serve.bench.servers import PYTHON, bare_environment
from serve.errors import StoppedError


class LineProcess:
    """A context manager: inside it the process waits to be asked. `ready` is the line that it began with.

    name   what messages call it
    words  a module of ours, and what it is told
    log    where what it prints besides answers goes
    """

    def __init__(self, name: str, words: Sequence[str], log: Path) -> None:
        self.name = name
        self.ready: dict[str, Any] = {}
        self._words = words
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> LineProcess:
        with ExitStack() as undone:
            undone.callback(self._stop)
            self._start()
            self.ready = self._read()
            undone.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What it answers. Raises StoppedError if it has ended."""
        try:
            self._pipes[0].write(json.dumps(asked) + "\n")
            self._pipes[0].flush()
        except OSError as error:
            raise self._ended() from error
        return self._read()

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = [f"{key}={value}" for key, value in bare_environment().items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["env", *environment, *PYTHON, *self._words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,
            )

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        process = self._process
        assert process is not None, "not started"
        assert process.stdin is not None, "its input is a pipe"
        assert process.stdout is not None, "its output is a pipe"
        return process.stdin, process.stdout

    def _read(self) -> dict[str, Any]:
        line = self._pipes[1].readline()
        if not line:
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        return found

    def _ended(self) -> StoppedError:
        return StoppedError(f"{self.name}'s process has ended:\n{tail_of(self._log)}")

    def _stop(self) -> None:
        if self._process is None:
            return
        for pipe in self._pipes:
            # What could not be written to a process that is gone is still in the buffer, and would be now.
            with suppress(OSError):
                pipe.close()
        see_end(self._process)
