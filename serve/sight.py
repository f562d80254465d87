"""How a server looks at what requests show: its model's own processor, what it may read, and how finely. No HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from serve.config import ServeConfig
from serve.errors import ModelError
from serve.media.processor import MediaProcessor, Tower, load_processor
from serve.media.settings import MediaSettings
from serve.media.sources import Sources
from serve.model.loading import LoadedModel
from serve.model.prompt import MediaKind


@dataclass(frozen=True)
class Sight:
    """What pictures, clips and sounds go through on their way to a prompt.

    settings  where a request says nothing
    """

    processor: MediaProcessor
    sources: Sources
    settings: MediaSettings


@dataclass(frozen=True)
class Blind:
    """A model that reads text alone."""

    reason: str = ""
    """Of one that has towers all the same."""


def sight_of(model: LoadedModel, config: ServeConfig) -> Sight | Blind:
    """What a model sees with, as the server is told. One whose processor cannot be used reads text alone."""
    if model.vision is None:
        return Blind()
    try:
        processor = MediaProcessor(model.path, load_processor(model.path), cast(Tower, model.vision))
    except ModelError as error:
        return Blind(str(error))
    return Sight(processor, Sources(config.media_limits.build(), config.media_roots), config.media.build())


def kinds_of(sight: Sight | Blind) -> frozenset[MediaKind]:
    """What may be shown."""
    return sight.processor.kinds if isinstance(sight, Sight) else frozenset()
