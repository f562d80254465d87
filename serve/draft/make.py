"""A server's configuration in, its drafters out, by the names by which requests choose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.draft.lookup import NAME as NGRAM
from serve.draft.lookup import LookupDrafter
from serve.drafter_config import DrafterConfig, HeadsDrafter, ModelDrafter, NgramDrafter
from serve.engine.drafts import Drafter
from serve.engine.limits import EngineLimits
from serve.errors import ConfigError
from serve.model.loading import LoadedModel


@dataclass(frozen=True)
class Drafters:
    """What an engine is given."""

    by_name: Mapping[str, Drafter] = field(default_factory=dict)
    default: str | None = None
    """Of requests that name none; None: nobody guesses for those."""


def make_drafters(config: DrafterConfig, model: LoadedModel, limits: EngineLimits) -> Drafters:
    """Looking texts up costs nothing until it is asked for, so that one is always there.

    model   whose tokens are guessed
    limits  of the engine that runs it, whose memory drafters share
    Raises ConfigError or ModelError.
    """
    ngram = config if isinstance(config, NgramDrafter) else NgramDrafter.model_validate({})
    drafters: dict[str, Drafter] = {
        NGRAM: LookupDrafter(
            max_tokens=ngram.max_tokens,
            min_match=ngram.min_match,
            remembered_tokens=ngram.remembered_tokens,
        )
    }
    if isinstance(config, ModelDrafter | HeadsDrafter):
        drafters[config.kind] = _made(config, model, limits)
    return Drafters(drafters, config.kind if config.kind in drafters else None)


def _made(config: ModelDrafter | HeadsDrafter, model: LoadedModel, limits: EngineLimits) -> Drafter:
    raise ConfigError(
        f"drafter.kind: this version has no {config.kind!r}, for {model.name!r} or any other model; expected "
        "ngram or none"
    )
