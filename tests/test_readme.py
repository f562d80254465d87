"""README's commands, run in order, as one shell session in a copy of the checkout.

Fenced blocks after a line `<!-- test -->` are run. A line that starts with `$ ` begins a command; it goes on while
it ends in a backslash or a quote is open. Everything else is output and is not compared. Recipes are trained for a
few steps, enough to serve, export and merge what comes of them: test_demo.py says how good that is at its end.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lathe

pytestmark = pytest.mark.long

ROOT = Path(lathe.__file__).parent
README = ROOT / "README.md"
BLOCK = re.compile(r"<!--\s*test\s*-->\s*```(?:console|bash|sh)\n(.*?)```", re.DOTALL)
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "exports", "*.sqlite*", "__pycache__", ".*_cache")
TIMEOUT_S = 3600

SESSION = """
set -eo pipefail
trap 'kill $(jobs -p) 2>/dev/null' EXIT
curl() { command curl --fail "$@"; }  # an HTTP error is a failure here
"""
# A program and no function: what runs in the background is what the trap ends.
LATHE = """#!/bin/sh
if [ "$1" = train ]; then set -- "$@" --set iters=20; fi
exec {folder}/lathe "$@"
"""


def commands(text: str) -> list[str]:
    """The commands of the blocks marked for testing."""
    found: list[str] = []
    is_open = False
    for line in "\n".join(BLOCK.findall(text)).splitlines():
        if is_open:
            found[-1] += "\n" + line
        elif line.startswith("$ "):
            found.append(line[2:])
        else:
            continue
        is_open = goes_on(found[-1])
    return found


def goes_on(command: str) -> bool:
    if command.endswith("\\"):
        return True
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


def test_marked_blocks_are_found_and_others_left_alone():
    text = """
```console
$ rm -rf /
```
<!-- test -->
```console
$ lathe a \\
    --b
printed
$ lathe c '{"x":
  1}'
```
"""
    assert commands(text) == ["lathe a \\\n    --b", "lathe c '{\"x\":\n  1}'"]


@pytest.mark.skipif(not README.exists(), reason="no README yet")
def test_the_commands_of_the_readme_run(tmp_path, free_ports):
    checkout = tmp_path / "lathe"
    shutil.copytree(ROOT, checkout, ignore=LEFT_OUT)
    found = commands(README.read_text().replace("8000", str(free_ports())))
    assert found, "README marks no block with <!-- test -->"
    (tmp_path / "bin").mkdir()
    program, folder = tmp_path / "bin" / "lathe", Path(sys.executable).parent
    program.write_text(LATHE.format(folder=shlex.quote(str(folder))))
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), str(folder), os.environ["PATH"]])
    shown = "\n".join(f"echo {shlex.quote('$ ' + command)}\n{command}" for command in found)
    with (tmp_path / "output").open("w") as output:
        done = subprocess.run(
            ["bash", "-c", SESSION + shown],
            cwd=checkout,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, (tmp_path / "output").read_text()[-4000:]
