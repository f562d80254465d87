"""Every kind of update in one batch: LoRA, DoRA, experts, the head, and rows of the base."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import QWEN3

from serve.adapters.bank.bank import Bank, BankedLinear
from serve.adapters.bank.costs import ON_CPU
from serve.adapters.bank.group import LinearGroup
from serve.adapters.bank.slots import RowSlots
from serve.adapters.bank.stack import Stack
from serve.adapters.fitting.fit import balanced
from serve.adapters.fitting.update import LowRank
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.errors import AdapterError
from serve.model.loading import load

MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
EXPERTS = ("mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj")
KINDS = {
    "lora": ("lora", ATTENTION, 4),
    "dora": ("dora", (*ATTENTION, "lm_head"), 3),
    "experts": ("lora", (*EXPERTS, "mlp.gate"), 5),
    "head": ("lora", ("lm_head",), 2),
}
SCALE = 2.0
TEXTS = ("hello", "the quick brown fox jumps over the lazy dog " * 3, "tickets!")


@pytest.fixture(scope="module")
def moe_folder(make_model) -> Path:
    return make_model("lively-moe", MOE)


@pytest.fixture(scope="module")
def weights(moe_folder) -> dict[str, np.ndarray]:
    return {
        name: np.array(value, np.float64)
        for name, value in tree_flatten(load(str(moe_folder)).network.module.parameters())
    }


@pytest.fixture(scope="module")
def make_kind(weights, tmp_path_factory):
    """make_kind(name) → folder of a random adapter of that kind, in mlx-lm's names and layouts."""
    root = tmp_path_factory.mktemp("kinds")

    def make(name: str) -> Path:
        kind, keys, rank = KINDS[name]
        rng = np.random.default_rng(sorted(KINDS).index(name))
        tensors = {}
        for path in (name.removesuffix(".weight") for name in weights):
            if path.split(".", 3)[-1] in keys:
                *experts, outputs, inputs = weights[f"{path}.weight"].shape
                a = (*experts, rank, inputs) if experts else (inputs, rank)
                b = (*experts, outputs, rank) if experts else (rank, outputs)
                tensors[f"{path}.lora_a"] = mx.array(rng.normal(size=a) * 0.3, dtype=mx.float32)
                tensors[f"{path}.lora_b"] = mx.array(rng.normal(size=b) * 0.3, dtype=mx.float32)
                if kind == "dora":
                    lengths = np.linalg.norm(weights[f"{path}.weight"], axis=1)
                    tensors[f"{path}.m"] = mx.array(
                        lengths * rng.uniform(0.7, 1.5, outputs), dtype=mx.float32
                    )
        write_adapter(root / name, tensors, AdapterConfig(kind, -1, rank, SCALE, keys=keys))
        return root / name

    return make


def merged_by_hand(moe_folder, weights, folder):
    """The definition in numpy: W + s·BA, of DoRA each row made as long as m says."""
    module = load(str(moe_folder)).network.module
    tensors = {name: np.array(value, np.float64) for name, value in read_tensors(folder).items()}
    for path in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        delta = b @ a if a.ndim == 3 else (a @ b).T
        weight = weights[f"{path}.weight"] + SCALE * delta
        if f"{path}.m" in tensors:
            weight *= (tensors[f"{path}.m"] / np.linalg.norm(weight, axis=1))[:, None]
        module.load_weights([(f"{path}.weight", mx.array(weight, dtype=mx.float32))], strict=False)
    return module


def stacks_of(bank: Bank) -> list[Stack]:
    """All stacks there are."""
    groups = dict.fromkeys(bank._groups.values())
    return [s for g in groups for s in (g.stacks.values() if isinstance(g, LinearGroup) else [g.stack])]


@pytest.mark.parametrize("is_in_parts", [False, True], ids=["at once", "in parts"])
def test_rows_of_every_kind_in_one_batch_match_each_merged_and_alone(
    moe_folder, weights, make_kind, make_request, assert_drawn, is_in_parts
):
    engine = Engine(load(str(moe_folder)), EngineLimits(prefill_chunk_tokens=64))
    if is_in_parts:
        engine.bank.bytes_at_once = 1
    versions = {name: engine.registry.load(name, make_kind(name)) for name in KINDS}
    requests = {
        (name, i): make_request(f"{name}-{i}", text, adapter=versions.get(name))
        for i, text in enumerate(TEXTS)
        for name in (*KINDS, "base")
    }
    answers = generate(engine, list(requests.values()))
    assert len({answer.token_ids for answer in answers}) == len(answers), "every adapter changes the text"
    modules = {name: merged_by_hand(moe_folder, weights, make_kind(name)) for name in KINDS}
    modules["base"] = load(str(moe_folder)).network.module
    for (name, i), answer in zip(requests, answers, strict=True):
        assert_drawn(requests[name, i], answer.token_ids, modules[name])


