"""Laws of the engine: two ways to the same tokens. On lively models, whose text depends on every token before it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.model.loading import load

TEXTS = [
    "hello",
    "Hello there",
    "a",
    "the quick brown fox jumps over the lazy dog " * 9,
    "x" * 70,
    "tickets!",
]


def test_the_oracle_takes_the_plain_loop_and_nothing_else(
    model, make_request, greedy_by_mlx_lm, assert_drawn
):
    module = model.network.module
    for text in TEXTS:
        request = make_request("r", text)
        plain = greedy_by_mlx_lm(module, request.prompt.token_ids, 24)
        assert_drawn(request, plain, module)
        for number in (0, 11, 23):
            other = (*plain[:number], (plain[number] + 1) % 259, *plain[number + 1 :])
            with pytest.raises(AssertionError, match=f"token {number} is"):
                assert_drawn(request, other, module)
    hot = make_request("r", "hello", temperature=1.0, seed=3)
    drawn = generate(Engine(model), [hot])[0].token_ids
    assert_drawn(hot, drawn, module)
    with pytest.raises(AssertionError):
        assert_drawn(make_request("r", "hello", temperature=1.0, seed=4), drawn, module)


def test_rows_in_company_are_what_the_whole_model_draws_alone(model, make_request, assert_drawn):
    requests = [make_request(str(i), text) for i, text in enumerate(TEXTS)]
    answers = generate(Engine(model, EngineLimits(prefill_chunk_tokens=64)), requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(set(answer.token_ids)) > 10, "the reference must be lively"
        assert len(answer.token_ids) == 24
        assert_drawn(request, answer.token_ids, model.network.module)


def test_rows_with_different_adapters_match_running_each_merged_and_alone(
    model, model_folder, make_adapter, make_request, merged, assert_drawn
):
    folders = [make_adapter(1), make_adapter(2, rank=7, keys=["self_attn.q_proj", "mlp.up_proj"]), None]
    engine = Engine(model)
    versions = [engine.registry.load(f"a{i}", folder) if folder else None for i, folder in enumerate(folders)]
    requests = [
        make_request(f"{i}-{text}", text, adapter=version)
        for i, version in enumerate(versions)
        for text in TEXTS
    ]
    answers = generate(engine, requests)
    assert len({answer.token_ids for answer in answers}) == len(answers), "the adapters must change the text"
    for request, answer in zip(requests, answers, strict=True):
        folder = folders[int(request.id[0])]
        module = merged(model_folder, folder) if folder else load(str(model_folder)).network.module
        assert_drawn(request, answer.token_ids, module)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}]
)
def test_a_seed_draws_what_it_should_in_a_batch_of_one_and_of_many(
    model, make_request, settings, assert_drawn
):
    requests = [make_request(str(i), text, seed=i, **settings) for i, text in enumerate(TEXTS)]
    together = generate(Engine(model), requests)
    alone = [generate(Engine(model), [request])[0] for request in requests]
    for request, *answers in zip(requests, together, alone, strict=True):
        for answer in answers:
            assert_drawn(request, answer.token_ids, model.network.module)
    assert len({answer.token_ids for answer in alone}) == len(TEXTS)


def test_a_seed_repeats_and_another_seed_differs(model, make_request):
    engine = Engine(model)
    first, again, other = (
        generate(engine, [make_request("r", temperature=1.0, seed=seed)])[0].token_ids for seed in (7, 7, 8)
    )
    assert first == again != other


@pytest.mark.parametrize("chunk_tokens", [7, 1024])
def test_prefill_chunk_size_does_not_change_the_tokens(model, make_request, chunk_tokens, assert_drawn):
    requests = [make_request(str(i), text) for i, text in enumerate(TEXTS)]
    answers = generate(Engine(model, EngineLimits(prefill_chunk_tokens=chunk_tokens)), requests)
    for request, answer in zip(requests, answers, strict=True):
        assert_drawn(request, answer.token_ids, model.network.module)


def test_rows_that_join_and_leave_do_not_disturb_the_others(model, make_request, assert_drawn):
    requests = [make_request(str(i), TEXTS[i % 6], max_tokens=5 + 11 * (i % 4), seed=i) for i in range(14)]
    answers = generate(Engine(model, EngineLimits(max_rows=3)), requests)
    for request, answer in zip(requests, answers, strict=True):
        assert (len(answer.token_ids), answer.finish) == (request.sampling.max_tokens, "length")
        assert_drawn(request, answer.token_ids, model.network.module)


def test_cancelling_a_row_frees_it_and_leaves_the_rest_alone(model, make_request, assert_drawn):
    engine = Engine(model)
    engine.add(make_request("goes", max_tokens=500))
    engine.add(make_request("stays", "Hello there"))
    tokens = []
    for step in range(24):
        tokens += [t for event in engine.step() if event.request_id == "stays" for t in event.token_ids]
        if step == 5:
            assert engine.cancel("goes").finish == "cancelled"
    assert engine.cancel("goes") is None
    assert len(tokens) == 24
    assert_drawn(make_request("stays", "Hello there"), tokens, model.network.module)
    assert not engine.has_work
    assert engine.stats().kv_bytes == 0


def test_a_row_that_overflowed_does_not_poison_the_one_after_it(
    model, model_folder, make_adapter, make_request, assert_drawn
):
    request = make_request("after", "Hello there")
    engine = Engine(model)
    loud = engine.registry.load("loud", make_adapter(1, size=1e30))
    engine.add(make_request("stays", "z" * 100, max_tokens=500))
    engine.add(make_request("overflows", "x" * 90, max_tokens=500, adapter=loud))
    for _ in range(3):
        engine.step()
    held = [array for layer in engine._runner.rows.layers for array in layer.state]
    assert not all(mx.isfinite(array).all() for array in held), "the row must have overflowed"
    engine.cancel("overflows")
    engine.add(request)
    events = [event for _ in range(24) for event in engine.step() if event.request_id == "after"]
    tokens = [token for event in events for token in event.token_ids]
    assert len(tokens) == 24
    assert_drawn(request, tokens, load(str(model_folder)).network.module)


def test_the_end_token_stops_a_row_and_is_counted_but_not_shown(model, make_request):
    free = generate(Engine(model), [make_request("r", temperature=1.5, seed=1, max_tokens=600)])[0]
    eos = model.tokenizer.eos_token_id
    assert eos in free.token_ids, "the seed must lead to an end token"
    stopped = generate(
        Engine(model), [make_request("r", temperature=1.5, seed=1, max_tokens=600, ignore_eos=False)]
    )[0]
    assert stopped.finish == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert "<|im_end|>" not in stopped.text


def test_logprobs_are_those_of_the_whole_model(model, make_request):
    request = make_request("r", num_logprobs=3)
    answer = generate(Engine(model), [make_request("other", "zzz"), request])[1]
    tokens = mx.array([[*request.prompt.token_ids, *answer.token_ids]])
    logits = model.network.module(tokens)[0, len(request.prompt.token_ids) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert len(answer.logprobs) == len(answer.token_ids)
    for step, entry in enumerate(answer.logprobs):
        assert entry.logprob == pytest.approx(expected[step, entry.token_id].item(), abs=1e-3)
        assert next(token for token, _ in entry.top) == entry.token_id
        assert len(entry.top) == 3
