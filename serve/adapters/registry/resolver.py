"""A model name that nobody loaded → an adapter of that name, in the folders and from the hub owners that are allowed.

What is found is loaded, and known from then on like any other; what is not found is not remembered, so that it may
come. Blocks: never asked on an event loop.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from serve.adapters.formats.files import PEFT_TENSORS_FILE, SUFFIX, find_files
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE
from serve.adapters.formats.own_tokens import TOKENIZER_FILES
from serve.adapters.registry.registry import Registry
from serve.adapters.versions.names import name_problem
from serve.adapters.versions.source import FolderSource
from serve.adapters.versions.version import AdapterVersion
from serve.errors import ForbiddenError, NotFoundError, OverloadedError

logger = logging.getLogger(__name__)

FILES = (CONFIG_FILE, TENSORS_FILE, PEFT_TENSORS_FILE, *TOKENIZER_FILES)
"""Of an adapter's repository, all that is fetched."""
MAX_LISTED = 1000
MAX_LOOKED_AT = 10 * MAX_LISTED
"""Entries of one folder: each may be asked for, but whoever lists them does not wait for hundreds of thousands."""
HUB_RETRY_AFTER_S = 10.0


class Resolver:
    """Looks names up. Safe to call from any thread.

    folders   where `name` may be an adapter's folder or file, deeper ones as `a/b`; links there lead nowhere else
    hub       owners and repositories (`owner`, `owner/name`) that may be fetched from the hub
    endpoint, cache  the hub's address, and where it is kept; None: those that huggingface_hub knows
    """

    def __init__(
        self,
        registry: Registry,
        folders: Sequence[Path] = (),
        hub: Sequence[str] = (),
        endpoint: str | None = None,
        cache: Path | None = None,
    ) -> None:
        self._registry = registry
        self._folders = [folder.expanduser() for folder in folders]
        self._hub = frozenset(hub)
        self._endpoint, self._cache = endpoint, cache

    def looks_up(self, name: str) -> bool:
        """Whether a name that is not known may be found somewhere. No version is: what is found is a name's first."""
        return bool(self._folders or self._hub) and name_problem(name) is None

    def find(self, name: str) -> AdapterVersion:
        """Load what `name` means, unless it is loaded already.

        NotFoundError where nothing of that name is; ForbiddenError where it leads elsewhere; OverloadedError where
        the hub cannot be reached; and what `Registry.add` raises.
        """
        if name_problem(name) is None:
            for folder in self._folders:
                path = _inside(folder, name)
                if path is not None:
                    return self._registry.add(name, FolderSource(path), is_found=True)
            if _is_on_hub(name, self._hub):
                return self._registry.add(name, FolderSource(self._fetched(name)), is_found=True)
        raise NotFoundError(f"no adapter {name!a:.200} is loaded, and none of that name is found")

    def listed(self) -> list[str]:
        """Names in the folders that a request may ask for: a bounded number, those of one level."""
        found: dict[str, None] = {}
        for folder in self._folders:
            found.update(dict.fromkeys(sorted(_names(folder, MAX_LISTED - len(found)))))
        return list(found)

    def _fetched(self, name: str) -> str:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        try:
            return str(
                snapshot_download(
                    name, allow_patterns=list(FILES), endpoint=self._endpoint, cache_dir=self._cache
                )
            )
        except (RepositoryNotFoundError, HFValidationError):  # a private one too, for whoever may not see it
            raise NotFoundError(f"no adapter {name!a:.200} is loaded, and the hub has none") from None
        except Exception as error:  # the hub's client raises whatever its transport does
            logger.warning("adapter %r cannot be fetched from the hub: %s", name, error)
            raise OverloadedError(
                f"adapter {name!r} cannot be fetched from the hub now: {error}", HUB_RETRY_AFTER_S
            ) from error


def may_find(name: str, folders: Sequence[Path], hub: Collection[str]) -> bool:
    """Whether a resolver of these folders and hub names would go after that name."""
    if name_problem(name) is not None:
        return False
    return any(_inside(folder.expanduser(), name) is not None for folder in folders) or _is_on_hub(name, hub)


def _is_on_hub(name: str, hub: Collection[str]) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash) and bool(rest) and "/" not in rest and not {owner, name}.isdisjoint(hub)


def _inside(folder: Path, name: str) -> Path | None:
    """The adapter of that name in a folder: a folder, or a file without its ending; None where there is none.

    ForbiddenError where the name or a link leads out of it; AdapterError for what is there and is no adapter.
    """
    parts = PurePosixPath(name).parts
    if ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
        raise ForbiddenError(
            f"model {name!a:.200} leads out of adapter_dirs; a name is of a folder inside one"
        )
    # One name an adapter: "a//b" and "a/./b" are others than "a/b".
    if not parts or "/".join(parts) != name:
        return None
    for path in (folder / name, folder / f"{name}{SUFFIX}"):
        if _is_adapter(path):
            _check_inside(folder, name, path)
            return path
    return None


def _is_adapter(path: Path) -> bool:
    """By its looks: a folder with a config, or a file of tensors."""
    if os.path.isdir(path):
        return os.path.lexists(path / CONFIG_FILE)
    return path.suffix == SUFFIX and os.path.isfile(path)


def _check_inside(folder: Path, name: str, path: Path) -> None:
    root = os.path.realpath(folder)
    for each in (path, *find_files(path)):
        if each is not None and not Path(os.path.realpath(each)).is_relative_to(root):
            raise ForbiddenError(
                f"model {name!r}: {each} is a link that leads out of {folder}, which adapter_dirs names"
            )


def _names(folder: Path, most: int) -> list[str]:
    """Adapters in one folder, as they are asked for, in any order: of a hundred thousand no more is read."""
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, MAX_LOOKED_AT):
                if len(found) >= most:
                    break
                asked = entry.name.removesuffix(SUFFIX)
                if name_problem(asked) is None and _is_adapter(folder / entry.name):
                    found.append(asked)
    except OSError as error:
        logger.warning("%s, of adapter_dirs, cannot be read: %s", folder, error)
    return found
