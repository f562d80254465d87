"""The bare batched loop as one of those that are compared: it takes rounds of requests as a server does.

Its process does nothing between two rounds but wait for a line, so there is nothing to pause.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from serve.bench.client import Answer
from serve.bench.load import Round
from serve.bench.process import see_end, tail_of
from serve.bench.servers import PYTHON, bare_environment
from serve.errors import StoppedError

MODEL = "bare loop"


class BareLoop:
    """A context manager: inside it the loop waits for work.

    log  where what it prints besides answers goes
    """

    def __init__(self, model: Path, log: Path) -> None:
        self._model = model
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> BareLoop:
        with ExitStack() as undone:
            undone.callback(self._stop)
            self._start()
            self._read()
            undone.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = [f"{key}={value}" for key, value in bare_environment().items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["env", *environment, *PYTHON, "serve.bench.bare_child", str(self._model)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def round(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> Round:
        """All `prompts`, `concurrency` at a time, each batch whole before the next begins. Raises StoppedError."""
        answers: list[Answer] = []
        wall_s = 0.0
        for first in range(0, len(prompts), concurrency):
            start_s = time.perf_counter()
            self._write({"prompts": prompts[first : first + concurrency], "max_tokens": max_tokens})
            found = self._read()
            wall_s += found["wall_s"]
            answers += _answers(found, start_s)
        return Round(concurrency, wall_s, tuple(answers))

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        process = self._process
        assert process is not None, "not started"
        assert process.stdin is not None, "its input is a pipe"
        assert process.stdout is not None, "its output is a pipe"
        return process.stdin, process.stdout

    def _write(self, asked: Mapping[str, Any]) -> None:
        try:
            self._pipes[0].write(json.dumps(asked) + "\n")
            self._pipes[0].flush()
        except OSError as error:
            raise self._ended() from error

    def _read(self) -> dict[str, Any]:
        line = self._pipes[1].readline()
        if not line:
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        return found

    def _ended(self) -> StoppedError:
        return StoppedError(f"the bare loop's process has ended:\n{tail_of(self._log)}")

    def _stop(self) -> None:
        if self._process is None:
            return
        for pipe in self._pipes:
            # What could not be written to a process that is gone is still in the buffer, and would be now.
            with suppress(OSError):
                pipe.close()
        see_end(self._process)


def _answers(found: Mapping[str, Any], start_s: float) -> list[Answer]:
    """One batch's. Every row has its tokens at the same times."""
    after_s: list[float] = found["arrivals_s"]
    return [
        Answer(
            model=MODEL,
            first_s=after_s[0],
            last_s=after_s[-1],
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=len(after_s),
            counted_by="usage",
            text=text,
            finish="length",
            arrivals_s=tuple(start_s + each for each in after_s),
            start_s=start_s,
        )
        for text, num_prompt_tokens in zip(found["texts"], found["num_prompt_tokens"], strict=True)
    ]
