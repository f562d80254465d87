"""What a recipe, and the rest of training, knows of an objective: its entry, and its block of knobs.

The loss itself is named here and imported by whoever trains, so that a recipe is read without mlx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from serve.settings import Strict
from train.recipe.kinds import Kind


class ObjectiveConfig(Strict):
    """A recipe's block of one objective."""

    places: ClassVar[frozenset[str]] = frozenset()
    """Knobs that say where something is, which a run knows by a hash."""

    @property
    def has_reference(self) -> bool:
        """True where the objective measures against the model that the run starts from."""
        return False

    @property
    def without_reference(self) -> str:
        """How to do without one, where that is possible; for a message."""
        return ""

    @property
    def teacher(self) -> tuple[str, str | None] | None:
        """(model, adapter or None) that answer the prompts; None: the model that trains."""
        return None

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) of the recipe's other keys, where they do not agree with this objective."""
        yield from ()

    def beside(self, locate: Callable[[str], str]) -> Self:
        """The same, with the paths it names as `locate` finds them: relative to the recipe, where they are there."""
        return self

    @classmethod
    def required(cls) -> tuple[str, ...]:
        """Knobs that have no default; a recipe of the objective cannot do without the block then."""
        return tuple(name for name, field in cls.model_fields.items() if field.is_required())


@dataclass(frozen=True)
class ObjectiveEntry:
    """All there is to know of an objective but its arithmetic."""

    learns: str
    """What is learned, in words."""
    kinds: tuple[Kind, ...]
    """Kinds of rows it can use, in the order in which `type: auto` looks; mlx-lm's where it has one."""
    builder: str
    """`module:function` → the function (recipe, reference) → Objective."""
    config: type[ObjectiveConfig] | None = None
    """The block of its name in a recipe; None: it has no knobs."""
    measures: tuple[str, ...] = ()
    """Of its validations, those that tell which weights are best; more is better."""
    shown: str = "loss"
    """Of its validations, what a person asks for first: the loss, which should fall, or one of `measures`."""
    splits_by: Literal["row", "pair"] | None = "row"
    """What a forward may hold alone: a row; a pair, whose answers are two rows; None: only the whole batch."""
    is_supervised: bool = False
    """Whether its loss counts just the tokens that the recipe marks, in packed rows too; others weigh answers."""

    answers_anew: bool = False
    """Whether rows may have answers, which are left out: their prompts are answered anew."""

    @property
    def asks(self) -> bool:
        """Whether its rows are prompts, to be answered."""
        return "prompt" in self.kinds


PAIR_MEASURES = ("rewards/accuracies", "rewards/margins")
"""Of objectives that learn from preferences."""
