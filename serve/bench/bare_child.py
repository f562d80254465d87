"""mlx-lm's own model in a bare batched loop, in a process of its own: the same work as a server's, and nothing else.

    python -m serve.bench.bare_child MODEL

Reads a line of JSON from standard input, {"prompts": [chat message, …], "max_tokens": n}, and writes one, of arrival
times and texts, when all of these prompts have been answered in one batch. The prompts stand padded on the left in a
BatchKVCache; all but their last tokens are computed in one forward, then each step gives every row a token.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.models.cache import BatchKVCache


def answers_to(module: nn.Module, prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy tokens of every row, [B][max_tokens], and when each step had given them, in seconds after the start."""
    start_s = time.perf_counter()
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    padded = mx.array(
        [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    )  # [B, T]
    cache = [BatchKVCache(padding) for _ in module.layers]
    if longest > 1:
        module(padded[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache])
    tokens = _next(module, padded[:, -1:], cache)
    steps: list[list[int]] = []
    arrivals_s: list[float] = []
    for number in range(max_tokens):
        # A step is on its way before the one before it is read, as in mlx-lm's own generation.
        ahead = _next(module, tokens, cache) if number + 1 < max_tokens else None
        steps.append(tokens[:, 0].tolist())  # type: ignore[arg-type]
        arrivals_s.append(time.perf_counter() - start_s)
        tokens = ahead if ahead is not None else tokens
    rows = [list(row) for row in zip(*steps, strict=True)]
    return {"token_ids": rows, "arrivals_s": arrivals_s, "wall_s": time.perf_counter() - start_s}


def _next(module: nn.Module, tokens: mx.array, cache: list[BatchKVCache]) -> mx.array:
    """[B, 1] → the likeliest token behind each, [B, 1], on its way."""
    drawn = mx.argmax(module(tokens, cache=cache)[:, -1], axis=-1)[:, None]
    mx.async_eval(drawn)
    return drawn


def main(model: str) -> None:
    """Answer line by line until standard input ends."""
    module, tokenizer = load(model)[:2]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        chats = [[{"role": "user", "content": prompt}] for prompt in asked["prompts"]]
        prompts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in chats
        ]
        found = answers_to(module, prompts, asked["max_tokens"])
        texts = [tokenizer.decode(row) for row in found.pop("token_ids")]
        print(json.dumps({**found, "texts": texts, "num_prompt_tokens": list(map(len, prompts))}), flush=True)
        mx.clear_cache()


if __name__ == "__main__":
    main(sys.argv[1])
