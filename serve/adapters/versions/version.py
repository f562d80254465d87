"""One version of an adapter: its name, number and hashes, and what is to be known of it. No arrays, no slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the scheduler plans with versions, and imports no mlx
    from serve.adapters.fitting.update import Size
    from serve.adapters.formats.lineage import Lineage
    from serve.model.template import ChatTemplate

COMBINED = "(combined)"
"""What all combinations of adapters are counted as."""


@dataclass(frozen=True)
class AdapterVersion:
    """`name@number`, immutable. Requests hold the version they began with until they end.

    A combination of versions is named by theirs, and its number is 0.
    """

    name: str
    number: int
    content_hash: str
    path: str
    notes: tuple[str, ...] = ()
    """What whoever loaded it should know."""
    parts: tuple[str, ...] = ()
    """Of a combination: ids of the versions that it adds."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end its answers, besides the base's own."""
    effect_hash: str = ""
    """Of its tensors and of all that says what they do (kind, scale): two versions with one compute the same."""
    tower_hash: str = ""
    """The same of what it does outside the language part: two versions with one make the same features of a picture;
    "" where it leaves towers and projectors alone."""
    template: ChatTemplate | None = field(default=None, compare=False, repr=False)
    """Its own chat template, or the base's with variables of its own; None: the base's."""
    lineage: Lineage | None = field(default=None, compare=False, repr=False)
    format: str = "mlx-lm"
    """Whose layout it was read from."""
    sizes: Mapping[str, Size] = field(default_factory=dict, compare=False, repr=False)
    """What its update of each module takes in the bank."""
    num_values: int = field(default=0, compare=False)
    """Numbers in its tensors, as they lie in the file."""
    num_bytes: int = field(default=0, compare=False)
    """Of its updates, as the bank computes with them."""
    created_s: float = field(default=0.0, compare=False)
    """When it was loaded, in seconds since 1970."""

    @property
    def id(self) -> str:
        """How a request may ask for exactly this version, and how responses name it."""
        return self.name if self.is_combined else f"{self.name}@{self.number}"

    @property
    def is_combined(self) -> bool:
        """Whether it is others, weighted and added."""
        return self.number == 0

    @property
    def label(self) -> str:
        """Name without version, for metrics; one for all combinations, of which there is no end."""
        return COMBINED if self.is_combined else self.name

    @property
    def num_modules(self) -> int:
        """Layers that it adapts."""
        return len(self.sizes)

    @property
    def ranks(self) -> tuple[int, int]:
        """The lowest and the highest of its updates."""
        ranks = [size.rank for size in self.sizes.values()]
        return min(ranks, default=0), max(ranks, default=0)
