"""Every form of an update is the same product: generated ranks, targets and batches, against one row at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from serve import device
from serve.adapters.bank import fused
from serve.adapters.bank.bank import Bank
from serve.adapters.bank.costs import ON_CPU, measure
from serve.adapters.bank.slots import Composition, One, Share
from serve.adapters.fitting.update import LowRank
from serve.bench.mixtures import BY_ROWS, BY_TILES
from serve.model.loading import load
from serve.model.network import Network
from serve.model.weights import linear_modules, linear_shape

COSTS = {"by rows": BY_ROWS, "by tiles": BY_TILES, "as on a CPU": ON_CPU, "by kernels": BY_ROWS}
FORMS = {
    "by rows": {"rows", "one"},
    "by tiles": {"tiles", "one"},
    "as on a CPU": {"one"},
    "by kernels": {"rows", "one"},
}
"""What each is to use at least: of kernels, for rows of many tokens."""
BLOCK = "model.layers.1"
ERROR = {mx.float32: 1e-4, mx.bfloat16: 4e-2}
"""Allowed, relative to the largest output: a wrong entry or place is of the size of the outputs themselves."""
if device.backend() != "cpu":  # its gathered products may be of TF32 whatever is asked for
    ERROR[mx.float32] = 4e-3


@pytest.fixture(params=[mx.float32, mx.bfloat16], ids=str)
def network(request, model_folder) -> Network:
    return load(str(model_folder), dtype=str(request.param).rpartition(".")[2]).network


def layers_of(network: Network) -> dict:
    return {path: layer for path, layer in linear_modules(network.module).items() if path.startswith(BLOCK)}


@pytest.fixture(autouse=True)
def kernels(request, monkeypatch) -> None:
    """Kernels run for those tests that say so, on CUDA themselves and elsewhere as what they stand for."""
    params = getattr(request.node, "callspec", None)
    if params is None or params.params.get("choice") != "by kernels":
        monkeypatch.setattr(fused, "takes", lambda *_: False)
    elif device.backend() != "cuda":
        monkeypatch.setattr(fused, "device", SimpleNamespace(backend=lambda: "cuda"))
        monkeypatch.setattr(fused, "updated", stands_for)


def stands_for(
    y: mx.array, x: mx.array, a: mx.array, b: mx.array, entries: mx.array, where: mx.array
) -> mx.array:
    """What the kernel does, a token at a time."""
    outputs, (start, num_tokens) = b.shape[-1], where.tolist()
    found = np.array(y.reshape(-1, outputs).astype(mx.float32))
    tokens = np.array(x.reshape(-1, x.shape[-1]).astype(mx.float32))
    for number, token in enumerate(tokens):
        entry = entries[number // num_tokens].item()
        if entry:
            columns = a[entry][:, start : start + b.shape[1]].astype(mx.float32)
            found[number] += token @ np.array(columns) @ np.array(b[entry].astype(mx.float32))
    return mx.array(found).astype(y.dtype).reshape(y.shape)


def made_up(rng: random.Random, network: Network) -> dict[str, LowRank]:
    """An adapter of some of the block's layers, each of its own kind and rank."""
    updates = {}
    layers = layers_of(network)
    names = rng.sample(sorted(layers), rng.randint(1, len(layers)))
    common = rng.choice([1, 4, 8, 16])
    for path in names:
        inputs, outputs = linear_shape(layers[path])
        kind = rng.choice(["low", "low", "low", "gain", "dense"])
        rank = rng.choice([common, common, rng.randint(1, 70)])
        size = (inputs * rank) ** -0.5

        def normal(*shape: int, size: float = 1.0) -> mx.array:
            return mx.array(
                np.random.default_rng(rng.getrandbits(32)).normal(size=shape) * size, dtype=mx.float32
            )

        bias = normal(outputs) if rng.random() < 0.3 else None
        if kind == "dense":
            updates[path] = LowRank(None, normal(inputs, outputs, size=inputs**-0.5), None, bias)
        else:
            gain = normal(outputs, size=0.3) if kind == "gain" else None
            updates[path] = LowRank(
                normal(inputs, rank, size=size * rank**0.5),
                normal(rank, outputs, size=rank**-0.5),
                gain,
                bias,
            )
    return updates


