"""The models of a configuration that encode texts, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve.embed.config import EmbeddingModelConfig
from serve.embed.model import TextModel, load_text_model


def load_text_models(configs: Sequence[EmbeddingModelConfig]) -> Mapping[str, TextModel]:
    """All of them, in their order. NotFoundError, ModelError."""
    return {config.name: load_text_model(config) for config in configs}
