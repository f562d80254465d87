"""A training run as a child process: started, watched, its peak memory read. Knows neither loop's files."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.bench.process import tail_of
from serve.errors import StoppedError

POLL_S = 0.05
PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


Clock = list[tuple[float, float]]
"""(wall clock, CPU seconds of the process until then), in order."""


def run_child(
    name: str, command: Sequence[str], log: Path, env: Mapping[str, str], clock: Clock | None = None
) -> int:
    """Run to the end; returns the most memory it held resident, in bytes, or 0 where the kernel does not say.

    env    added to the environment it inherits
    clock  filled as it runs, where the kernel says
    Raises StoppedError with the end of its output if it fails. It ends with the caller.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["env", *(f"{key}={value}" for key, value in env.items()), *command]
    with log.open("wb") as output:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    peak = 0
    try:
        while child.poll() is None:
            peak = max(peak, _resident_peak(child.pid))
            if clock is not None and (cpu_s := _cpu_s(child.pid)) is not None:
                clock.append((time.time(), cpu_s))
            time.sleep(POLL_S)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode:
        raise StoppedError(f"{name} ended with status {child.returncode}:\n{tail_of(log)}")
    return peak


def _resident_peak(pid: int) -> int:
    """Linux's own high-water mark; wait4's would start from what the parent held when it forked."""
    try:
        found = PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _cpu_s(pid: int) -> float | None:
    """Of all its threads, user and system."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
