"""`lathe serve` as a process of its own, as systemd would run it: where it answers, what it wrote, how it ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CODE = "import lathe; lathe.command()"


class LeftRunning:
    """A server process and the file that its standard error goes to."""

    def __init__(self, process: subprocess.Popen[str], line: str, log: Path) -> None:
        self.process = process
        self.line = line
        self.url = line.split()[-1].removesuffix("/v1")
        self._log = log

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The same, of a server with log_format: json; every line must be an object."""
        return [json.loads(line) for line in self.log.splitlines()]

    def requests(self) -> list[dict[str, Any]]:
        """Of them those of requests."""
        return [record for record in self.records if record["logger"] == "serve.request"]


@contextmanager
def left_running(
    folder: Path, model: Path, *words: str, env: Mapping[str, str] | None = None, **keys: Any
) -> Iterator[LeftRunning]:
    """A server of `model`, called lively, on a free port; words: of the command line; keys: of the configuration."""
    config, log = folder / "server.yaml", folder / "server.log"
    config.write_text(json.dumps({"model": str(model), "name": "lively", "port": 0, **keys}))
    command = [sys.executable, "-c", CODE, "serve", str(config), *words]
    command = ["env", *(f"{name}={value}" for name, value in (env or {}).items()), *command]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Lathe serves "), log.read_text()
            yield LeftRunning(process, line, log)
        finally:
            process.kill()
