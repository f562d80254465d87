"""Laws of the engine: two ways to the same tokens. On lively models, whose text depends on every token before it."""

from __future__ import annotations

import heapq
import re
import time
from dataclasses import replace

import mlx.core as mx
import pytest
from loud import Loud

from serve.api.logprobs import LogprobWriter
from serve.cache.capacity import Bucket
from serve.cache.precision import PLAIN
from serve.engine.generate import generate
from serve.engine.request import Event, Request, Sampling, TokenLogprob
from serve.engine.sampler import Sampler
from serve.errors import ContextLengthError, DeadlineError, RequestError
from serve.model.loading import load
from serve.model.prompt import Prompt
from serve.model.token_bytes import TokenBytes

TEXTS = [
    "hello",
    "Hello there",
    "a",
    "the quick brown fox jumps over the lazy dog " * 9,
    "x" * 70,
    "tickets!",
]


def test_the_oracle_takes_the_plain_loop_and_nothing_else(
    model, make_request, greedy_by_mlx_lm, assert_drawn, make_engine
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
    drawn = generate(make_engine(model), [hot])[0].token_ids
    assert_drawn(hot, drawn, module)
    with pytest.raises(AssertionError):
        assert_drawn(make_request("r", "hello", temperature=1.0, seed=4), drawn, module)


def test_rows_in_company_are_what_the_whole_model_draws_alone(model, make_request, assert_drawn, make_engine):
    requests = [make_request(str(i), text) for i, text in enumerate(TEXTS)]
    answers = generate(make_engine(model, prefill_chunk_tokens=64), requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(set(answer.token_ids)) > 10, "the reference must be lively"
        assert len(answer.token_ids) == 24
        assert_drawn(request, answer.token_ids, model.network.module)


def test_rows_with_different_adapters_match_running_each_merged_and_alone(
    model, model_folder, make_adapter, make_request, merged, assert_drawn, make_engine
):
    folders = [make_adapter(1), make_adapter(2, rank=7, keys=["self_attn.q_proj", "mlp.up_proj"]), None]
    engine = make_engine(model)
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
    model, make_request, settings, assert_drawn, make_engine
):
    requests = [make_request(str(i), text, seed=i, **settings) for i, text in enumerate(TEXTS)]
    together = generate(make_engine(model), requests)
    alone = [generate(make_engine(model), [request])[0] for request in requests]
    for request, *answers in zip(requests, together, alone, strict=True):
        for answer in answers:
            assert_drawn(request, answer.token_ids, model.network.module)
    assert len({answer.token_ids for answer in alone}) == len(TEXTS)


def test_a_seed_repeats_and_another_seed_differs(model, make_request, make_engine):
    engine = make_engine(model)
    first, again, other = (
        generate(engine, [make_request("r", temperature=1.0, seed=seed)])[0].token_ids for seed in (7, 7, 8)
    )
    assert first == again != other


@pytest.mark.parametrize("chunk_tokens", [7, 1024])
def test_prefill_chunk_size_does_not_change_the_tokens(
    model, make_request, chunk_tokens, assert_drawn, make_engine
):
    requests = [make_request(str(i), text) for i, text in enumerate(TEXTS)]
    answers = generate(make_engine(model, prefill_chunk_tokens=chunk_tokens), requests)
    for request, answer in zip(requests, answers, strict=True):
        assert_drawn(request, answer.token_ids, model.network.module)


def test_rows_that_join_and_leave_do_not_disturb_the_others(model, make_request, assert_drawn, make_engine):
    requests = [make_request(str(i), TEXTS[i % 6], max_tokens=5 + 11 * (i % 4), seed=i) for i in range(14)]
    answers = generate(make_engine(model, max_rows=3), requests)
    for request, answer in zip(requests, answers, strict=True):
        assert (len(answer.token_ids), answer.finish) == (request.sampling.max_tokens, "length")
        assert_drawn(request, answer.token_ids, model.network.module)


def test_cancelling_a_row_frees_it_and_leaves_the_rest_alone(
    model, make_request, assert_drawn, make_engine, ahead
):
    engine = make_engine(model)
    engine.add(make_request("goes", max_tokens=500))
    engine.add(make_request("stays", "Hello there"))
    tokens = []
    for step in range(24 + ahead):
        tokens += [t for event in engine.step() if event.request_id == "stays" for t in event.token_ids]
        if step == 5:
            assert engine.cancel("goes").finish == "cancelled"
    assert engine.cancel("goes") is None
    assert len(tokens) == 24
    assert_drawn(make_request("stays", "Hello there"), tokens, model.network.module)
    assert not engine.has_work
    assert engine.stats().kv_bytes == 0


def test_a_row_that_overflowed_does_not_poison_the_one_after_it(
    model, model_folder, make_adapter, make_request, assert_drawn, make_engine, ahead
):
    request = make_request("after", "Hello there")
    engine = make_engine(model)
    loud = engine.registry.add("loud", Loud(make_adapter(1)))
    engine.add(make_request("stays", "z" * 100, max_tokens=500))
    engine.add(make_request("overflows", "x" * 90, max_tokens=500, adapter=loud))
    for _ in range(3):
        engine.step()
    held = engine._runner.rows.arrays()
    assert not all(mx.isfinite(array).all() for array in held), "the row must have overflowed"
    engine.cancel("overflows")
    engine.add(request)
    events = [event for _ in range(24 + ahead) for event in engine.step() if event.request_id == "after"]
    tokens = [token for event in events for token in event.token_ids]
    assert len(tokens) == 24
    assert_drawn(request, tokens, load(str(model_folder)).network.module)


def test_the_end_token_stops_a_row_and_is_counted_but_not_shown(model, make_request, make_engine):
    eos, engine = model.tokenizer.eos_token_id, make_engine(model)
    requests = [make_request(str(seed), temperature=1.5, seed=seed, max_tokens=600) for seed in range(8)]
    free, request = next(
        (answer, request)
        for answer, request in zip(generate(engine, requests), requests, strict=True)
        if eos in answer.token_ids
    )
    stopped = generate(engine, [replace(request, sampling=replace(request.sampling, ignore_eos=False))])[0]
    assert stopped.finish == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert "<|im_end|>" not in stopped.text


def test_rows_preempted_for_memory_go_on_with_the_tokens_they_would_have_had(
    model, fresh_engine, make_request, assert_drawn, make_engine, ahead
):
    kinds = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}]
    requests = [
        make_request(str(i), TEXTS[i % 3], max_tokens=560 + 9 * i, seed=i, **kinds[i % 3]) for i in range(6)
    ]
    row_bytes = make_engine(model).scheduler.budget.row_cost.row_bytes(Bucket(PLAIN, 512))
    engine = fresh_engine(ahead=ahead, kv_budget_bytes=4 * row_bytes)
    answers = generate(engine, requests)
    assert engine.stats().num_preempted > 1
    assert len({answer.token_ids for answer in answers}) == 6
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.token_ids) == request.sampling.max_tokens
        assert_drawn(request, answer.token_ids, model.network.module)


