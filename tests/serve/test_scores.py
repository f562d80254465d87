"""Log-probabilities of prompts: the whole model's, however the prompt was cut, cached, preempted or accompanied."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from serve.engine.generate import generate
from serve.engine.scores import SCORED_TOKENS
from serve.model.loading import load

TEXT = (
    "a prompt that is somewhat longer than the chunks that it is computed in, and than what is scored at once"
)


@pytest.fixture
def assert_scored(model):
    """assert_scored(request, entries): what one forward over the whole prompt says."""

    def check(request, entries, module=model.network.module):
        ids, most = request.prompt.token_ids, request.sampling.num_prompt_logprobs
        logits = module(mx.array([ids]))[0].astype(mx.float32)
        whole = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        assert [entry.token_id for entry in entries] == list(ids[1:])
        for position, entry in enumerate(entries):
            row = whole[position]
            assert entry.logprob == pytest.approx(row[ids[position + 1]], abs=1e-3)
            assert entry.rank == pytest.approx(1 + (row > entry.logprob + 1e-4).sum(), abs=1)
            assert len(entry.top) == most
            best = np.sort(row)[::-1][:most]
            np.testing.assert_allclose([value for _, value in entry.top], best, atol=1e-3)
            np.testing.assert_allclose([row[token] for token, _ in entry.top], best, atol=1e-3)

    return check


@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_a_prompt_is_scored_as_by_one_forward_over_it(
    model, make_request, make_engine, assert_scored, assert_drawn, chunk
):
    assert len(TEXT) > SCORED_TOKENS
    engine = make_engine(model, prefill_chunk_tokens=chunk)
    texts = [TEXT, TEXT[:17], TEXT[:2], TEXT[:1], TEXT[:65], TEXT[30:]]
    scored = [
        make_request(f"{i}", text, num_prompt_logprobs=i % 3, max_tokens=4) for i, text in enumerate(texts)
    ]
    others = [make_request(f"other {i}", TEXT[i:], max_tokens=6) for i in (0, 3)]
    answers = generate(engine, [*scored, *others])
    for request, answer in zip(scored, answers, strict=False):
        assert_scored(request, answer.prompt_logprobs)
        assert_drawn(request, answer.token_ids, model.network.module)
    assert [answer.prompt_logprobs for answer in answers[-2:]] == [(), ()]


def test_what_is_cached_is_computed_again_to_be_scored_and_is_found_by_others(
    model, make_request, make_engine, assert_scored
):
    engine = make_engine(model)
    generate(engine, [make_request("before", TEXT)])
    scored = make_request("scored", TEXT, num_prompt_logprobs=2)
    assert_scored(scored, generate(engine, [scored])[0].prompt_logprobs)
    engine.add(engine.check(make_request("after", TEXT)))
    events = [event for _ in range(3) for event in engine.step()]
    assert max(event.num_cached_tokens for event in events) > len(TEXT) // 2


def test_a_preempted_prompt_is_told_once_and_whole(model, make_request, make_engine, assert_scored):
    engine = make_engine(model, max_rows=2, prefill_chunk_tokens=16)
    settings = {"num_prompt_logprobs": 1, "max_tokens": 30}
    pair = [replace(make_request(f"{i}", TEXT[i:], **settings), group="g") for i in range(2)]
    for num_steps in (3, 9, 14):
        engine.prefixes.cache.clear(None)
        before = engine.stats().num_preempted
        for request in pair:
            engine.add(engine.check(request))
        events = [event for _ in range(num_steps) for event in engine.step()]
        engine.add(engine.check(make_request("late", max_tokens=5)))
        while engine.has_work:
            events += engine.step()
        assert engine.stats().num_preempted > before
        for request in pair:
            told = [e.prompt_logprobs for e in events if e.request_id == request.id and e.prompt_logprobs]
            assert len(told) == 1
            assert_scored(request, told[0])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapters_row_is_scored_by_the_adapter_and_its_head(
    lively, make_request, make_engine, assert_scored, kind
):
    """The one of kind dora has the head too."""
    engine = make_engine(load(str(lively.folder("full"))))
    version = engine.registry.load("a", lively.adapter("full", kind, 0))
    engine.registry.acquire(version.id)
    request = make_request("r", TEXT, adapter=version, num_prompt_logprobs=3, max_tokens=2)
    beside = make_request("base", TEXT, num_prompt_logprobs=3, max_tokens=2)
    answers = generate(engine, [beside, request, replace(beside, id="after")])
    module, base = lively.module("full", kind, 0), lively.module("full", "base")
    assert_scored(request, answers[1].prompt_logprobs, module)
    for answer in (answers[0], answers[2]):
        assert_scored(beside, answer.prompt_logprobs, base)
    with pytest.raises(AssertionError):
        assert_scored(request, answers[1].prompt_logprobs, base)
