"""README's commands, run in order in a copy of the checkout.

Fenced blocks that follow a line `<!-- test -->` are run: lines that start with `$ ` are commands (a trailing
backslash continues them), everything else is output and is not compared.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lathe

ROOT = Path(lathe.__file__).parent
README = ROOT / "README.md"
BLOCK = re.compile(r"<!--\s*test\s*-->\s*```(?:console|bash|sh)\n(.*?)```", re.DOTALL)
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "exports", "*.sqlite*", "__pycache__", ".*_cache")
TIMEOUT_S = 600


def commands(text: str) -> list[str]:
    """The commands of the blocks marked for testing."""
    blocks = [block.replace("\\\n", " ") for block in BLOCK.findall(text)]
    return [line[2:].strip() for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_marked_blocks_are_found_and_others_left_alone():
    text = "```console\n$ rm -rf /\n```\n<!-- test -->\n```console\n$ lathe a \\\n    --b\nprinted\n$ lathe c\n```\n"
    assert [" ".join(command.split()) for command in commands(text)] == ["lathe a --b", "lathe c"]


@pytest.mark.skipif(not README.exists(), reason="no README yet")
def test_the_commands_of_the_readme_run(tmp_path):
    checkout = tmp_path / "lathe"
    shutil.copytree(ROOT, checkout, ignore=LEFT_OUT)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = commands(README.read_text())
    assert found, "README marks no block with <!-- test -->"
    for command in found:
        done = subprocess.run(
            command,
            shell=True,
            cwd=checkout,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
