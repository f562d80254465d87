"""How /v1/models tells of what makes vectors of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.embed.model import Embedder, TextModel


def text_cards(models: Mapping[str, TextModel], created: int) -> list[dict[str, Any]]:
    """One a model; `dimensions` are those of a vector."""
    return [
        {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "lathe",
            "root": str(model.path),
            "parent": None,
            "max_model_len": model.max_tokens,
            "input_modalities": ["text"],
            "task": "embed" if isinstance(model, Embedder) else "score",
            **({"dimensions": model.width} if isinstance(model, Embedder) else {}),
        }
        for model in models.values()
    ]
