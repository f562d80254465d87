"""What a base's registry knew as the base left memory → the same names when it comes back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from serve.adapters.versions.source import Source
from serve.adapters.versions.version import AdapterVersion
from serve.errors import LatheError
from serve.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptAdapter:
    """A name, and what it stood for."""

    name: str
    path: str
    number: int
    content_hash: str
    last_number: int
    """Of its versions; the next has the one after."""
    is_pinned: bool
    earlier: tuple[tuple[AdapterVersion, Source], ...] = ()
    """Versions beside it that it may be rolled back to, and where they are read again. Without templates, which hold
    the base's tokenizer."""


def keep_adapters(runtime: Runtime) -> tuple[KeptAdapter, ...]:
    """Every name that somebody loaded; what was looked up for requests is found again by the next."""
    registry, kept = runtime.registry, []
    for version in registry.current():
        shown = registry.find(version.name)
        if shown is not None and not shown.is_found:
            kept.append(
                KeptAdapter(
                    version.name,
                    version.path,
                    version.number,
                    version.content_hash,
                    registry.last_number(version.name),
                    shown.is_pinned,
                    tuple(
                        (replace(one, template=None), source)
                        for one, source in registry.earlier(version.name)
                    ),
                )
            )
    return tuple(kept)


def restore_adapters(runtime: Runtime, kept: tuple[KeptAdapter, ...]) -> None:
    """Load them from where they came. One whose files are as they were has its version's number again, and what it
    was before is known again as far as that lies where it came from; one that cannot be loaded any more is told in
    the log, and its name is gone."""
    registry = runtime.registry
    for each in kept:
        registry.recall(each.name, each.last_number, {each.content_hash: each.number})
        try:
            registry.load(each.name, each.path, replace=True)
            registry.remember(each.name, each.earlier)
            if each.is_pinned:
                registry.pin(each.name)
        except LatheError as error:
            logger.warning(
                "adapter %r is not there again with model %r: %s", each.name, runtime.model.name, error
            )
