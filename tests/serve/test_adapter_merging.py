"""Merging by PEFT's rules, PEFT itself as the oracle; measures of products against the products themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serve.adapters.tools.factors import Core, Factors, inner
from serve.adapters.tools.merging import METHODS, RANDOM, Merge, dropped, generator, largest, merge
from serve.errors import AdapterError, ConfigError

SHAPES = {"one": (24, 20), "two": (20, 12)}
RANK = 4
ALPHAS = {"first": 6.0, "second": 3.0, "third": 8.0}
COVERS = {"first": ("one", "two"), "second": ("one", "two"), "third": ("two",)}


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


def adapters(seed: int = 0, ranks: dict[str, int] | None = None) -> dict[str, dict[str, Factors]]:
    random = np.random.default_rng(seed)
    made: dict[str, dict[str, Factors]] = {}
    for name, alpha in ALPHAS.items():
        rank = (ranks or {}).get(name, RANK)
        made[name] = {
            path: Factors(
                normal(random, SHAPES[path][0], rank), normal(random, rank, SHAPES[path][1]), alpha / rank
            )
            for path in COVERS[name]
        }
    return made


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def peft_model(parts: dict[str, dict[str, Factors]]):
    torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
    peft = pytest.importorskip("peft", reason="the oracle: pip install '.[dev]'")

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(*SHAPES["one"])
            self.two = torch.nn.Linear(*SHAPES["two"])

        def forward(self, x):
            return self.two(self.one(x))

    model = None
    for name, modules in parts.items():
        rank = next(iter(modules.values())).rank
        config = peft.LoraConfig(
            r=rank, lora_alpha=ALPHAS[name], target_modules=list(modules), lora_dropout=0.0
        )
        if model is None:
            model = peft.get_peft_model(Two(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            for path, module in modules.items():
                layer = getattr(model.base_model.model, path)
                layer.lora_A[name].weight.copy_(torch.tensor(module.a.T))
                layer.lora_B[name].weight.copy_(torch.tensor(module.b.T))
    return model


def pefts(
    parts: dict[str, dict[str, Factors]], weights: list[float], method: str, **options
) -> dict[str, np.ndarray]:
    """PEFT's merged updates, whole, [D, O]."""
    model = peft_model(parts)
    names = list(parts)
    model.add_weighted_adapter(names, weights, "merged", combination_type=method, **options)
    layers = {path: getattr(model.base_model.model, path) for path in SHAPES}
    return {path: layer.get_delta_weight("merged").detach().numpy().T for path, layer in layers.items()}


WEIGHTS = ([0.7, 0.3, 1.0], [1.0, -0.5, 2.0], [0.0, 1.5, -1.0])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 1.0}),
        ("magnitude_prune", {"density": 0.3}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
    ],
)
def test_merged_updates_are_pefts(method, options, weights):
    parts = adapters()
    merged = merge(list(parts.values()), weights, Merge(method, **options), list(parts))
    theirs = {"svd_rank" if name == "rank" else name: value for name, value in options.items()}
    wanted = pefts(parts, weights, method, **theirs)
    assert merged.keys() == wanted.keys()
    for path, module in merged.items():
        assert relative_error(module.delta(), wanted[path]) < 1e-5, path
        assert module.scale == 1.0


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_parts_of_other_ranks_are_stacked_as_pefts(method):
    parts = adapters(ranks={"first": 2, "second": 5, "third": 8})
    weights = [0.5, -1.0, 0.25]
    merged = merge(list(parts.values()), weights, Merge(method), list(parts))
    wanted = pefts(parts, weights, method)
    for path, module in merged.items():
        assert relative_error(module.delta(), wanted[path]) < 1e-5
    assert merged["two"].rank == (15 if method == "cat" else 8)
    assert merged["one"].rank == 7


@pytest.mark.parametrize("method", RANDOM)
def test_dare_is_pefts_arithmetic_on_values_dropped_by_its_seed(method):
    """PEFT draws from torch, so it gets the factors with our values dropped, and drops none itself."""
    parts, weights, density = adapters(), [0.7, 0.3, 1.0], 0.6
    merged = merge(list(parts.values()), weights, Merge(method, density=density, seed=3), list(parts))
    places = {path: [name for name in parts if path in parts[name]] for path in SHAPES}
    for path, names in places.items():
        kept = {
            name: Factors(
                dropped(parts[name][path].a, density, generator(3, index, f"{path}.lora_a")),
                dropped(parts[name][path].b, density, generator(3, index, f"{path}.lora_b")),
                parts[name][path].scale,
            )
            for index, name in enumerate(names)
        }
        already = {name: {**parts[name], **({path: kept[name]} if name in kept else {})} for name in parts}
        wanted = pefts(already, weights, method, density=1.0)[path]
        assert relative_error(merged[path].delta(), wanted) < 1e-5


@pytest.mark.parametrize("method", RANDOM)
def test_dare_is_decided_by_its_seed_alone(method):
    parts = adapters()

    def merged(seed: int, names: list[str]) -> dict[str, Factors]:
        chosen = [parts[name] for name in names]
        return merge(chosen, [1.0] * len(names), Merge(method, density=0.5, seed=seed), names)

    first, again, other = (merged(seed, ["first", "second"]) for seed in (7, 7, 8))
    for path in SHAPES:
        assert np.array_equal(first[path].a, again[path].a)
        assert np.array_equal(first[path].b, again[path].b)
        assert not np.array_equal(first[path].a, other[path].a)
    alone = merge([{"one": parts["first"]["one"]}], [1.0], Merge(method, density=0.5, seed=7), ["first"])
    whole = merge([parts["first"]], [1.0], Merge(method, density=0.5, seed=7), ["first"])
    assert np.array_equal(alone["one"].a, whole["one"].a)