def test_rows_cost_what_they_hold_beside_a_long_one_and_after_it(fresh_engine, make_request, ahead):
    engine = fresh_engine(ahead=ahead, max_rows=16)
    cost = engine.scheduler.budget.row_cost
    short, long = (cost.row_bytes(Bucket(PLAIN, num_positions)) for num_positions in (256, 1024))
    engine.add(make_request("long", "x" * 900, max_tokens=12))
    engine.add(make_request("stays", max_tokens=200))
    for _ in range(8):
        engine.step()
    assert engine.stats().num_decoding == 2
    assert engine.stats().kv_bytes == engine._runner.rows.num_bytes == short + long
    for _ in range(12):
        engine.step()
    assert engine.stats().kv_bytes == engine._runner.rows.num_bytes == short
    for index in range(15):
        engine.add(make_request(f"short-{index}", max_tokens=30))
    for _ in range(8):
        engine.step()
    assert engine.stats().num_decoding == 16
    assert engine.stats().kv_bytes == engine._runner.rows.num_bytes == 16 * short
    engine.cancel("stays")
    for index in range(15):
        engine.cancel(f"short-{index}")
    assert engine.stats().kv_bytes == engine._runner.rows.num_bytes == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("times", [1e37, 1e25])
def test_a_row_whose_logits_are_not_numbers_ends_by_name_and_its_neighbours_are_bitwise_untouched(
    fresh_engine, make_adapter, make_request, temperature, times, ahead
):
    def run(times: float) -> list[Event]:
        """The row `bad` among others; where its logits are numbers, it is cancelled when it would have ended."""
        engine = fresh_engine(ahead=ahead)
        adapter = engine.registry.add("loud", Loud(make_adapter(1), times))
        others = [make_request(str(i), TEXTS[i], num_logprobs=2, temperature=temperature) for i in range(3)]
        bad = make_request("bad", adapter=adapter, temperature=temperature, num_logprobs=5)
        for request in (others[0], bad, *others[1:]):
            engine.add(request)
        events: list[Event] = []
        while engine.has_work:
            events += engine.step()
            if "bad" in [event.request_id for event in events]:
                engine.cancel("bad")
        assert engine.stats().num_finished.items() >= {"length": 3}.items()
        return events

    events = run(times)
    theirs = [event for event in events if event.request_id == "bad"]
    assert [event.finish for event in theirs] == ["error"]
    assert theirs[0].token_ids == theirs[0].logprobs == ()
    assert "adapter 'loud@1' gave logits that are not numbers" in str(theirs[0].error)
    # The same forwards on the same shapes, with an adapter that only whispers.
    beside_a_sound_row = [event for event in run(1e-3) if event.request_id != "bad"]
    assert [event for event in events if event.request_id != "bad"] == beside_a_sound_row


