"""The objectives there are, a line each.

A new one is its entry and knobs in a file of this folder, its loss in a file of train/objectives, and its line here.
"""

from __future__ import annotations

from collections.abc import Callable

from train.recipe import dpo, draft, grpo, kto, orpo, sft
from train.recipe.kinds import SHAPES
from train.recipe.objective import ObjectiveEntry

OBJECTIVES: dict[str, ObjectiveEntry] = {
    "sft": sft.SFT,
    "cpt": sft.CPT,
    "dpo": dpo.ENTRY,
    "orpo": orpo.ENTRY,
    "kto": kto.ENTRY,
    "grpo": grpo.ENTRY,
    "draft": draft.ENTRY,
}


def needed(objective: str) -> str:
    """What rows of an objective must hold, in words."""
    return "; or ".join(SHAPES[kind] for kind in OBJECTIVES[objective].kinds)


def objectives_of(kind: str) -> str:
    """`dpo or orpo`: the objectives that a kind of row is for."""
    return " or ".join(name for name, entry in OBJECTIVES.items() if kind in entry.kinds)


def names_where(holds: Callable[[ObjectiveEntry], bool]) -> str:
    """`sft and cpt`: the objectives for which something holds."""
    return " and ".join(name for name, entry in OBJECTIVES.items() if holds(entry))
