"""What a server is told of drafters: who guesses for requests that do not say. A block of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from serve.draft.kinds import GuessKind
from serve.engine.drafts import MAX_DRAFT
from serve.settings import Strict


class NoDrafter(Strict):
    """Nobody guesses, unless a request asks for it."""

    kind: Literal["none"] = "none"


class NgramDrafter(Strict):
    """What followed a row's last tokens when they came before: in its prompt and answer, in the request's prediction,
    in earlier answers of its tenant, salt and adapter."""

    kind: Literal["ngram"] = "ngram"
    max_tokens: int = Field(MAX_DRAFT, ge=1, le=MAX_DRAFT)
    """Guesses of one step at most, and never more than tokens that agreed before them."""
    min_match: int = Field(2, ge=2, le=4)
    """So many of a row's last tokens are found again at least."""
    remembered_tokens: int | None = Field(None, ge=0)
    """Of earlier answers, of all who have asked together, 104 bytes each at most; 0: none. If left out, 262,144, or
    what a 64th of the memory for keys and values holds."""


class ModelDrafter(Strict):
    """A smaller model of the same tokenizer."""

    kind: Literal["model"]
    model: str = Field(min_length=1)
    """A local folder or a hub name."""
    adapters: dict[str, Path] = Field(default_factory=dict)
    """Folders of the draft model's own adapters, by the name of the adapter whose answers they guess."""
    max_tokens: int = Field(MAX_DRAFT, ge=1, le=MAX_DRAFT)
    """Guesses of one step at most."""
    memory_gib: float | None = Field(None, gt=0)
    """Of the memory, at most so much for the draft model's rows and prefixes, in GiB; an eighth, if left out."""
    guesses: GuessKind = "learned"
    """At a temperature: drawn by the row's own random numbers, the draft model's likeliest tokens, or whichever of
    the two come true more often, by its adapter and temperature."""


class HeadsDrafter(Strict):
    """Heads that guess from what the model itself has computed: the checkpoint's own, or a folder's."""

    kind: Literal["heads"]
    model: str | None = Field(None, min_length=1)
    """A local folder or a hub name; the checkpoint's own heads, if left out."""
    max_tokens: int = Field(MAX_DRAFT, ge=1, le=MAX_DRAFT)
    """Guesses of one step at most."""


def _spelled_out(value: Any) -> Any:
    """A kind alone is the block that says no more."""
    return {"kind": value} if isinstance(value, str) else value


DrafterConfig = Annotated[
    Annotated[NoDrafter | NgramDrafter | ModelDrafter | HeadsDrafter, Field(discriminator="kind")],
    BeforeValidator(_spelled_out),
]
"""By its `kind`; `drafter: ngram` is `drafter: {kind: ngram}`."""

ELSEWHERE = {
    "draft_model": "write drafter: {kind: model, model: …}",
    "draft_kind": "write drafter: {kind: heads, model: …}",
    "draft_block_size": "write drafter.max_tokens",
    "num_draft_tokens": "write drafter.max_tokens",
    "speculative_config": "write drafter: ngram, or drafter: {kind: model, model: …}",
    "speculative_model": "write drafter: {kind: model, model: …}",
    "num_speculative_tokens": "write drafter.max_tokens",
    "prompt_lookup_min": "write drafter.min_match",
    "prompt_lookup_max": "leave it out: as many tokens are compared as agree",
}
"""mlx-lm's, mlx-vlm's and vLLM's names, and what to write instead."""