def test_a_token_that_cannot_come_is_minus_infinity_and_no_fault(model):
    logits = mx.array([[0.0, -mx.inf, 2.0], [mx.inf, 0.0, 0.0], [mx.nan, 0.0, 0.0], [-mx.inf] * 3])
    for temperature in (0.0, 1.0):
        sampler = Sampler([Sampling(temperature=temperature, num_logprobs=3)] * 4)
        drawn = sampler.tokens(logits, [0] * 4)
        assert sampler.is_sound(logits, drawn).tolist() == [True, False, False, False]
    logprob = sampler.logprobs(logits, mx.array([1, 0, 0, 0])).drawn[0].item()
    assert logprob == -mx.inf
    entry = TokenLogprob(3, logprob, ((4, -1.0), (3, logprob)))
    written = LogprobWriter(TokenBytes(model.tokenizer), None)
    assert written.chat([entry])["content"][0]["logprob"] == -9999.0
    assert written.completion([entry])["token_logprobs"] == [-9999.0]


def test_what_one_row_raises_ends_that_row_and_no_other(model, make_request, assert_drawn, make_engine):
    others = [make_request(str(i), TEXTS[i]) for i in range(3)]
    engine = make_engine(model)
    for request in (*others, make_request("torn")):
        engine.add(request)
    engine._rules["torn"]._ends = None  # whatever goes wrong in there
    events = [event for _ in range(30) if engine.has_work for event in engine.step()]
    assert [event.finish for event in events if event.request_id == "torn"] == ["error"]
    for request in others:
        tokens = [t for event in events if event.request_id == request.id for t in event.token_ids]
        assert len(tokens) == 24
        assert_drawn(request, tokens, model.network.module)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_stop_string_that_is_a_special_token_stops_at_that_token_and_is_told(
    model, make_request, ignore_eos, make_engine
):
    engine = make_engine(model)
    options = {"temperature": 1.5, "max_tokens": 600, "ignore_eos": ignore_eos, "stop": ("<|im_start|>",)}
    start = model.tokenizer.convert_tokens_to_ids("<|im_start|>")
    answers = generate(engine, [make_request(str(seed), seed=seed, **options) for seed in range(12)])
    stopped = [answer for answer in answers if answer.token_ids[-1] == start]
    assert stopped, "some seed must lead to the token"
    assert {(answer.finish, answer.stop_reason) for answer in stopped} == {("stop", "<|im_start|>")}
    assert not any(start in answer.token_ids[:-1] for answer in answers)
    ended = [answer for answer in answers if answer.token_ids[-1] == model.tokenizer.eos_token_id]
    assert {(answer.finish, answer.stop_reason) for answer in ended if not ignore_eos} <= {("stop", None)}


