"""Laws of recurrent rows: whatever company a row keeps, its state is what the family's own cache holds alone."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from loud import Loud
from mlx_lm.models.cache import ChunkedKVCache, make_prompt_cache

from serve.cache.capacity import Bucket
from serve.cache.precision import PLAIN
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.errors import ConfigError, ModelError
from serve.model.loading import LoadedModel, load

TEXTS = [
    "hello",
    "Hello there",
    "a",
    "the quick brown fox jumps over the lazy dog " * 2,
    "x" * 33,
    "tickets!",
]
INSIDE = {
    "mamba2": ["mixer.in_proj", "mixer.out_proj"],
    "qwen3_next": ["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "self_attn.v_proj"],
}


@pytest.fixture(params=["mamba2", "qwen3_next"])
def family(request) -> str:
    return request.param


@pytest.fixture
def fresh(family, recurrent_folder) -> Callable[[], LoadedModel]:
    """fresh() → the lively model of the family, loaded anew."""
    return lambda: load(str(recurrent_folder(family)), name=family)


def run_steps(engine: Engine, num_steps: int) -> dict[str, list[int]]:
    """Tokens by request of the coming steps."""
    tokens: dict[str, list[int]] = {}
    for _ in range(num_steps):
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 64])
def test_rows_in_company_are_what_the_whole_model_draws_alone(
    fresh, chunk_tokens, make_request, assert_drawn, make_engine
):
    model = fresh()
    texts = TEXTS if chunk_tokens > 2 else [text[:9] for text in TEXTS]
    requests = [make_request(str(i), text, max_tokens=12) for i, text in enumerate(texts)]
    answers = generate(make_engine(model, prefill_chunk_tokens=chunk_tokens), requests)
    assert len({answer.token_ids for answer in answers}) == len(answers), "the reference must be lively"
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.token_ids) == 12
        assert_drawn(request, answer.token_ids, model.network.module)


def test_logprobs_are_those_of_the_whole_model(fresh, make_request, make_engine):
    model = fresh()
    requests = [make_request(str(i), text, max_tokens=8, num_logprobs=0) for i, text in enumerate(TEXTS)]
    answers = generate(make_engine(model, prefill_chunk_tokens=64), requests)
    for request, answer in zip(requests, answers, strict=True):
        prompt = request.prompt.token_ids
        logits = model.network.module(
            mx.array([[*prompt, *answer.token_ids]]), cache=make_prompt_cache(model.network.module)
        )[0, len(prompt) - 1 : -1]
        expected = mx.take_along_axis(
            logits - mx.logsumexp(logits, axis=-1, keepdims=True),
            mx.array(answer.token_ids)[:, None],
            axis=-1,
        )
        found = [entry.logprob for entry in answer.logprobs]
        assert found == pytest.approx(expected[:, 0].tolist(), abs=2e-4)


def test_rows_that_join_and_leave_do_not_disturb_the_others(fresh, make_request, assert_drawn, make_engine):
    model = fresh()
    requests = [make_request(str(i), TEXTS[i % 6], max_tokens=3 + 5 * (i % 4)) for i in range(12)]
    answers = generate(make_engine(model, max_rows=3, prefill_chunk_tokens=16), requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.token_ids) == request.sampling.max_tokens
        assert_drawn(request, answer.token_ids, model.network.module)


def test_a_row_taken_over_in_mid_prompt_or_mid_answer_shows_no_trace(
    fresh, make_request, assert_drawn, make_engine
):
    model = fresh()
    engine = make_engine(model, max_rows=3, prefill_chunk_tokens=8)
    engine.add(make_request("stays", "Hello there", max_tokens=500))  # so the rows are never given back
    engine.add(make_request("answers", "x", max_tokens=500))
    engine.add(make_request("reads", "y" * 60, max_tokens=500))
    run_steps(engine, 6)
    assert engine.stats().num_prefilling == 1, "one row must be in its prompt"
    for taken, name in (("reads", "first"), ("answers", "second")):
        assert engine.cancel(taken).finish == "cancelled"
        engine.add(make_request(name, TEXTS[3], max_tokens=12))
    tokens = run_steps(engine, 60)
    for name in ("first", "second"):
        assert len(tokens[name]) == 12
        assert_drawn(make_request(name, TEXTS[3]), tokens[name], model.network.module)


def test_a_row_that_overflowed_does_not_poison_the_one_after_it(
    fresh, family, recurrent_folder, make_adapter_of, make_request, assert_drawn, make_engine
):
    engine = make_engine(fresh(), prefill_chunk_tokens=16)
    loud = make_adapter_of(recurrent_folder(family), 1, keys=INSIDE[family])
    version = engine.registry.add("loud", Loud(loud, 1e38))
    engine.add(make_request("stays", "z" * 150, max_tokens=500))
    engine.add(make_request("overflows", "x" * 120, max_tokens=500, adapter=version))
    has_overflowed, num_steps = False, 0
    while (
        any(sequence.request.id == "overflows" for sequence in engine.scheduler.running) or not has_overflowed
    ):
        num_steps += 1
        assert num_steps < 200, "it never overflows"
        engine.step()
        held = engine._runner.rows.arrays()
        has_overflowed |= not all(mx.isfinite(array).all() for array in held)
    assert engine.stats().num_finished == {"error": 1}, "and its logits are not numbers"
    request = make_request("after", TEXTS[3], max_tokens=12)
    engine.add(request)
    tokens = run_steps(engine, 25)["after"]
    assert len(tokens) == 12
    assert_drawn(request, tokens, fresh().network.module)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_seed_draws_what_it_should_alone_and_in_company(
    fresh, make_request, settings, assert_drawn, make_engine
):
    model = fresh()
    requests = [make_request(str(i), text, max_tokens=12, seed=i, **settings) for i, text in enumerate(TEXTS)]
    together = generate(make_engine(model, prefill_chunk_tokens=64), requests)
    engine = make_engine(model)
    for request, answer in zip(requests, together, strict=True):
        for found in (answer, generate(engine, [request])[0]):
            assert_drawn(request, found.token_ids, model.network.module)


def test_rows_with_different_adapters_match_running_each_merged_and_alone(
    fresh, family, recurrent_folder, make_adapter_of, make_request, merged, assert_drawn, make_engine
):
    base = recurrent_folder(family)
    folders = [make_adapter_of(base, seed, rank=3 + seed, keys=INSIDE[family]) for seed in (1, 2)]
    engine = make_engine(fresh(), prefill_chunk_tokens=16)
    versions = [None, *(engine.registry.load(f"a{i}", folder) for i, folder in enumerate(folders))]
    modules = [fresh().network.module, *(merged(base, folder) for folder in folders)]
    requests = [
        make_request(f"{i}-{text}", text, max_tokens=10, adapter=version)
        for i, version in enumerate(versions)
        for text in TEXTS
    ]
    answers = generate(engine, requests)
    assert len({answer.token_ids for answer in answers}) == len(answers), "the adapters must change the text"
    for request, answer in zip(requests, answers, strict=True):
        assert_drawn(request, answer.token_ids, modules[int(request.id[0])])


def test_admission_counts_the_state_of_each_row(recurrent_folder, make_request):
    model = load(str(recurrent_folder("mamba2")))
    cost = Engine(model).scheduler.budget.row_cost
    assert cost.row_bytes(Bucket(PLAIN, 256)) == 0
    assert cost.state_bytes > 0
    engine = Engine(model, EngineLimits(kv_budget_bytes=3 * cost.state_bytes - 1))
    for index in range(4):
        engine.add(make_request(str(index), max_tokens=4))
    engine.step()
    engine.step()
    assert engine.stats().num_decoding == 2
    assert engine.stats().kv_bytes == 2 * cost.state_bytes, "a step holds the old states and the new ones"
    assert engine._runner.rows.num_bytes == cost.state_bytes
    with pytest.raises(ConfigError, match="keys, values and states"):
        Engine(model, EngineLimits(kv_budget_bytes=cost.state_bytes - 1))


def broken(model: LoadedModel, spoil: Callable) -> LoadedModel:
    """The model, whose layers call spoil(cache) after each forward."""

    class Broken(type(model.network.backbone)):
        def __call__(self, inputs, cache=None):
            hidden = super().__call__(inputs, cache)
            for layer in cache:
                spoil(layer)
            return hidden

    model.network.backbone.__class__ = Broken
    return model


def test_a_family_whose_rows_mix_is_refused_at_start(recurrent_folder):
    def mix(cache):
        if cache[1] is not None:
            cache[1] = mx.broadcast_to(cache[1].mean(axis=0, keepdims=True), cache[1].shape)

    with pytest.raises(ModelError, match="mamba2: its rows cannot be batched: a row in company"):
        Engine(broken(load(str(recurrent_folder("mamba2"))), mix))


def test_a_family_whose_state_grows_is_refused_at_start(recurrent_folder):
    def grow(cache):
        if cache[0] is not None:
            cache[0] = mx.concatenate([cache[0], cache[0]], axis=1)

    with pytest.raises(
        ModelError, match=r"mamba2: its rows cannot be batched: state 0 .* must keep its shape"
    ):
        Engine(broken(load(str(recurrent_folder("mamba2"))), grow))


def test_a_family_with_chunked_state_is_refused_at_start_by_name(recurrent_folder):
    model = load(str(recurrent_folder("mamba2")))
    model.network.module.__class__ = type(
        "Chunked", (type(model.network.module),), {"make_cache": lambda self: [ChunkedKVCache(8)]}
    )
    with pytest.raises(ModelError, match="layer 0 keeps its past in a ChunkedKVCache"):
        Engine(model)
