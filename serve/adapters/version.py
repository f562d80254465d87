"""One loaded version of an adapter: its name, number, content hash and slot in the bank. No arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterVersion:
    """`name@number`, immutable. Requests hold the version they began with until they end."""

    name: str
    number: int
    content_hash: str
    slot: int
    """Its number in the bank, never given twice."""
    path: str
    notes: tuple[str, ...] = ()
    """What whoever loaded it should know."""

    @property
    def id(self) -> str:
        """How a request may ask for exactly this version, and how responses name it."""
        return f"{self.name}@{self.number}"
