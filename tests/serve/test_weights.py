"""Every module of a model by its path, found as MLX finds them."""

from __future__ import annotations

import pytest

from serve.adapters.bank.bank import Bank
from serve.adapters.fitting.update import LowRank
from serve.model.loading import load
from serve.model.weights import linear_modules, linear_shape, named_modules

import mlx.core as mx  # isort: skip


@pytest.mark.parametrize("kind", ["full", "sliding", "hybrid"])
def test_modules_and_their_order_are_mlxs_own_also_under_a_bank(kind, lively):
    network = load(str(lively.folder(kind))).network
    module = network.module
    before = dict(module.named_modules())
    assert list(named_modules(module).items()) == list(module.named_modules())
    path, linear = next(iter(linear_modules(module).items()))
    inputs, outputs = linear_shape(linear)
    Bank(network).install(1, {path: LowRank(mx.ones((inputs, 2)), mx.ones((2, outputs)))})
    assert dict(module.named_modules()) != before, "a layer is wrapped"
    assert list(named_modules(module).items()) == list(module.named_modules())
