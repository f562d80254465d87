"""A server's configuration in, its drafters out, by the names by which requests choose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.draft.lookup import BYTES_PER_TOKEN, REMEMBERED_TOKENS, LookupDrafter
from serve.draft.lookup import NAME as NGRAM
from serve.draft.make_heads import heads_of, own_heads_of
from serve.draft.model import DraftModel
from serve.drafter_config import DrafterConfig, HeadsDrafter, ModelDrafter, NgramDrafter
from serve.engine.drafts import Drafter
from serve.engine.limits import EngineLimits, MemoryBudget
from serve.model.loading import LoadedModel, load

MEMORY_SHARE = 1 / 8
"""Of the memory for rows and prefixes, what a draft model has for its own where nobody says."""
TEXTS_SHARE = 1 / 64
"""Of it, at most so much for earlier answers."""


@dataclass(frozen=True)
class Drafters:
    """What an engine is given."""

    by_name: Mapping[str, Drafter] = field(default_factory=dict)
    default: str | None = None
    """Of requests that name none; None: nobody guesses for those."""


def make_drafters(config: DrafterConfig, model: LoadedModel, limits: EngineLimits) -> Drafters:
    """Looking texts up costs nothing until it is asked for, so that one is always there.

    model   whose tokens are guessed
    limits  of the engine that they are for
    Raises ConfigError, ModelError, or AdapterError.
    """
    ngram = config if isinstance(config, NgramDrafter) else NgramDrafter.model_validate({})
    remembered_tokens = ngram.remembered_tokens
    if remembered_tokens is None:
        remembered_tokens = min(
            REMEMBERED_TOKENS, int(MemoryBudget.of(limits).kv * TEXTS_SHARE) // BYTES_PER_TOKEN
        )
    drafters: dict[str, Drafter] = {
        NGRAM: LookupDrafter(
            max_tokens=ngram.max_tokens, min_match=ngram.min_match, remembered_tokens=remembered_tokens
        )
    }
    if isinstance(config, ModelDrafter | HeadsDrafter):
        drafters[config.kind] = _made(config, model, limits)
    return Drafters(drafters, config.kind if config.kind in drafters else None)


def _made(config: ModelDrafter | HeadsDrafter, model: LoadedModel, limits: EngineLimits) -> Drafter:
    if isinstance(config, HeadsDrafter):
        if config.model is None:
            return own_heads_of(model, config.max_tokens)
        return heads_of(config.model, model, config.max_tokens)
    if config.memory_gib is None:
        max_bytes = int(MemoryBudget.of(limits).kv * MEMORY_SHARE)
    else:
        max_bytes = int(config.memory_gib * 2**30)
    return DraftModel(
        load(config.model, name=config.model),
        model,
        max_bytes=max_bytes,
        max_rows=limits.max_rows,
        max_tokens=config.max_tokens,
        adapters=config.adapters,
        guesses=config.guesses,
    )
