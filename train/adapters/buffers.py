"""Arrays that a model holds among its weights and that no gradient reaches: what a family means as buffers.

A router's correction bias, say, takes part in choosing experts and in nothing that is differentiated. An optimizer
would keep state for it, and its weight decay would shrink it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from serve.model.network import Network
from serve.model.weights import EXPERTS

PROBE_TOKENS = 24


def freeze_buffers(network: Network) -> tuple[str, ...]:
    """Freeze the buffers among what trains. Returns their paths.

    Looked for among arrays that the family's own modules hold by themselves: those of linear layers, embeddings,
    norms, convolutions and expert stacks are weights. A buffer has a gradient of exactly zero on a few random tokens,
    whose forward and backward pass is run for that. Leaves MLX's random state and the module's mode as they are.
    """
    module = network.module
    # No few tokens reach a tower: what is in it counts as weights.
    prefix = network.text_path if network.has_towers else ""
    owners = {
        path: child
        for path, child in module.named_modules()
        if path.startswith(prefix)
        and not type(child).__module__.startswith("mlx.nn")
        and not isinstance(child, EXPERTS)
    }
    trains = set(dict(tree_flatten(module.trainable_parameters())))
    candidates = [
        (child, path, name)
        for path, child in owners.items()
        for name, value in child.items()
        if isinstance(value, mx.array) and _joined(path, name) in trains
    ]
    if not candidates:
        return ()
    gradients = _gradients(network, candidates)
    buffers = [
        (child, path, name)
        for child, path, name in candidates
        if not mx.any(gradients[_joined(path, name)] != 0).item()
    ]
    for child, _, name in buffers:
        child.freeze(recurse=False, keys=[name])
    return tuple(sorted(_joined(path, name) for _, path, name in buffers))


def _gradients(network: Network, candidates: list[tuple[nn.Module, str, str]]) -> dict[str, mx.array]:
    """Of the squared logits of random tokens, by path, for the candidates alone."""
    tokens = mx.random.randint(0, network.vocab_size or 2, (1, PROBE_TOKENS), key=mx.random.key(0))
    arrays = {_joined(path, name): child[name] for child, path, name in candidates}

    def total(arrays: dict[str, mx.array]) -> mx.array:
        for child, path, name in candidates:
            child[name] = arrays[_joined(path, name)]
        return network.logits(network.hidden(tokens)).astype(mx.float32).square().mean()

    gradients: dict[str, mx.array] = mx.grad(total)(arrays)
    for child, path, name in candidates:
        child[name] = arrays[_joined(path, name)]
    mx.eval(gradients)
    return gradients


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
