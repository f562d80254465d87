"""Laws of packing: every document once and whole, in rows no longer than needed, as if it were alone."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

from serve.errors import ConfigError, ModelError
from serve.model.packed import packed_cache, packing_problem
from train.adapters.adapt import AdapterSettings, add_lora, checkpointed_layers, train_all
from train.data.batches import BatchPlan, collate
from train.data.packing import Layout, PackedPlan, collate_packed
from train.data.tokens import TokenizedExample
from train.foresee.preflight import prepare
from train.loop import checkpoint
from train.objectives.sft import SFT
from train.recipe.recipe import load_recipe
from train.run import run

LENGTHS = (5, 11, 3, 8, 14)
PACKED_FAMILIES = ("qwen3", "llama", "gemma3_text", "gemma2", "phi3", "olmo2", "qwen3_moe")


def lognormal(count: int, spread: float = 0.8, seed: int = 0) -> list[int]:
    drawn = np.exp(np.random.default_rng(seed).normal(5, spread, count))
    return np.clip(drawn, 4, 2048).astype(int).tolist()


def documents(lengths=LENGTHS, vocab_size: int = 96) -> list[TokenizedExample]:
    rng = np.random.default_rng(1)
    return [
        TokenizedExample(
            rng.integers(1, vocab_size, length).astype(np.int32), np.arange(length) >= length // 3, "f", line
        )
        for line, length in enumerate(lengths)
    ]


# The plan.


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_each_document_stands_in_each_epoch_exactly_once(count):
    plan = PackedPlan(lognormal(count), 2, 2048, seed=3)
    for epoch in range(3):
        begin, end = plan.num_batches(epoch), plan.num_batches(epoch + 1)
        assert sorted(row for index in range(begin, end) for row in plan.rows(index)) == list(range(count))
        assert {plan.epoch(index) for index in range(begin, end)} == {epoch}


def test_half_an_epoch_is_half_of_its_batches():
    plan = PackedPlan(lognormal(3000), 2, 2048, seed=3)
    first, second = plan.num_batches(1), plan.num_batches(2)
    assert plan.num_batches(1.5) == first + -(-(second - first) // 2)
    assert plan.num_batches(1e-3) == 1


def test_any_batch_can_be_asked_for_at_any_time():
    lengths = lognormal(900)
    plan = PackedPlan(lengths, 1, 2048, seed=1)
    forward = [plan.layout(index) for index in range(200)]  # two epochs and more
    fresh = PackedPlan(lengths, 1, 2048, seed=1)
    assert [fresh.layout(index) for index in reversed(range(200))] == forward[::-1]


def test_seed_and_epoch_change_the_order():
    lengths = lognormal(500)
    plan, other = PackedPlan(lengths, 1, 2048, seed=1), PackedPlan(lengths, 1, 2048, seed=2)
    size = plan.batches_per_epoch
    first = [plan.rows(index) for index in range(size)]
    assert first != [plan.rows(index) for index in range(size, 2 * size)]
    assert first != [other.rows(index) for index in range(size)]


@pytest.mark.parametrize(("batch_size", "row_length"), [(1, 2048), (3, 2050), (16, 2048)])
def test_documents_fit_their_rows_and_batches_their_capacity(batch_size, row_length):
    lengths = lognormal(2000, 1.0)
    plan = PackedPlan(lengths, batch_size, row_length, seed=0)
    for index in range(plan.batches_per_epoch):
        layout = plan.layout(index)
        assert all(sum(lengths[row] for row in rows) <= layout.width for rows in layout.rows)
        assert layout.width <= row_length
        assert layout.num_positions <= batch_size * row_length


@pytest.mark.parametrize("spread", [0.5, 0.8, 1.0])
def test_neither_padding_nor_attention_costs_more_than_in_batches_by_length(spread):
    lengths = lognormal(4000, spread)
    plan, by_length = PackedPlan(lengths, 1, 2048, seed=0), BatchPlan(lengths, 8, seed=0)
    layouts = [plan.layout(index) for index in range(plan.batches_per_epoch)]
    shapes = [
        (len(rows), max(lengths[row] for row in rows))
        for rows in map(by_length.rows, range(by_length.batches_per_epoch))
    ]
    assert plan.padding_share < min(0.045, by_length.padding_share)
    attention = sum(layout.num_positions * layout.width for layout in layouts)
    assert attention < sum(count * longest**2 for count, longest in shapes)
    assert max(layout.num_positions for layout in layouts) < max(c * longest for c, longest in shapes) / 2


def test_batches_hold_alike_many_tokens():
    lengths = lognormal(4000)
    plan = PackedPlan(lengths, 2, 2048, seed=0)
    tokens = [sum(lengths[row] for row in plan.rows(index)) for index in range(plan.batches_per_epoch)]
    assert np.quantile(tokens, 0.02) > 0.75 * 4096
    assert sum(count < 0.5 * 4096 for count in tokens) <= 1  # the epoch's last


def test_the_largest_batch_of_an_epoch_is_known():
    plan = PackedPlan(lognormal(2000), 1, 2048, seed=0)
    layouts = [plan.layout(index) for index in range(plan.batches_per_epoch)]
    assert plan.largest.width == max(layout.width for layout in layouts)
    assert plan.largest.work == max(layout.work for layout in layouts)


def test_batches_do_not_come_in_order_of_length():
    lengths = lognormal(2000)
    plan = PackedPlan(lengths, 1, 2048, seed=0)
    widths = [plan.layout(index).width for index in range(plan.batches_per_epoch)]
    assert abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.2


def test_short_documents_share_a_row_where_that_leaves_less_padding():
    plan = PackedPlan([10] * 60, 2, 64, seed=0)
    assert plan.layout(0) == Layout(40, tuple(plan.layout(0).rows))
    assert [len(row) for row in plan.layout(0).rows] == [4] * 3
    assert plan.padding_share == 0


def test_a_row_to_each_document_needs_no_segments():
    batch = collate_packed(documents(), Layout(16, ((4,), (1,), (3,))))
    assert batch.segments is None
    assert (batch.num_tokens, batch.row_ids) == (14 + 11 + 8, (4, 1, 3))


def test_the_printed_padding_is_that_of_the_arrays():
    lengths = lognormal(300)
    plan, rows = PackedPlan(lengths, 2, 2048, seed=0), documents(lengths)
    batches = [plan.batch(rows, index) for index in range(plan.batches_per_epoch)]
    measured = 1 - sum(b.num_tokens for b in batches) / sum(b.tokens.size for b in batches)
    assert measured == pytest.approx(plan.padding_share)


def test_a_packed_batch_holds_its_documents_and_counts_them():
    rows = documents()
    batch = collate_packed(rows, Layout(16, ((4,), (1, 0), (3, 2))))
    assert batch.tokens.shape == batch.is_target.shape == batch.segments.shape == (3, 16)
    assert (batch.num_tokens, batch.row_ids) == (sum(LENGTHS), (4, 1, 0, 3, 2))
    assert batch.segments.tolist() == [
        [0] * 14 + [-1] * 2,
        [0] * 11 + [1] * 5,
        [0] * 8 + [1] * 3 + [-1] * 5,
    ]
    assert batch.tokens[1].tolist() == [*rows[1].token_ids, *rows[0].token_ids]
    assert batch.tokens[2, :11].tolist() == [*rows[3].token_ids, *rows[2].token_ids]
    assert not batch.is_target[batch.segments < 0].any()


def test_no_document_begins_with_a_target_for_its_last_neighbour_to_predict():
    rows = [TokenizedExample(np.ones(4, np.int32), np.ones(4, bool), "f", line) for line in range(3)]
    batch = collate_packed(rows, Layout(12, ((0, 1, 2),)))
    assert batch.is_target.tolist() == [[False, True, True, True] * 3]
    assert batch.num_targets == 9


# The network.


def loss_and_gradients(network, batches) -> tuple[float, dict[str, mx.array]]:
    """Of the mean over all targets of the batches, as a step computes it."""
    objective = SFT()
    prepared = [objective.prepare(batch) for batch in batches]
    total = sum(part.num_units for part in prepared)

    def mean() -> mx.array:
        return sum(objective.loss(network, part.arrays(total))[0] for part in prepared)

    loss, gradients = nn.value_and_grad(network.module, mean)()
    return loss.item(), dict(tree_flatten(gradients))


def adapted(network, fine_tune_type: str = "lora"):
    """The network with a lively adapter, or with all its weights trainable."""
    mx.random.seed(3)
    if fine_tune_type == "full":
        train_all(network)
    else:
        add_lora(network, AdapterSettings(rank=4, scale=4.0, fine_tune_type=fine_tune_type))
        for name, weight in tree_flatten(network.module.trainable_parameters()):
            if name.endswith("lora_b"):
                network.module.load_weights([(name, mx.random.normal(weight.shape) * 0.1)], strict=False)
    network.module.train()
    return network


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_logits_are_those_of_each_document_alone(family, tiny_network):
    network, rows = tiny_network(family), documents()
    batch = collate_packed(rows, Layout(48, ((4, 1, 0, 3, 2), (2, 2, 4))))
    hidden = network.hidden(mx.array(batch.tokens), packed_cache(network, mx.array(batch.segments)))
    logits = np.array(network.logits(hidden))
    for place, order in enumerate(((4, 1, 0, 3, 2), (2, 2, 4))):
        for segment, row in enumerate(order):
            alone = np.array(network.module(mx.array(rows[row].token_ids[None])))[0]
            np.testing.assert_allclose(logits[place][batch.segments[place] == segment], alone, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "fine_tune_type"),
    [*((family, "lora") for family in PACKED_FAMILIES), ("qwen3", "dora"), ("gemma2", "full")],
)
def test_packed_loss_and_gradients_are_those_of_the_same_documents_unpacked(
    family, fine_tune_type, tiny_network
):
    network, rows = adapted(tiny_network(family), fine_tune_type), documents()
    loss, gradients = loss_and_gradients(network, [collate(rows, [row]) for row in range(len(rows))])
    packed = collate_packed(rows, Layout(24, ((4, 3), (1, 0, 2))))
    packed_loss, packed_gradients = loss_and_gradients(network, [packed])
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    largest = max(mx.abs(gradient).max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(packed_gradients[name], gradient, atol=1e-4 * largest, err_msg=name)


def test_without_its_segments_a_packed_row_gives_another_loss(tiny_network):
    network, rows = tiny_network(), documents()
    objective, packed = SFT(), collate_packed(rows, Layout(48, ((4, 3, 1, 0, 2),)))
    prepared = objective.prepare(packed)
    apart = objective.loss(network, prepared.arrays(1))[0].item()
    arrays = prepared.arrays(1)
    del arrays["segments"]
    assert abs(objective.loss(network, arrays)[0].item() - apart) > 0.1


def test_padding_never_reaches_a_document(tiny_network):
    network, rows = adapted(tiny_network("qwen3_moe")), documents()
    batch = collate_packed(rows, Layout(32, ((4, 3), (1, 0, 2))))
    loss, gradients = loss_and_gradients(network, [batch])
    batch.tokens[batch.segments < 0] = 77
    other_loss, other_gradients = loss_and_gradients(network, [batch])
    # Rows are sorted by expert, so other padding moves a document's rows inside one product: it may round otherwise.
    assert other_loss == pytest.approx(loss, rel=1e-5)
    largest = max(mx.abs(gradient).max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(other_gradients[name], gradient, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text"])
def test_recomputing_layers_leaves_packed_gradients_as_they_are(family, tiny_network):
    network, rows = adapted(tiny_network(family)), documents()
    batch = collate_packed(rows, Layout(24, ((4, 3), (1, 0, 2))))
    _, gradients = loss_and_gradients(network, [batch])
    with checkpointed_layers(network):
        _, recomputed = loss_and_gradients(network, [batch])
    for name, gradient in gradients.items():
        np.testing.assert_allclose(recomputed[name], gradient, atol=1e-6, err_msg=name)


def test_a_sliding_window_reaches_back_within_its_document_only(tiny_network):
    network = tiny_network("gemma3_text")  # windows of 8
    segments = mx.array([[0] * 10 + [1] * 12])
    sliding, whole = packed_cache(network, segments)
    seen = Counter(np.array(sliding.make_mask(22))[0, 0].sum(-1).tolist())
    assert max(seen) == 8
    assert seen[8] == 3 + 5
    assert np.array(whole.make_mask(22))[0, 0].sum(-1).tolist() == [*range(1, 11), *range(1, 13)]
    assert np.array(whole.make_mask(22, window_size=4))[0, 0].sum(-1).max() == 4


# What cannot be packed.

GPT2 = {
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 4096,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 96,
}
MINISTRAL3 = {
    "model_type": "ministral3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 1024,
        "type": "default",
    },
}

LATENT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "routed_scaling_factor": 1.0,
    "attention_bias": False,
}
LONGCAT = {
    **LATENT,
    "model_type": "longcat_flash",
    "num_layers": 2,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16,
    "moe_topk": 2,
    "zero_expert_num": 1,
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "router_bias": False,
    "attention_method": "MLA",
}
DEEPSEEK_V32 = {
    **LATENT,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 6,
}


def test_layers_with_two_caches_each_are_packed_too(build_network):
    network, rows = build_network(LONGCAT), documents()
    assert packing_problem(network) is None
    batch = collate_packed(rows, Layout(24, ((4, 3), (1, 0, 2))))
    hidden = network.hidden(mx.array(batch.tokens), packed_cache(network, mx.array(batch.segments)))
    alone = network.hidden(mx.array(rows[3].token_ids[None]))[0]
    np.testing.assert_allclose(hidden[0, 14:22], alone, atol=2e-4)


def test_a_family_whose_code_reaches_into_its_cache_is_refused(build_network):
    assert "needs more of a cache" in packing_problem(build_network(DEEPSEEK_V32))


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_the_probe_finds_nothing_where_packed_and_alone_are_equal(family, tiny_network):
    assert packing_problem(tiny_network(family), 2048) is None


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_probe_tells_rounding_from_documents_that_meet(dtype, tiny_network, build_network):
    for network in (tiny_network("qwen3"), tiny_network("gemma3_text")):
        network.module.set_dtype(dtype)
        assert packing_problem(network, 2048) is None
    embedded = build_network(GPT2)
    embedded.module.set_dtype(dtype)
    assert "depends on the position" in packing_problem(embedded, 2048)


def test_the_probe_names_recurrent_state(tiny_network):
    network = tiny_network("mamba2")
    assert packing_problem(network).startswith("layer 0 keeps its past as ArraysCache")
    with pytest.raises(ModelError, match="layer 0 keeps its past as ArraysCache"):
        packed_cache(network, mx.zeros((1, 4), mx.int32))


def test_the_probe_names_embedded_positions(build_network):
    problem = packing_problem(build_network(GPT2))
    assert "depends on the position the document begins at: beginning at 7" in problem


def test_attention_scaled_by_position_is_refused_for_rows_that_reach_those_positions(build_network):
    network = build_network(MINISTRAL3)
    assert packing_problem(network, 1024) is None
    assert "beginning at 2,041" in packing_problem(network, 2048)


def test_the_probe_notices_code_that_masks_by_itself(tiny_network):
    network = tiny_network()

    class OwnMask(type(network.backbone)):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            return super().__call__(inputs)

    network.backbone.__class__ = OwnMask
    assert packing_problem(network).startswith("documents in one row change each other")


def test_the_probe_moves_neither_randomness_nor_the_training_mode(tiny_network):
    network = tiny_network()
    add_lora(network, AdapterSettings(rank=4, scale=1.0, dropout=0.5))
    network.module.train()
    mx.random.seed(9)
    packing_problem(network)
    drawn = mx.random.uniform(shape=(4,))
    assert network.module.training
    mx.random.seed(9)
    assert mx.array_equal(drawn, mx.random.uniform(shape=(4,)))


# Whole runs.

RECIPE = """
num_layers: -1
sample_packing: true
max_seq_length: 256
batch_size: 1
iters: 12
learning_rate: 1e-2
lora_parameters: {rank: 4, scale: 4.0, dropout: 0.1}
steps_per_report: 1
steps_per_eval: 4
save_every: 6
"""


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """Conversations of different lengths, with train and valid files."""
    folder = tmp_path_factory.mktemp("chats")
    for split, count in (("train", 24), ("valid", 4)):
        turns = [(f"{split} {'ab' * (i % 7) ** 2} {i}?", f"no {i % 3}") for i in range(count)]
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in turns
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_recipe(tmp_path, model_folder, chats):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)

    def make(name: str, *overrides: str):
        places = (f"model={model_folder}", f"data={chats}", f"adapter_path={tmp_path / name}")
        return load_recipe(path, (*places, *overrides))

    return make


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_packed_run_continued_half_way_publishes_the_same_bytes(make_recipe, tmp_path):
    straight = run(make_recipe("straight"), console=quiet())
    shutil.copytree(tmp_path / "straight", tmp_path / "half")
    checkpoint.remove(tmp_path / "half" / "checkpoints" / "step-000012")
    (tmp_path / "half" / "adapters.safetensors").unlink()
    mx.random.seed(1234)
    resumed = run(make_recipe("half"), resume=True, console=quiet())
    assert resumed.steps == straight.steps == 12
    assert resumed.content_hash == straight.content_hash
    assert straight.valid_loss < straight.first_valid_loss


def test_a_packed_epoch_has_the_losses_of_the_same_documents_unpacked(
    make_recipe, model_folder, tiny_network
):
    packed = prepare(make_recipe("out", "epochs=2", "iters=null"))
    assert packed.num_iterations == packed.plan.num_batches(2) > 4
    rows = [packed.plan.rows(index) for index in range(packed.num_iterations)]
    assert sorted(row for batch in rows for row in batch) == sorted(2 * list(range(len(packed.train.rows))))
    batches = [packed.batch_at(index) for index in range(packed.num_iterations)]
    assert sum(batch.segments is not None for batch in batches) > 3
    network = tiny_network(vocab_size=259)
    for batch in batches[:4]:
        alone = [collate(packed.train.rows, [row]) for row in batch.row_ids]
        loss, _ = loss_and_gradients(network, [batch])
        assert loss == pytest.approx(loss_and_gradients(network, alone)[0], rel=1e-5)


def test_the_padding_of_a_packed_run_is_printed(make_recipe):
    console = quiet()
    run(make_recipe("out"), dry_run=True, console=console)
    printed = " ".join(console.file.getvalue().split())
    assert "batches of up to 256 packed tokens (about 3.0 sequences)" in printed
    assert "padding" in printed


def test_a_family_that_cannot_be_packed_is_refused_and_costs_no_earlier_run(
    make_recipe, make_model, tmp_path
):
    config = {**GPT2, "vocab_size": 259}
    run(make_recipe("out"), console=quiet())
    earlier = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    recipe = make_recipe("out", f"model={make_model('gpt2', config)}")
    with pytest.raises(ConfigError, match=r"cannot be packed: what it computes .* depends on the position"):
        run(recipe, overwrite=True, console=quiet())
    assert {path: path.read_bytes() for path in earlier} == earlier, "the run that is there stays"


def test_an_objective_that_compares_answers_is_not_packed(make_recipe):
    with pytest.raises(ConfigError, match="sample_packing: objective dpo compares whole answers"):
        make_recipe("out", "objective=dpo")