def expected(layer, x: mx.array, updates: Sequence[LowRank | None]) -> np.ndarray:
    """The definition, a row at a time, in double precision."""
    rows = np.array(layer(x).astype(mx.float32), np.float64)
    own = np.array(layer.bias.astype(mx.float32), np.float64) if "bias" in layer else 0.0
    inputs = np.array(x.astype(mx.float32), np.float64)
    dtype = x.dtype

    def stored(array: mx.array) -> np.ndarray:
        return np.array(array.astype(dtype).astype(mx.float32), np.float64)

    for row, update in enumerate(updates):
        if update is not None:
            inner = inputs[row] if update.a is None else inputs[row] @ stored(update.a)
            delta = inner @ stored(update.b)
            gain = 0.0 if update.gain is None else stored(update.gain)
            bias = 0.0 if update.bias is None else stored(update.bias)
            rows[row] += delta + gain * (rows[row] - own + delta) + bias
    return rows


def forms_of(composition: Composition | None) -> set[str]:
    if composition is None:
        return {"base"}
    shares = composition._shares.values()
    names = {One: "one", Share: "rows"}
    return {"tiles" if isinstance(s, Share) and s.tile > 1 else names[type(s)] for s in shares}


@pytest.mark.parametrize("choice", COSTS)
def test_every_form_gives_each_row_the_update_of_its_own_adapter(choice, network):
    rng = random.Random(choice)
    bank = Bank(network, COSTS[choice])
    plain = layers_of(network)
    for layer in plain.values():
        if rng.random() < 0.5:
            layer.bias = mx.random.normal((linear_shape(layer)[1],)).astype(network.parameters_dtype())
    adapters: dict[int, dict[str, LowRank]] = {}
    seen: set[str] = set()
    slots: list[int] = []
    for turn in range(20):
        if turn < 8 or turn in (11, 14):  # the last two are asked for before they are there
            slot = len(adapters) + 1
            adapters[slot] = made_up(rng, network)
            for part in bank.parts(adapters[slot]):
                bank.install(slot, part)
        wrapped = dict(network.module.named_modules())
        if turn not in (11, 14):
            some = rng.sample(range(1, 11), rng.randint(1, 10))
            size = rng.choice([1, 3, 8, 17])
            slots = [rng.choice([*some, 0] if rng.random() < 0.7 else some[:1]) for _ in range(size)]
            slots += [9, 10] if turn in (10, 13) else []
        size = len(slots)
        num_tokens = rng.choice([1, 1, 3, 40])
        bank.rows.set(slots)
        shared = {}
        for path, layer in plain.items():
            width = linear_shape(layer)[0]
            if width not in shared or rng.random() < 0.1:
                shared[width] = mx.random.normal((size, num_tokens, width)).astype(network.parameters_dtype())
            x = shared[width]
            given = x if rng.random() < 0.8 else x.reshape(-1, width)
            found = wrapped[path](given)
            assert found.dtype == x.dtype
            assert found.shape == (*given.shape[:-1], linear_shape(layer)[1])
            wanted = expected(layer, x, [adapters.get(slot, {}).get(path) for slot in slots])
            error = np.abs(np.array(found.astype(mx.float32)).reshape(wanted.shape) - wanted)
            assert error.max() <= ERROR[x.dtype] * np.abs(wanted).max(), (path, slots, num_tokens)
        seen |= forms_of(bank.rows.composition)
    assert FORMS[choice] <= seen
    assert "rows" not in choice or "tiles" not in seen


def test_few_adapters_take_no_more_than_their_own_and_the_base_s_entry(model_folder):
    network = load(str(model_folder)).network
    bank, rng = Bank(network), random.Random(3)
    updates = made_up(rng, network)
    for slot in range(1, 30):
        bank.install(slot, updates)
        for group in dict.fromkeys(bank._groups.values()):
            for stack in group.stacks.values():
                spare = stack.num_entries - stack.first - stack.count
                assert spare == 0 if stack.first + slot < 8 else 4 * spare <= slot


@pytest.mark.parametrize("choice", COSTS)
def test_a_row_that_is_no_number_leaves_the_others_as_they_are(choice, model_folder):
    network = load(str(model_folder)).network
    bank, rng = Bank(network, COSTS[choice]), random.Random(1)
    for slot in range(1, 5):
        bank.install(slot, made_up(rng, network))
    wrapped = dict(network.module.named_modules())
    slots = [1, 2, 0, 1, 3, 0, 4, 2, 1]
    bank.rows.set(slots)
    for path, layer in layers_of(network).items():
        x = mx.random.normal((len(slots), 1, linear_shape(layer)[0]))
        for row in range(len(slots)):
            spoiled = mx.where(mx.arange(len(slots))[:, None, None] == row, mx.inf, x)
            others = [i for i in range(len(slots)) if i != row]
            assert bool(mx.all(mx.isfinite(wrapped[path](spoiled)[mx.array(others)]))), (path, row)


