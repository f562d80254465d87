"""The model that a run must stay near to, without a second copy of it: the same one, its adapter off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from mlx.utils import tree_map

from serve.model.network import Network
from train.adapters.adapt import adapters_off

Reference = Callable[[Network], AbstractContextManager[None]]
"""Inside, the network computes what the reference computes; outside, it is as before. No array is evaluated."""


def base(network: Network) -> AbstractContextManager[None]:
    """The base model: every adapter off, and its dropout with it."""
    return adapters_off(network)


def start_of(network: Network) -> Reference:
    """The network as it is now, adapter included: for a run that starts from an adapter's weights.

    Keeps the adapter's tensors, which training replaces and never writes to; the base is shared.
    """
    start = tree_map(lambda tensor: tensor, network.module.trainable_parameters())

    @contextmanager
    def reference(network: Network) -> Iterator[None]:
        module = network.module
        now, was_training = module.trainable_parameters(), module.training
        module.update(start)
        module.eval()  # a reference knows no dropout
        try:
            yield
        finally:
            module.update(now)
            module.train(was_training)

    return reference