def test_a_batch_reads_only_what_its_own_adapters_touch(moe_folder, make_kind, make_request):
    """Arrays a batch has no use for are made NaN: whoever read them would say so."""

    def answer(engine, version):
        request = make_request("r", "the quick brown fox " * 3, adapter=version, num_logprobs=0)
        return [event.logprob for event in generate(engine, [request])[0].logprobs]

    engine = Engine(load(str(moe_folder)), EngineLimits(prefix_cache_bytes=0))  # all is computed each time
    lora = engine.registry.load("lora", make_kind("lora"))
    before, base = answer(engine, lora), answer(engine, None)
    for name in ("dora", "experts", "head"):
        engine.registry.load(name, make_kind(name))
    spoiled = [
        stack for stack in stacks_of(engine.bank) if engine.registry.slot_of(lora) not in stack.entries
    ]
    assert len(spoiled) > 10
    for stack in spoiled:
        stack.arrays = [array + mx.nan for array in stack.arrays]
    engine.bank.rows.forget()
    assert answer(engine, lora) == before
    assert answer(engine, None) == base


def test_a_slot_used_again_keeps_no_length_or_expert_of_the_last_adapter(
    moe_folder, weights, make_kind, make_request, assert_drawn
):
    engine = Engine(load(str(moe_folder)), EngineLimits(max_adapters=2))
    # What it touches is computed for every row beside it, also for slots that should hold zeros there.
    beside = make_request("beside", adapter=engine.registry.load("beside", make_kind("dora")))
    for name in ("dora", "experts", "lora", "head"):
        request = make_request(name, adapter=engine.registry.load(name, make_kind(name)))
        answer = generate(engine, [request, beside])[0].token_ids
        assert_drawn(request, answer, merged_by_hand(moe_folder, weights, make_kind(name)))
        engine.registry.unload(name)


def test_an_adapter_in_a_place_that_had_lengths_has_none_beside_one_that_has(
    moe_folder, make_kind, make_request
):
    alone = Engine(load(str(moe_folder)))
    version = alone.registry.load("head", make_kind("head"))
    expected = generate(alone, [make_request("r", adapter=version)])[0].token_ids
    engine = Engine(load(str(moe_folder)))
    for name in ("first", "second"):
        engine.registry.load(name, make_kind("dora"))
    engine.registry.unload(
        "first"
    )  # the head's rank is lower: it takes the first one's entry, and no array grows
    versions = engine.registry.load("head", make_kind("head")), engine.registry.resolve("second")
    answers = generate(engine, [make_request(v.id, adapter=v) for v in versions])
    assert answers[0].token_ids == expected


def test_what_does_not_fit_is_named(moe_folder, make_kind, tmp_path):
    registry = Engine(load(str(moe_folder))).registry
    tensors = read_tensors(make_kind("dora"))
    path = "model.layers.0.self_attn.q_proj"
    broken = {key: value for key, value in tensors.items() if key != f"{path}.m"}
    broken["model.layers.1.self_attn.q_proj.m"] = mx.ones((7,))
    write_adapter(tmp_path / "a", broken, read_config(make_kind("dora")))
    with pytest.raises(AdapterError, match=r"q_proj: m is missing") as caught:
        registry.load("a", tmp_path / "a")
    assert "layers.1.self_attn.q_proj.m is (7,), the model needs (64)" in str(caught.value)
    write_adapter(tmp_path / "b", tensors, AdapterConfig("lora", -1, 3, SCALE))
    with pytest.raises(AdapterError, match=r"has m; a lora adapter has lora_a, lora_b"):
        registry.load("b", tmp_path / "b")
    experts = read_tensors(make_kind("experts"))
    name = "model.layers.0.mlp.switch_mlp.up_proj.lora_a"
    experts[name] = experts[name][:3]
    write_adapter(tmp_path / "c", experts, read_config(make_kind("experts")))
    with pytest.raises(AdapterError, match=r"up_proj\.lora_a is \(3, 5, 64\), the model needs \(4, 5, 64\)"):
        registry.load("c", tmp_path / "c")


def test_balanced_factors_keep_a_small_difference_of_large_ones_in_half_precision():
    rng = np.random.default_rng(0)
    a0, b0 = rng.normal(size=(3, 64, 4)), rng.normal(size=(3, 4, 48))
    a1, b1 = a0 + 1e-3 * rng.normal(size=a0.shape), b0 + 1e-3 * rng.normal(size=b0.shape)
    wanted = a1 @ b1 - a0 @ b0
    a = mx.array(np.concatenate([a1, a0], -1), dtype=mx.float32)
    b = mx.array(np.concatenate([b1, -b0], -2), dtype=mx.float32)

    def error(a, b):
        half = (np.array(part.astype(mx.bfloat16).astype(mx.float32), np.float64) for part in (a, b))
        left, right = half
        return np.linalg.norm(left @ right - wanted) / np.linalg.norm(wanted)

    assert error(a, b) > 0.5
    assert error(*balanced(a, b)) < 0.01