def test_the_stop_string_that_matched_is_told(model, make_request, make_engine):
    engine = make_engine(model)
    whole = generate(engine, [make_request("r", max_tokens=30)])[0]
    wanted = whole.text[10:13]
    answer = generate(engine, [make_request("r", max_tokens=30, stop=("no such text", wanted))])[0]
    assert (answer.finish, answer.stop_reason) == ("stop", wanted)
    assert whole.text.startswith(answer.text + wanted)


@pytest.mark.parametrize("max_tokens", [None, 32_000])
def test_an_answer_as_long_as_the_context_is_cut_there(model, make_request, max_tokens, make_engine):
    engine = make_engine(model, max_context=64)
    answer = generate(engine, [make_request("r", "hello", max_tokens=max_tokens)])[0]
    assert (len(answer.token_ids), answer.finish) == (59, "length")
    with pytest.raises(ContextLengthError, match="maximum context length is 64 tokens"):
        engine.check(make_request("r", "x" * 64))
    assert engine.check(make_request("r", "x" * 63)).sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("ids", "told"),
    [((), "empty"), ((5, 259), "259 is not"), ((-1, 5), "-1 is not"), ((2**40,), "not in this")],
)
def test_a_prompt_that_no_array_holds_is_refused_before_it_is_queued(model, ids, told, make_engine):
    engine = make_engine(model)
    with pytest.raises(RequestError, match=told):
        engine.check(Request("r", Prompt(ids), Sampling(4)))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": -1.0},
        {"min_p": 1.01},
        {"num_logprobs": -1},
        {"num_prompt_logprobs": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"repetition_context_size": 0},
        {"presence_penalty": float("inf")},
        {"presence_context_size": -1},
        {"frequency_penalty": float("nan")},
        {"frequency_context_size": 0},
        {"logit_bias": ((5, float("inf")),)},
        {"logit_bias": ((5, 1.0), (5, 2.0))},
        {"min_tokens": -1},
        {"top_n_sigma": -0.5},
        {"top_n_sigma": float("inf")},
        {"xtc_probability": 1.01},
        {"xtc_threshold": 0.51},
        {"stop": ("a", "")},
        {"stop": ("a" * 1025,)},
    ],
)
def test_sampling_refuses_what_says_nothing(changes):
    with pytest.raises(RequestError, match=f"^{next(iter(changes))} is"):
        Sampling(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 5e-324},
        {"temperature": 1e308},
        {"top_p": 5e-324},
        {"top_k": 2**31},
        {"top_k": 2**63},
        {"top_k": 2**100},
        {"min_p": 5e-324},
        {"seed": -(2**63)},
        {"seed": 2**64 + 1},
        {"seed": 2**200},
        {"max_tokens": 2**63},
        {"num_logprobs": 10_000},
        {"num_prompt_logprobs": 10_000},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e308},
        {"repetition_context_size": 2**63},
        {"presence_penalty": 1e308},
        {"frequency_penalty": -1e308},
        {"logit_bias": ((5, 1e308),)},
        {"min_tokens": 2**63},
        {"top_n_sigma": 5e-324},
        {"top_n_sigma": 1e308},
        {"xtc_probability": 5e-324},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    ],
)
def test_the_edges_of_every_number_give_an_answer(model, make_request, changes, assert_drawn, make_engine):
    other = make_request("other", TEXTS[1], temperature=1.0, seed=3)
    options = {"temperature": 1.0, "max_tokens": 3, **changes}
    request = make_request("edge", "x" * 1018 if "max_tokens" in changes else "hello", **options)
    answers = generate(make_engine(model), [request, other])
    assert answers[0].finish == "length"
    assert_drawn(other, answers[1].token_ids, model.network.module)


