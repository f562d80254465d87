"""A tiny qwen3's configuration, which most tests' random models are of, and a server of such a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""A byte a token, and three special ones."""


@contextmanager
def running(folder: Path, **keys: Any) -> Iterator[tuple[Runtime, str]]:
    """A server of the model in `folder`, called m; its URL, without /v1."""
    runtime = Runtime.start(ServeConfig(model=str(folder), name="m", **{"max_rows": 8, **keys}))
    try:
        with serving(runtime) as url:
            yield runtime, url
    finally:
        runtime.close()
