"""A random model that says one text over and over: behind each token always comes the same one.

So a prompt that holds a part of that text holds its answer, as where an answer copies. A step of it takes what any
model's of its size does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from serve.bench import standin
from serve.bench.standin import Size

QUIET = 0.02
"""By how much what layers add to a token's vector is made smaller: the head hears the token itself."""
LEAD_TOKENS = 3
"""The last tokens of a prompt stand in its text too: by these an answer's place there is known."""


def write_walking_model(folder: Path, dtype: mx.Dtype, size: Size, seed: int = 0) -> list[int]:
    """The model's folder. Returns its text: each of these tokens follows the one before it, the first the last."""
    standin.write_model(folder, dtype, size, seed)
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    embeddings = weights["model.embed_tokens.weight"]  # [V, D]
    may_come = standin.speakable(Tokenizer.from_file(str(folder / "tokenizer.json")), len(embeddings), dtype)
    text = np.flatnonzero(np.asarray(may_come.astype(mx.float32))).tolist()
    random.Random(seed).shuffle(text)
    source = np.zeros(len(embeddings), dtype=np.int32)
    source[np.roll(text, -1)] = text
    weights["lm_head.weight"] = embeddings[mx.array(source)] * may_come[:, None]
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weights[name] = (weight * QUIET).astype(dtype)
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    return text


def copying_prompt(
    text: Sequence[int], first: int, num_tokens: int, changed: float, rng: random.Random
) -> list[int]:
    """A part of the text, a share of its tokens replaced by others, and then a few tokens from near its beginning:
    what the model says then stands in the prompt, but for what was replaced."""
    part = [text[(first + number) % len(text)] for number in range(num_tokens)]
    shown = [rng.choice(text) if rng.random() < changed else token for token in part]
    return [*shown, *part[:LEAD_TOKENS]]
