"""The oracle: one request at a time, in mlx-lm's own loop over the family's own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from serve.adapters.lora import LoRALinear
from serve.adapters.manifest import read_config, read_tensors
from serve.model.loading import load


def _greedy(module: nn.Module, prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    cache, tokens, out = make_prompt_cache(module), mx.array([prompt]), []
    for _ in range(num_tokens):
        drawn = mx.argmax(module(tokens, cache=cache)[:, -1], axis=-1)
        out.append(drawn.item())
        tokens = drawn[None]
    return tuple(out)


def _merged(model_folder: Path, adapter_folder: Path) -> nn.Module:
    module = load(str(model_folder)).network.module
    config, tensors = read_config(adapter_folder), read_tensors(adapter_folder)
    for path in {key.rpartition(".")[0] for key in tensors}:
        parent = module
        *parts, name = path.split(".")
        for part in parts:
            parent = parent[int(part)] if part.isdigit() else parent[part]
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        parent[name] = LoRALinear(parent[name], a, b, config.scale).fuse()
    return module


@pytest.fixture(scope="session")
def greedy_by_mlx_lm() -> Callable[[nn.Module, Sequence[int], int], tuple[int, ...]]:
    """greedy_by_mlx_lm(module, prompt, num_tokens) → tokens of the plain loop."""
    return _greedy


@pytest.fixture(scope="session")
def merged() -> Callable[[Path, Path], nn.Module]:
    """merged(model_folder, adapter_folder) → the base with one adapter fused into its weights."""
    return _merged
