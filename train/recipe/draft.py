"""What a recipe knows of objective draft: its knobs, and its entry. `model` is the drafter, small; the teacher is who
it will draft for.

The teacher goes by the words of TRL and ms-swift, the two losses by axolotl's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

from pydantic import Field

from train.recipe.objective import ObjectiveConfig, ObjectiveEntry


class DraftConfig(ObjectiveConfig):
    """A small model learns to guess what another one, with its adapter or without, will say next: from answers that
    the other one gives. Kim and Rush 2016, arXiv 1606.07947; Zhou et al. 2023, arXiv 2310.08461."""

    places: ClassVar[frozenset[str]] = frozenset({"teacher_model", "teacher_adapter_path"})

    teacher_model: str
    """Who is drafted for, a folder or a hub name. Its tokenizer must be the drafter's; prompts are rendered by its
    chat template."""
    teacher_adapter_path: str | None = None
    """The adapter that it answers with. Nothing: the base alone."""
    num_generations: int = Field(default=1, ge=1)
    """Answers to each prompt, in one batch. `batch_size` counts answers, so it is a multiple of this."""
    max_completion_length: int = Field(default=256, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the teacher's answers and of the probabilities that are learned: that at which it is served. 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of probability that the answers are drawn from."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Batches after which the teacher answers anew, by other draws. Nothing: it answers each prompt once, and the run
    comes back to those answers."""
    kd_ce_alpha: float = Field(default=1.0, ge=0)
    """Weight of the cross entropy of the teacher's tokens."""
    kd_alpha: float = Field(default=0.0, ge=0)
    """Weight of the forward KL divergence, KL(teacher ‖ drafter). Above 0 the teacher runs a forward of every batch,
    and stays in memory."""

    @property
    def teacher(self) -> tuple[str, str | None]:
        """(model, adapter) that answer, where it is not the model that trains."""
        return self.teacher_model, self.teacher_adapter_path

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """A batch holds whole prompts' answers, its prompts are found again, and something is learned."""
        if any(entry.streaming for entry in recipe.datasets):
            yield "objective", "draft comes back to its prompts by number, which a stream does not keep"
        if recipe.batch_size % self.num_generations:
            yield (
                "batch_size",
                f"found {recipe.batch_size}; it counts answers, {self.num_generations} to a prompt: expected a "
                f"multiple of draft.num_generations",
            )
        if self.kd_alpha == self.kd_ce_alpha == 0:
            yield "draft.kd_ce_alpha", "found 0 beside kd_alpha: 0; nothing would be learned"
        if self.temperature == 0 and self.top_p < 1:
            yield "draft.top_p", "has no effect with temperature: 0, which is greedy; leave it out"

    def beside(self, locate: Callable[[str], str]) -> Self:
        found = {name: locate(value) for name in sorted(self.places) if (value := getattr(self, name))}
        return self.model_copy(update=found)


ENTRY = ObjectiveEntry(
    "to guess what another model answers",
    ("prompt",),
    "train.objectives.draft:build",
    DraftConfig,
    ("acceptance/coupled", "acceptance/greedy", "accepted_of_4/coupled", "accepted_of_4/greedy"),
    shown="acceptance/coupled",
    answers_anew=True,
)