@pytest.mark.parametrize("seed", range(3))
def test_the_bank_tells_its_bytes_before_and_after(seed, model_folder):
    rng = random.Random(seed)
    network = load(str(model_folder)).network
    bank = Bank(network)
    there: dict[int, dict[str, LowRank]] = {}
    for slot in range(1, 40):
        if there and rng.random() < 0.4:
            gone = rng.choice(sorted(there))
            del there[gone]
            bank.leave(gone)
            while bank.tidy():
                pass
        updates = made_up(rng, network)
        sizes = {path: update.size for path, update in updates.items()}
        groups = {group: None for path, group in bank._groups.items() if path in updates}
        moved = max((group.moved_with(sizes) for group in groups), default=0)
        told = bank.peak_bytes(sizes)
        for part in bank.parts(updates):
            bank.install(slot, part)
        there[slot] = updates
        stacks = [stack for group in dict.fromkeys(bank._groups.values()) for stack in group.stacks.values()]
        assert bank.num_bytes == sum(array.nbytes for stack in stacks for array in stack.arrays)
        assert told == bank.num_bytes + moved
        own = sum(bank.slot_bytes(slot) for slot in there)
        assert own == sum(stack.entry_bytes * stack.count for stack in stacks)
        assert own >= sum(
            array.nbytes for each in there.values() for u in each.values() for array in u.arrays().values()
        )
    for slot in there:
        bank.leave(slot)
    while bank.tidy():
        pass
    assert (bank.num_bytes, bank.slots) == (0, frozenset())


def test_no_activations_are_kept_once_all_layers_that_read_them_have(model_folder):
    network = load(str(model_folder)).network
    bank, rng = Bank(network), random.Random(2)
    bank.install(1, made_up(rng, network))
    bank.rows.set([1, 0, 1])
    mx.eval(network.hidden(mx.array([[1, 2], [3, 4], [5, 6]])))
    assert bank.rows.composition is not None
    plans = [plan for each in bank.rows.composition.plans.values() for plan in each.values()]
    assert plans
    assert all(plan._x is None and not plan._inner for plan in plans)


def test_what_this_machine_takes_can_be_measured_and_moves_no_random_state():
    mx.random.seed(7)
    expected = mx.random.uniform().item()
    mx.random.seed(7)
    costs = measure(512, 512, mx.float32)
    assert mx.random.uniform().item() == expected, "an engine inside a training run changes what it draws"
    assert all(value > 0 for value in costs.product.values())
    assert sorted(costs.product) == [1, 2, 4, 8, 16, 32]
    assert costs.tile([16], 1, weight=1.0, is_placed=False) >= 1


CUDA_ONLY = pytest.mark.skipif(device.backend() != "cuda", reason="it is a CUDA kernel")


@CUDA_ONLY
@pytest.mark.cuda
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16 over float32"])
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_the_kernel_is_what_it_stands_for(dtypes, num_tokens):
    of_x, _, of_factors = dtypes.partition(" over ")
    dtype, own = getattr(mx, of_x), getattr(mx, of_factors or of_x)
    rng = random.Random(dtypes)
    for inputs, outputs, rank, others in [
        (64, 32, 8, 0),
        (1000, 8, 16, 24),
        (96, 5000, 512, 8),
        (17, 4104, 40, 0),
    ]:
        x, y = (mx.random.normal((5, num_tokens, width)).astype(dtype) for width in (inputs, outputs))
        a = (mx.random.normal((4, inputs, rank + others)) / inputs**0.5).astype(own)
        b = (mx.random.normal((4, rank, outputs)) / rank**0.5).astype(own)
        entries = mx.array([rng.randrange(4) for _ in range(5)], dtype=mx.uint32)
        where = fused.layout(others, num_tokens)
        found, wanted = (
            f(y, x, a, b, entries, where).astype(mx.float32) for f in (fused.updated, stands_for)
        )
        assert (
            mx.abs(found - wanted).max().item()
            <= {mx.float32: 1e-5}.get(dtype, 1e-2) * mx.abs(wanted).max().item()
        )
