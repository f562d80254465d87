"""Each text family: its head runs apart from its layers, and rows in one batch match the family's own cache."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drafting import Fitful, Foreteller
from either_way import either_way
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache
from mlx_vlm import turboquant

from serve.cache.capacity import Bucket, Move, Place
from serve.cache.families import make_rows
from serve.cache.precision import PLAIN, KvPrecision
from serve.cache.segment import Segment
from serve.cache.spans import Span, SpanPart
from serve.combinations import probe
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.errors import ModelError
from serve.model.loading import load
from serve.model.network import Network

COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"model_type": "llama"},
    "phi3": {},
    "olmo2": {},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "mixtral": MOE,
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt_oss": {
        **MOE,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": None,
    },
    "deepseek_v2": {
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 24,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 1.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}
SSM = {
    "state_size": 8,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
RECURRENT = {
    "mamba": {**SSM, "time_step_rank": 8},
    "mamba2": {
        **SSM,
        "num_heads": 8,
        "num_hidden_layers": 2,
        "time_step_limit": [0.0, 10.0],
        "time_step_rank": "auto",
    },
    "rwkv7": {
        "norm_eps": 1e-6,
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
    },
    "qwen3_next": {
        **LINEAR,
        **FAMILIES["qwen3_moe"],
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
    "olmo_hybrid": {
        **LINEAR,
        "linear_allow_neg_eigval": True,
        "attention_bias": False,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "falcon_h1": {
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_chunk_size": 16,
    },
    "granitemoehybrid": {
        **FAMILIES["granite"],
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "nemotron_h": {
        **SSM,
        "n_groups": 2,
        "ssm_state_size": 8,
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "hybrid_override_pattern": ["M", "*", "-", "M"],
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 128,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 96,
        "full_attn_idxs": [1],
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "recurrent_gemma": {
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
        "num_experts": 0,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "mla_use_nope": True,
    },
}
TEXTS = ["hi", "the quick brown fox jumps over the lazy dog and on", "tickets"]


class StoredKVCache(KVCache):
    """mlx-lm's cache, whose keys and values come back as a precision stores them once it is longer than start_after.

    The forms are mlx's own quantization and mlx-vlm's codecs, on all that there is at each call.
    """

    def __init__(self, precision: KvPrecision, sizes: tuple[np.ndarray, np.ndarray]) -> None:
        super().__init__()
        self._precision = precision
        self._sizes = sizes

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = super().update_and_fetch(keys, values)
        precision = self._precision
        if precision.at(self.offset).is_plain:
            return keys, values
        bits = (precision.key_bits, precision.value_bits)
        return tuple(
            self._stored(array, bits[index], self._sizes[index], index)
            for index, array in enumerate((keys, values))
        )

    def _stored(self, array: mx.array, bits: float, sizes: np.ndarray, seed: int) -> mx.array:
        if self._precision.scheme == "affine":
            group = {"group_size": self._precision.group_size, "bits": int(bits)}
            packed, scales, biases = mx.quantize(array, **group)
            half = mx.float16 if array.dtype == mx.float32 else array.dtype
            scales, biases = (part.astype(half).astype(array.dtype) for part in (scales, biases))
            return mx.dequantize(packed, scales, biases, **group)
        # One token whose channels are as large as in the sample: the codec picks its outliers by it.
        codec = turboquant._build_codec(mx.array(sizes)[None, None, None], bits, "mse", seed)
        return codec.dequantize(codec.quantize(array)).astype(array.dtype)


class RowBatch:
    """Sequences in one BatchRows, placed as a scheduler would, beside each one's own cache of the family.

    Buckets have 32, 64, 128 … positions, so that few tokens fill several.
    """

    def __init__(self, network: Network, chunk_tokens: int = 16) -> None:
        self.network = network
        self.rows = make_rows(network, prefill_chunk_tokens=chunk_tokens)
        self.rows.prove()
        self.is_recurrent = self.rows.cost.state_bytes > 0
        self.tokens: dict[str, list[int]] = {}
        self.places: dict[str, Place] = {}
        self.state_rows: dict[str, int] = {}
        self.precisions: dict[str, KvPrecision] = {}
        self.lengths: dict[str, int] = {}

    def add(self, name: str, tokens: Sequence[int], precision: KvPrecision = PLAIN) -> None:
        """A sequence that holds nothing yet."""
        self.tokens[name], self.precisions[name], self.lengths[name] = list(tokens), precision, 0

    def drop(self, name: str) -> None:
        """Its row is free."""
        self.places.pop(name, None)
        self.state_rows.pop(name, None)
        del self.lengths[name]

    def bucket(self, name: str, length: int) -> Bucket:
        """Where a row of that length lives."""
        return Bucket(self.precisions[name].at(length), 32 << max(0, (length - 1).bit_length() - 5))

    def place(self, name: str, length: int) -> None:
        """A row with room for `length` positions; what it holds moves there."""
        bucket, old = self.bucket(name, length), self.places.get(name)
        if name not in self.state_rows:
            self.state_rows[name] = min(set(range(99)) - set(self.state_rows.values()))
        if old is not None and old.bucket == bucket:
            return
        taken = {place.row for place in self.places.values() if place.bucket == bucket}
        self.places[name] = Place(bucket, min(set(range(99)) - taken))
        self._resize([old] if old is not None else [])
        if old is not None and self.lengths[name]:
            self.rows.move([Move(old, self.places[name], self.lengths[name])])

    def swap(self, first: str, second: str) -> None:
        """Two rows of one bucket change places, states too."""
        a, b = self.places[first], self.places[second]
        state_a, state_b = self.state_rows[first], self.state_rows[second]
        self.rows.move(
            [Move(a, b, self.lengths[first]), Move(b, a, self.lengths[second])],
            [(state_a, state_b), (state_b, state_a)],
        )
        self.places[first], self.places[second] = b, a
        self.state_rows[first], self.state_rows[second] = state_b, state_a

    def run(self, chunks: Mapping[str, int]) -> dict[str, mx.array]:
        """One forward of so many next tokens each; hidden states [D] of the last token of each."""
        for name, count in chunks.items():
            self.place(name, self.lengths[name] + count)
        self._resize([])
        order = sorted(chunks, key=lambda name: (repr(self.places[name].bucket), self.places[name].row))
        width = max(chunks.values())
        tokens = np.zeros((len(order), width), dtype=np.int32)
        for index, name in enumerate(order):
            start = self.lengths[name]
            tokens[index, : chunks[name]] = self.tokens[name][start : start + chunks[name]]
        parts = [
            SpanPart(
                bucket,
                [self.places[name].row for name in names],
                [self.lengths[name] for name in names],
                [self.lengths[name] == 0 for name in names],
            )
            for bucket, names in (
                (bucket, list(group))
                for bucket, group in groupby(order, lambda name: self.places[name].bucket)
            )
        ]
        self.rows.set_span(
            Span(
                parts,
                width,
                [self.state_rows[name] for name in order],
                max(self.state_rows.values()) + 1,
            )
        )
        hidden = self.network.hidden(mx.array(tokens), cache=self.rows.caches)
        mx.eval(hidden, self.rows.arrays())
        for name, count in chunks.items():
            self.lengths[name] += count
        return {name: hidden[index, chunks[name] - 1] for index, name in enumerate(order)}

    def alone(self, tokens: Sequence[int], precision: KvPrecision = PLAIN) -> mx.array:
        """[T, D]: the same tokens in the family's own cache, in one chunk or, from where it is quantized, two."""
        parts = iter(self.rows._layers)

        def own(cache: Any) -> Any:
            layer = next(parts)
            if type(cache) is KVCache and not layer.shape.precision(precision).is_plain:
                return StoredKVCache(precision, layer.sizes)
            return cache

        cache = [
            CacheList(*map(own, each.caches)) if type(each) is CacheList else own(each)
            for each in make_prompt_cache(self.network.module)
        ]
        cuts = [0, precision.start_after, len(tokens)] if precision.start_after else [0, len(tokens)]
        return mx.concatenate(
            [
                self.network.hidden(mx.array([tokens[start:stop]]), cache=cache)[0]
                for start, stop in pairwise(cuts)
            ]
        )

    def _resize(self, also: Sequence[Place]) -> None:
        capacities: dict[Bucket, int] = {}
        for bucket, row in [*self.places.values(), *also]:
            capacities[bucket] = max(capacities.get(bucket, 0), row + 1)
        self.rows.resize(capacities)


