"""One loaded version of an adapter: its name, number, content hash and slot in the bank. No arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the scheduler plans with versions, and imports no mlx
    from serve.model.template import ChatTemplate


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
    stop_ids: tuple[int, ...] = ()
    """Tokens that end its answers, besides the base's own."""
    effect_hash: str = ""
    """Of its tensors and of all that says what they do (kind, scale): two versions with one compute the same."""
    tower_hash: str = ""
    """The same of what it does outside the language part: two versions with one make the same features of a picture;
    "" where it leaves towers and projectors alone."""
    template: ChatTemplate | None = field(default=None, compare=False, repr=False)
    """Its own chat template, or the base's with variables of its own; None: the base's."""

    @property
    def id(self) -> str:
        """How a request may ask for exactly this version, and how responses name it."""
        return f"{self.name}@{self.number}"
