"""Files and folders of a run → their places, whole or not at all: written beside them, synced, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from serve.synced import sync

NEW, OLD = ".new-", ".old-"
"""Prefixes of what is not yet in its place, and of what has left it."""


def publish(partial: Path, final: Path) -> None:
    """Rename a finished folder into its place; an older folder there gives way only then."""
    old = final.with_name(f"{OLD}{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    path.write_text(text)
    sync(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader, and a kill, finds the old one or the new one. OSError as it comes."""
    partial = path.with_name(f"{NEW}{path.name}")
    try:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
