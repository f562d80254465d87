"""What a registry knows of a name: the versions that it stands for and stood for, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.adapters.residency.contents import Tier
from serve.adapters.residency.seats import Standing
from serve.adapters.versions.source import Source
from serve.adapters.versions.version import AdapterVersion


@dataclass(eq=False)
class Known:
    """A version, and who needs it."""

    version: AdapterVersion
    source: Source
    num_requests: int = 0
    """That hold it now, or what it is added to."""


@dataclass(eq=False)
class Name:
    """What a name stands for."""

    current: Known
    others: dict[int, Known] = field(default_factory=dict)
    """Versions that it stood for, and may stand for again, by number."""
    is_pinned: bool = False


@dataclass(frozen=True)
class ShownVersion:
    """A version as it is now."""

    version: AdapterVersion
    is_current: bool
    num_requests: int
    tier: Tier
    """Where its content is, beside the device."""
    standing: Standing


@dataclass(frozen=True)
class ShownName:
    """A name as it is now, its newest version first."""

    name: str
    is_pinned: bool
    is_found: bool
    """It was looked up for a request, and may be again."""
    versions: tuple[ShownVersion, ...]
