"""Folders of models that a server may look names up in: a name in, the model's folder out, if it is inside."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from serve.adapters.versions.names import name_problem
from serve.errors import ForbiddenError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
MAX_LISTED = 1000
MAX_DEPTH = 2
"""A model's folder stands in one of them, or in a folder there: `name`, or `owner/name`."""


def model_in(folders: Sequence[Path], name: str) -> Path | None:
    """None where no folder has a model of that name. ForbiddenError where the name, or a link, leads out of them."""
    if not folders or name_problem(name) is not None:
        return None
    parts = PurePosixPath(name).parts
    if ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
        raise ForbiddenError(f"model {name!a:.200} leads out of model_dirs; a name is of a folder inside one")
    if "/".join(parts) != name or len(parts) > MAX_DEPTH:  # one name a model: "a//b" is none
        return None
    for folder in folders:
        path = folder.expanduser() / name
        if not (path / CONFIG_FILE).is_file():
            continue
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder.expanduser())):
            raise ForbiddenError(f"model {name!r}: {path} is a link that leads out of {folder}")
        return path
    return None


def models_in(folders: Sequence[Path]) -> list[str]:
    """Names that `model_in` finds: a bounded number of them."""
    found: dict[str, None] = {}
    for folder in folders:
        for name in _names(folder.expanduser()):
            if len(found) >= MAX_LISTED:
                return list(found)
            found[name] = None
    return list(found)


def _names(folder: Path, prefix: str = "", depth: int = 1) -> Iterator[str]:
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        logger.warning("%s, of model_dirs, cannot be read: %s", folder, error)
        return
    for entry in entries:
        path = folder / entry
        if name_problem(entry) is not None or path.is_symlink() or not path.is_dir():
            continue
        if (path / CONFIG_FILE).is_file():
            yield prefix + entry
        elif depth < MAX_DEPTH:
            yield from _names(path, f"{prefix}{entry}/", depth + 1)