def test_dropped_values_keep_the_mean_and_the_share():
    tensor = np.ones((400, 300), np.float32)
    kept = dropped(tensor, 0.3, generator(0, 0, "x"))
    error = 4 * math.sqrt(0.3 * 0.7 / tensor.size)
    assert abs(np.count_nonzero(kept) / tensor.size - 0.3) < error
    assert abs(float(kept.mean()) - 1) < error / 0.3
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.3)}


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 0.999, 1.0])
def test_pruning_keeps_the_largest(density):
    tensor = np.random.default_rng(0).normal(size=(30, 20))
    kept = largest(tensor, density)
    count = int(density * tensor.size)
    assert np.count_nonzero(kept) == count
    assert np.array_equal(
        np.sort(np.abs(kept[kept != 0])), np.sort(np.abs(tensor).reshape(-1))[tensor.size - count :]
    )


def test_experts_are_merged_each_with_its_own():
    random = np.random.default_rng(1)
    parts = [
        {"experts": Factors(normal(random, 3, 10, 4), normal(random, 3, 4, 6), scale)} for scale in (0.5, 2.0)
    ]
    for method in ("cat", "svd", "linear"):
        merged = merge(parts, [1.0, -0.5], Merge(method, rank=8 if method == "svd" else None), ["a", "b"])[
            "experts"
        ]
        for expert in range(3):
            alone = [
                {
                    "expert": Factors(
                        part["experts"].a[expert], part["experts"].b[expert], part["experts"].scale
                    )
                }
                for part in parts
            ]
            wanted = merge(
                alone, [1.0, -0.5], Merge(method, rank=8 if method == "svd" else None), ["a", "b"]
            )["expert"]
            assert relative_error(merged.delta()[expert], wanted.delta()) < 1e-5


@pytest.mark.parametrize("shape", [(24, 4, 20), (6, 9, 20), (24, 9, 5), (3, 7, 2)])
def test_measures_of_a_product_are_the_products_own(shape):
    """Ranks above the dimensions too."""
    inputs, rank, outputs = shape
    random = np.random.default_rng(2)
    first, second = (
        Factors(normal(random, inputs, rank), normal(random, rank, outputs), scale) for scale in (0.5, -3.0)
    )
    whole = first.delta(), second.delta()
    assert Core.of([first]).norm == pytest.approx(np.linalg.norm(whole[0]), rel=1e-12)
    difference = Core.of([first, second.times(-1)]).norm
    assert difference == pytest.approx(np.linalg.norm(whole[0] - whole[1]), rel=1e-6)
    assert inner(first, second) == pytest.approx(float(np.sum(whole[0] * whole[1])), rel=1e-9)
    u, s, vt = np.linalg.svd(whole[0], full_matrices=False)
    for kept in range(1, len(s) + 2):
        near, left_out = Core.of([first]).truncated(kept)
        assert relative_error(near.delta(), (u[:, :kept] * s[:kept]) @ vt[:kept]) < 1e-5
        assert left_out == pytest.approx(np.linalg.norm(s[kept:]) / np.linalg.norm(s), abs=1e-6)


def test_a_difference_of_near_updates_keeps_its_digits():
    random = np.random.default_rng(3)
    first = Factors(normal(random, 64, 8), normal(random, 8, 48))
    second = Factors(first.a, first.b * np.float32(1 + 1e-6))
    wanted = np.linalg.norm(first.delta() - second.delta())
    assert wanted > 0
    assert Core.of([first, Factors(second.a, second.b, -1.0)]).norm == pytest.approx(wanted, rel=1e-3)
    assert Core.of([first, Factors(first.a, first.b, -1.0)]).norm < 1e-12 * np.linalg.norm(first.delta())


@pytest.mark.parametrize("method", METHODS)
def test_parts_that_do_not_match_are_named(method):
    parts = adapters()
    density = {"density": 0.5} if method not in ("linear", "cat", "svd") else {}
    wider = {"one": Factors(parts["first"]["one"].a[:-1], parts["first"]["one"].b)}
    with pytest.raises(AdapterError, match="one is 24 → 20 in first and 23 → 20 in wider"):
        merge([parts["first"], wider], [1, 1], Merge(method, **density), ["first", "wider"])
    lengths = {"one": Factors(parts["first"]["one"].a, parts["first"]["one"].b, 1.0, np.ones(20, np.float32))}
    with pytest.raises(AdapterError, match="one of turned is DoRA's"):
        merge([parts["first"], lengths], [1, 1], Merge(method, **density), ["first", "turned"])
    other_rank = adapters(ranks={"second": 2})["second"]
    if method in ("cat", "svd"):
        merge([parts["first"], other_rank], [1, 1], Merge(method, **density), ["first", "second"])
    else:
        with pytest.raises(AdapterError, match="one has rank 4 in first and 2 in second"):
            merge([parts["first"], other_rank], [1, 1], Merge(method, **density), ["first", "second"])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (Merge("sum"), "--method is sum"),
        (Merge("svd", rank=0), "--rank is 0"),
        (Merge("cat", rank=4), "--rank means nothing to cat"),
        (Merge("ties"), "ties needs --density"),
        (Merge("svd", density=0.5), "--density means nothing to svd"),
        (Merge("ties", density=0.0), "--density is 0"),
        (Merge("ties", density=1.5), "--density is 1.5"),
        (Merge("ties", density=math.nan), "--density is nan"),
    ],
)
def test_what_a_method_does_not_take_is_refused(how, said):
    with pytest.raises(ConfigError, match=said):
        how.check()