@pytest.fixture(params=[*FAMILIES, *RECURRENT])
def family(request, make_model):
    config = {"model_type": request.param, **COMMON, **(FAMILIES | RECURRENT)[request.param]}
    return load(str(make_model(request.param, config)), name=request.param)


def test_rows_of_every_family_match_its_own_cache(family, make_request):
    requests = [make_request(str(i), text, max_tokens=20) for i, text in enumerate(TEXTS)]
    answers = generate(Engine(family, EngineLimits(prefill_chunk_tokens=16)), requests)
    for request, answer in zip(requests, answers, strict=True):
        prompt = list(request.prompt.token_ids)
        logits = family.network.module(
            mx.array([[*prompt, *answer.token_ids]]), cache=make_prompt_cache(family.network.module)
        )[0]
        for step, token in enumerate(answer.token_ids):
            row = logits[len(prompt) - 1 + step]
            # A near-tie may fall either way in another batch shape; nothing further from the top may be drawn.
            assert (mx.max(row) - row[token]).item() < 1e-3


@pytest.mark.parametrize(("family", "ahead"), either_way(RECURRENT), indirect=["family"])
def test_drafts_change_no_token_of_families_that_keep_a_state(family, ahead, make_request, assert_drawn):
    """Rows with and without guesses, right, wrong and in part right, that come and go, beside prompts in chunks."""
    samplings = [{}, {"temperature": 1.0, "seed": 3}]
    requests = [
        make_request(str(n), text, max_tokens=24 - n, **samplings[n % 2]) for n, text in enumerate(2 * TEXTS)
    ]
    whole = load(str(family.path)).network.module
    plain = generate(Engine(load(str(family.path)), EngineLimits(max_rows=4)), requests)
    told = {request.id: answer.token_ids for request, answer in zip(requests, plain, strict=True)}
    foreteller = Foreteller(told, random.Random(0), 0.3, 259)
    limits = EngineLimits(max_rows=4, prefill_chunk_tokens=16, ahead=ahead)
    engine = Engine(family, limits, drafters={"told": foreteller}, drafter="told", gains=Fitful(5))
    answers = generate(engine, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert_drawn(request, answer.token_ids, whole)
    stats = engine.stats().drafts[""]
    assert 0.2 * stats.num_drafted < stats.num_accepted < 0.9 * stats.num_drafted


def test_a_head_that_cannot_be_run_apart_is_noticed(model):
    class Shifted(type(model.network.module)):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            return super().__call__(inputs + (inputs.dtype == mx.int32), cache, input_embeddings)

    model.network.module.__class__ = Shifted
    with pytest.raises(ModelError, match="cannot be run apart"):
        Network(model.network.module).check()


def random_tokens(seed: int, count: int) -> list[int]:
    """Ids of the random models' vocabulary."""
    draw = random.Random(seed)
    return [draw.randrange(3, 259) for _ in range(count)]


def away(found: mx.array, expected: mx.array) -> float:
    """How far hidden states are apart, as a share of their size."""
    return (mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item()


def run_randomly(batch: RowBatch, draw: random.Random) -> dict[str, list[tuple[int, mx.array]]]:
    """All tokens of all sequences in chunks of random lengths, in random company, rows changing places.

    (tokens so far, hidden states of the last) after each chunk, by sequence.
    """
    found: dict[str, list[tuple[int, mx.array]]] = {name: [] for name in batch.tokens}

    def left(name: str) -> int:
        precision, length = batch.precisions[name], batch.lengths[name]
        rest = len(batch.tokens[name]) - length
        plain = 0 if precision.is_plain else precision.start_after - length
        return min(rest, plain) if plain > 0 else rest

    while names := [name for name in batch.tokens if left(name)]:
        chosen = draw.sample(names, draw.randint(1, len(names)))
        if batch.is_recurrent:
            chosen = [
                name for name in chosen if (batch.lengths[name] == 0) == (batch.lengths[chosen[0]] == 0)
            ]
        width = draw.choice([1, 1, 1, 5, 16])
        counts = {name: min(draw.randint(1, width), left(name)) for name in chosen}
        if batch.is_recurrent:
            counts = dict.fromkeys(counts, min(counts.values()))
        for name, hidden in batch.run(counts).items():
            found[name].append((batch.lengths[name], hidden))
        neighbours = [
            (a, b)
            for a in batch.places
            for b in batch.places
            if a < b and batch.places[a].bucket == batch.places[b].bucket
        ]
        if neighbours and draw.random() < 0.3:
            batch.swap(*draw.choice(neighbours))
    return found


def test_rows_in_any_company_hold_what_the_family_s_own_cache_holds(family):
    batch = RowBatch(family.network)
    for index, length in enumerate((5, 40, 70, 33, 90, 12)):
        batch.add(f"row{index}", random_tokens(index, length))
    for name, steps in run_randomly(batch, random.Random(7)).items():
        expected = batch.alone(batch.tokens[name])
        for length, hidden in steps:
            assert away(hidden, expected[length - 1]) < 1e-4


@pytest.mark.parametrize("family", RECURRENT, indirect=True)
@pytest.mark.parametrize("width", [1, 4], ids=["in place", "in chunks"])
def test_rows_that_are_put_back_have_never_run_what_they_ran(family, width):
    """One row of three takes in tokens that are not its own; a fourth begins before that is known."""
    batch = RowBatch(family.network)
    for index in range(4):
        batch.add(f"row{index}", random_tokens(index, 30))
    running = ["row0", "row1", "row2"]
    batch.run(dict.fromkeys(running, 6))
    own, wrong = batch.tokens["row1"], batch.tokens["row2"]
    batch.rows.hold_states()
    batch.tokens["row1"] = wrong
    batch.run(dict.fromkeys(running, width))
    batch.run({"row3": 5})
    batch.rows.put_back({batch.state_rows["row1"]: 6})
    batch.tokens["row1"], batch.lengths["row1"] = own, 6
    for count in (2, 1, 1):
        found = batch.run(dict.fromkeys(batch.tokens, count))
        for name, hidden in found.items():
            assert away(hidden, batch.alone(batch.tokens[name])[batch.lengths[name] - 1]) < 1e-4


PRECISIONS = {
    "q8": KvPrecision("affine", 8, 8, group_size=32),
    "q4": KvPrecision("affine", 4, 4, group_size=32),
    "q8:4": KvPrecision("affine", 8, 4, group_size=32, start_after=20),
    "t3:4": KvPrecision("turbo", 3, 4),
    "t3.5": KvPrecision("turbo", 3.5, 3.5, start_after=9),
}


def is_quantizable(batch: RowBatch) -> bool:
    """Some layer sees everything, so that its keys are quantized."""
    return any(layer.shape.window is None for layer in batch.rows.attending)


def add_a_row_of_each(batch: RowBatch) -> None:
    for index, (name, precision) in enumerate([*PRECISIONS.items(), ("plain", PLAIN)]):
        batch.add(name, random_tokens(index, 30 + 7 * index), precision)


def test_rows_of_any_precision_hold_what_the_family_s_own_cache_holds_in_it(family):
    batch = RowBatch(family.network)
    add_a_row_of_each(batch)
    errors = []
    for name, steps in run_randomly(batch, random.Random(8)).items():
        expected = batch.alone(batch.tokens[name], batch.precisions[name])
        lost = away(batch.alone(batch.tokens[name]), expected)
        assert (lost > 1e-4) == (is_quantizable(batch) and name != "plain"), "the precision must tell"
        errors += [away(hidden, expected[length - 1]) for length, hidden in steps]
        # A number at the border of two codes falls to either side, as another batch shape rounds it.
        assert max(errors[-len(steps) :]) < 1e-4 + lost / 3
    assert np.median(errors) < 1e-5, "and that is rare"


def test_rows_take_the_bytes_that_are_counted(family):
    batch = RowBatch(family.network)
    add_a_row_of_each(batch)
    batch.run(dict.fromkeys(batch.tokens, 9))
    cost = batch.rows.cost
    states = sum(array.nbytes for layer in batch.rows._recurrent.values() for array in layer.state)
    assert states == len(batch.tokens) * cost.state_bytes / 2, "a step holds the old states and the new ones"
    held = {bucket: 0 for bucket, _ in batch.places.values()}
    for bucket, row in batch.places.values():
        held[bucket] = max(held[bucket], row + 1)
    assert batch.rows.num_bytes - states == sum(
        count * cost.row_bytes(bucket) for bucket, count in held.items()
    )
    assert (len({cost.row_bytes(bucket) for bucket in held}) > 1) == is_quantizable(batch)


def test_a_row_restored_from_segments_goes_on_as_the_one_that_was_never_taken(family):
    batch = RowBatch(family.network)
    add_a_row_of_each(batch)
    segments: dict[str, list[Segment]] = {name: [] for name in batch.tokens}
    for counts in (9, 11, 1):  # short enough for t3.5 and q8:4 to be plain at first, and quantized then
        held = batch.lengths.copy()
        batch.run(dict.fromkeys(batch.tokens, counts))
        for name, place in batch.places.items():
            segments[name].append(
                batch.rows.take(place, batch.state_rows[name], held[name], batch.lengths[name])
            )
    for name, place in batch.places.items():
        earlier = batch.rows.take(place, batch.state_rows[name], 0, 20)
        assert earlier.has_state == (not batch.is_recurrent), "the state has gone on"
    undisturbed = batch.run(dict.fromkeys(batch.tokens, 2))

    again = RowBatch(family.network)
    add_a_row_of_each(again)
    for name, parts in segments.items():
        first, second = parts[1].cut(4)
        kept = [parts[0], first, second, parts[2]]
        assert [part.has_state for part in kept] == [True, not again.is_recurrent, True, True]
        kept = [Segment.from_arrays(part.arrays(), part.meta()) for part in kept]
        again.place(name, 21)
        again.rows.put(again.places[name], again.state_rows[name], kept, 21)
        again.lengths[name] = 21
    for name, hidden in again.run(dict.fromkeys(again.tokens, 2)).items():
        assert mx.array_equal(hidden, undisturbed[name]), name


def test_families_whose_code_looks_into_keys_get_plain_arrays_and_no_others_do(family):
    for _ in range(2):  # proven, and known from then on
        rows = make_rows(family.network, prefill_chunk_tokens=16)
        rows.prove()
        is_dense = {layer.is_dense for layer in rows.attending}
        assert is_dense <= {family.name in {"gemma2", "kimi_linear"}}


def test_a_network_of_a_build_that_is_proven_runs_no_token_for_it_and_any_other_does(model_folder):
    forwards = []

    class Counting(type(load(str(model_folder)).network.backbone)):
        def __call__(self, *inputs, **options):
            forwards.append(inputs)
            return super().__call__(*inputs, **options)

    def num_forwards(change=lambda network: None, chunk=16):
        network = load(str(model_folder)).network
        network.backbone.__class__ = Counting
        change(network)
        rows = make_rows(network, prefill_chunk_tokens=chunk)
        forwards.clear()
        rows.prove()
        return len(forwards)

    def half(network):
        network.module.set_dtype(mx.bfloat16)

    def shorter(network):
        del network.module.layers[1:]

    def another_base(network):
        network.backbone.layers[0].self_attn.rope.base = 500.0

    assert num_forwards() > 10
    for change in (half, shorter, another_base):
        assert num_forwards(change) > 10
        assert num_forwards(change) == num_forwards() == 0


def test_what_is_known_of_a_build_keeps_no_network_of_it(model_folder):
    network = load(str(model_folder)).network
    network.backbone.own = lambda network=network: network
    make_rows(network, prefill_chunk_tokens=16).prove()
    left = weakref.ref(network.module)
    del network
    gc.collect()
    assert left() is None


def test_a_family_whose_rows_see_each_other_is_refused_at_start(model):
    make_rows(model.network, prefill_chunk_tokens=16).prove()

    class Mixing(type(model.network.backbone)):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            hidden = super().__call__(inputs, cache, input_embeddings)
            return hidden + hidden.mean(axis=0, keepdims=True)

    model.network.backbone.__class__ = Mixing
    with pytest.raises(ModelError, match="qwen3: its rows cannot be batched: a row in company comes out"):
        make_rows(model.network, prefill_chunk_tokens=16).prove()


@pytest.mark.parametrize("window", [5, 16, 40])
@pytest.mark.parametrize("chunk_tokens", [1, 9, 25, 64])
def test_a_sliding_window_keeps_the_window_and_no_more(make_model, window, chunk_tokens):
    config = {"model_type": "gemma3_text", **COMMON, **FAMILIES["gemma3_text"], "sliding_window": window}
    model = load(str(make_model(f"window-{window}", config)))
    batch = RowBatch(model.network, chunk_tokens)
    for index, length in enumerate((150, 6, 260)):
        batch.add(f"row{index}", random_tokens(index, length))
    draw = random.Random(window + chunk_tokens)
    while names := [name for name, tokens in batch.tokens.items() if batch.lengths[name] < len(tokens)]:
        counts = {}
        for name in draw.sample(names, draw.randint(1, len(names))):
            left = len(batch.tokens[name]) - batch.lengths[name]
            counts[name] = min(left, draw.choice([1, chunk_tokens, draw.randint(1, chunk_tokens)]))
        for name, hidden in batch.run(counts).items():
            length = batch.lengths[name]
            if length % 10 < 2 or length == len(batch.tokens[name]):
                expected = batch.alone(batch.tokens[name][:length])[-1]
                assert away(hidden, expected) < 1e-4
    windowed = [layer for layer in batch.rows.attending if layer.shape.window is not None]
    assert {store.capacity for layer in windowed for store in layer.stores.values()} <= {
        32,
        -(-(window + chunk_tokens - 1) // 64) * 64,
    }


@pytest.mark.large
@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_everything_combines_for_every_family(make_model, family):
    config = {"model_type": family, **COMMON, **(FAMILIES | RECURRENT)[family]}
    found = probe(str(make_model(f"combining-{family}", config)))
    assert {cell.row for cell in found.cells} >= {"base", "LoRA", "DoRA"}
    assert [cell for cell in found.cells if not cell.is_possible] == []