def test_logprobs_are_those_of_the_whole_model(model, make_request, make_engine):
    request = make_request("r", num_logprobs=3)
    answer = generate(make_engine(model), [make_request("other", "zzz"), request])[1]
    tokens = mx.array([[*request.prompt.token_ids, *answer.token_ids]])
    logits = model.network.module(tokens)[0, len(request.prompt.token_ids) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert len(answer.logprobs) == len(answer.token_ids)
    for step, entry in enumerate(answer.logprobs):
        assert entry.logprob == pytest.approx(expected[step, entry.token_id].item(), abs=1e-3)
        assert next(token for token, _ in entry.top) == entry.token_id
        assert len(entry.top) == 3


def test_whose_time_is_up_ends_with_its_own_error_wherever_it_is_and_costs_nothing_more(
    model, make_request, make_engine, assert_drawn
):
    engine = make_engine(model, max_rows=2)
    requests = [make_request(name, max_tokens=60) for name in ("runs late", "runs", "waits late", "waits")]
    for request in requests:
        engine.add(engine.check(request))
    events = []
    for _ in range(4):
        events += engine.step()
    # As if the two had been given a time that is over now.
    for name in ("runs late", "waits late"):
        heapq.heappush(engine._deadlines, (time.monotonic(), name))
    late = engine.step()
    events += late
    ended = {event.request_id: event for event in late if event.finish}
    assert set(ended) == {"runs late", "waits late"}
    assert all(isinstance(event.error, DeadlineError) for event in ended.values())
    assert "before the answer began" in str(ended["waits late"].error)
    assert re.search(r"after \d tokens of the answer", str(ended["runs late"].error))
    held = {sequence.request.id for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]}
    assert held == {"runs", "waits"}
    while engine.has_work:
        events += engine.step()
    tokens = [t for event in events if event.request_id == "runs" for t in event.token_ids]
    assert_drawn(requests[1], tokens, model.network.module)
    assert engine.sleep_s is None


def test_a_deadline_that_has_passed_is_refused_before_anything_is_queued(model, make_request, make_engine):
    engine = make_engine(model)
    request = replace(make_request("late"), deadline_s=time.monotonic())
    with pytest.raises(DeadlineError, match="before it was queued"):
        engine.check(request)
    engine.check(replace(request, deadline_s=time.monotonic() + 60))


def test_what_a_failed_step_had_read_before_it_failed_is_told(model, make_engine, make_request):
    """Where rows guess, the step in flight is read before the next is begun: the end of an answer in it was lost when
    that one then failed, and its client waited for ever."""
    engine = make_engine(model, max_rows=4)
    for name, max_tokens in (("short", 3), ("long", 40)):
        engine.add(engine.check(make_request(name, max_tokens=max_tokens)))
    finals: list[tuple[str, str | None]] = []

    def hear(events) -> None:
        finals.extend((event.request_id, event.finish) for event in events if event.finish is not None)

    while not finals and not any(one.is_spent for one in engine.scheduler.decoding):
        hear(engine.step())
    engine.guesses.num_wanted = lambda decoding: 1

    def fail(plan):
        raise RuntimeError("injected")

    engine._runner.start = fail
    with pytest.raises(RuntimeError, match="injected"):
        hear(engine.step())
    hear(engine.recover(RuntimeError("injected")))
    assert finals == [("short", "length"), ("long", "error")]
    assert not engine.has_work