def test_warming_up_runs_on_any_dtype_and_leaves_nothing_behind(model_folder):
    for dtype in ("float32", "bfloat16"):
        engine = Engine(load(str(model_folder), dtype=dtype))
        costs = engine.bank.rows.costs
        engine.bank.warm_up(9)
        assert engine.bank.num_bytes == 0
        assert engine.bank.rows.costs is costs, "only who measures chooses by what was measured"
        assert not [m for _, m in engine.model.network.module.named_modules() if isinstance(m, BankedLinear)]


def tied(make_model, family: str, **more: object) -> Path:
    config = {key: value for key, value in MOE.items() if "expert" not in key and key != "mlp_only_layers"}
    return make_model(f"tied-{family}", {**config, **more, "model_type": family, "tie_word_embeddings": True})


def test_an_update_of_a_tied_head_is_the_heads_and_no_embeddings(make_model):
    network = load(str(tied(make_model, "qwen3"))).network
    tokens = mx.array([[1, 2, 3], [1, 2, 3]])
    hidden = network.hidden(tokens)
    before = network.logits(hidden)
    bank = Bank(network)
    a, b, bias = mx.random.normal((64, 4)), mx.random.normal((4, 259)), mx.random.normal((259,))
    bank.install(1, {"lm_head": LowRank(a, b, None, bias)})
    bank.rows.set([0, 1])
    assert mx.array_equal(network.hidden(tokens), hidden)
    found = network.logits(hidden)
    assert mx.allclose(found[0], before[0], atol=1e-4)
    assert mx.allclose(found[1], before[1] + hidden[1] @ a @ b + bias, atol=1e-3)
    assert mx.abs(found[1] - before[1]).max() > 1
    bank.leave(1)
    bank.tidy()
    bank.rows.set([0, 1])
    assert mx.allclose(network.logits(hidden), before, atol=1e-4)


def test_a_family_that_multiplies_by_its_embeddings_itself_refuses_an_update_of_them(make_model):
    network = load(str(tied(make_model, "seed_oss", attention_bias=False))).network
    bank = Bank(network)
    hidden = network.hidden(mx.array([[1, 2, 3]]))
    before = network.logits(hidden)
    with pytest.raises(AdapterError, match=r"lm_head: .*seed_oss multiplies by its embeddings"):
        bank.install(1, {"lm_head": LowRank(mx.zeros((64, 4)), mx.zeros((4, 259)))})
    assert mx.array_equal(network.logits(hidden), before)
    bank.leave(1)
    bank.tidy()
    assert bank.num_bytes == 0


def test_rows_of_the_base_stay_so_when_the_same_rows_run_more_tokens_than_before(model_folder, make_adapter):
    """How many rows are taken together hangs on their tokens, and so does where a row of none is looked for."""
    model, alone = load(str(model_folder)), load(str(model_folder)).network
    engine = Engine(model)
    slot = engine.registry.slot_of(engine.registry.load("a", make_adapter(1)))
    for num_rows in (4, 6, 10, 20):
        engine.bank.rows.set([0, slot] * num_rows)
        for num_tokens in (1, 2, 5, 1, 40, 3):
            tokens = mx.random.randint(3, 250, (2 * num_rows, num_tokens))
            found, wanted = model.network.hidden(tokens), alone.hidden(tokens)
            apart = mx.abs(found - wanted).max(axis=(1, 2))
            assert apart[::2].max().item() < 1e-4, f"{num_rows} rows of each, {num_tokens} tokens"
            assert apart[1::2].min().item() > 0.1


@pytest.mark.parametrize("num_tokens", [1, 3, 80])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
def test_products_that_begin_with_updates_are_the_products_plus_them(num_tokens, has_bias):
    rng = np.random.default_rng(num_tokens)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape), dtype=mx.float32)

    layers = {
        name: nn.Linear(24, outputs, bias=has_bias) for name, outputs in (("q_proj", 32), ("k_proj", 16))
    }
    group = LinearGroup(layers, mx.float32)
    updates = [
        {
            name: LowRank(a=draw(24, rank), b=draw(rank, linear.weight.shape[0]))
            for name, linear in layers.items()
        }
        for rank in (4, 16)
    ]
    for slot, update in enumerate(updates, start=1):
        group.install(slot, update)
    rows = RowSlots(ON_CPU)
    slots = [0, 2, 1, 0, 2, 1, 1]
    rows.set(slots)
    x = draw(len(slots), num_tokens, 24)
    for index, (name, linear) in enumerate(layers.items()):
        y = np.array(BankedLinear(linear, rows, group, index)(x))
        own = np.array(linear(x))
        for row, slot in enumerate(slots):
            if slot == 0:
                np.testing.assert_array_equal(y[row], own[row])
                continue
            update = updates[slot - 1][name]
            added = (
                np.array(x[row], np.float64) @ np.array(update.a, np.float64) @ np.array(update.b, np.float64)
            )
            np.testing.assert_allclose(y[row], own[row] + added, rtol=1e-4, atol=1e-4)
    (plan,) = rows.composition.plans[group].values()
    assert plan._x is None, "the input is let go after the last layer that reads it"
