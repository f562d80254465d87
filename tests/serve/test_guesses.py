"""Drafters in an engine: asked when it pays, told when a sequence ends, and nobody's trouble when they fail."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from drafting import Eager, Foreteller

from serve.cache.precision import precision
from serve.engine.engine import Engine, EngineLimits
from serve.errors import RequestError
from serve.model.loading import load


@pytest.fixture(scope="module")
def model(model_folder):
    return load(str(model_folder), name="told")


def answers(engine: Engine, requests) -> dict[str, list[int]]:
    for request in requests:
        engine.add(engine.check(request))
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
    return tokens


def told(model, requests, *, ahead=False, gains=None, error=0.0):
    """An engine whose drafter was told these requests' answers, and the answers."""
    known = answers(Engine(model), requests)
    foreteller = Foreteller(known, random.Random(0), error, model.network.vocab_size)
    limits = EngineLimits(ahead=ahead)
    return Engine(
        model, limits, drafters={"told": foreteller}, drafter="told", gains=gains or Eager(4)
    ), known


class Failing(Foreteller):
    """Raises whenever it is asked, and at the end."""

    def __init__(self) -> None:
        super().__init__({}, random.Random(0), 0.0, 1)

    def propose(self, wanted):
        self.num_asked += 1
        raise ValueError("no guess")

    def forget(self, sequence):
        raise ValueError("no end")


@pytest.mark.parametrize("ahead", [False, True])
def test_right_guesses_are_steps_that_nobody_runs_and_the_last_event_counts_them(model, make_request, ahead):
    requests = [make_request("a", max_tokens=40), make_request("b", "hi", max_tokens=30)]
    engine, known = told(model, requests, ahead=ahead)
    for request in requests:
        engine.add(engine.check(request))
    events, num_steps = [], 0
    while engine.has_work:
        events += engine.step()
        num_steps += 1
    assert num_steps < 30
    for name, tokens in known.items():
        mine = [event for event in events if event.request_id == name]
        assert [token for event in mine for token in event.token_ids] == tokens
        assert mine[-1].num_accepted == len(tokens) - len(mine)
        assert all(event.num_drafted == 0 for event in mine[:-1])
        assert mine[-1].num_drafted >= mine[-1].num_accepted > 15


def test_each_sequence_is_forgotten_once_however_it_ends(model, make_request):
    requests = [make_request(name, max_tokens=24) for name in "abc"]
    engine, _ = told(model, requests)
    for request in requests:
        engine.add(engine.check(request))
    engine.step()
    engine.cancel("b")
    while engine.has_work:
        engine.step()
    foreteller = engine.guesses._drafters["told"]
    assert sorted(foreteller.forgotten) == ["a", "b", "c"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_drafter_that_fails_costs_nobody_a_token(model, make_request, ahead):
    requests = [make_request(name, max_tokens=24) for name in "ab"]
    drafter = Failing()
    engine = Engine(
        model, EngineLimits(ahead=ahead), drafters={"failing": drafter}, drafter="failing", gains=Eager(3)
    )
    assert answers(engine, requests) == answers(Engine(model), requests)
    assert drafter.num_asked


def test_one_ahead_who_knows_nothing_is_asked_less_and_less(model, make_request):
    asked = {}
    for ahead in (False, True):
        drafter = Foreteller({}, random.Random(0), 0.0, 1)
        limits = EngineLimits(ahead=ahead)
        engine = Engine(model, limits, drafters={"told": drafter}, drafter="told", gains=Eager(3))
        answers(engine, [make_request("a", max_tokens=120)])
        asked[ahead] = drafter.num_asked
    assert asked[True] < 50 < 110 < asked[False]


def test_an_end_is_drawn_and_never_guessed(model, make_request):
    """What follows an end is nobody's, so guesses stop before it."""
    [tokens] = answers(Engine(model), [make_request("a", max_tokens=30)]).values()
    end = tokens[20]
    first = tokens.index(end)
    request = make_request("a", max_tokens=30, stop_token_ids=(end,))
    engine, known = told(model, [request])
    engine.add(engine.check(request))
    events = []
    while engine.has_work:
        events += engine.step()
    assert events[-1].finish == "stop"
    assert [token for event in events for token in event.token_ids] == tokens[: first + 1] == known["a"]


def test_a_request_may_do_without_and_names_only_drafters_that_are_there(model, make_request):
    request = make_request("a", max_tokens=12)
    engine, _ = told(model, [request])
    answers(engine, [replace(request, drafter="none")])
    assert engine.guesses._drafters["told"].num_asked == 0
    with pytest.raises(RequestError, match="drafter is 'other'; this server has 'told', 'none'"):
        engine.check(replace(request, drafter="other"))


def test_prompts_come_on_a_token_a_step_beside_rows_of_state_that_guess(
    recurrent_folder, make_request, assert_drawn
):
    """Who is padded runs it again: a prompt would for ever."""
    folder = str(recurrent_folder("qwen3_next"))
    requests = [
        make_request("a", "hello", max_tokens=60),
        make_request("b", "the quick brown fox", max_tokens=3),
    ]
    known = answers(Engine(load(folder)), requests)
    engine = Engine(
        load(folder),
        EngineLimits(prefill_chunk_tokens=1),
        drafters={"told": Foreteller(known, random.Random(0), 0.6, 259)},
        drafter="told",
        gains=Eager(4),
    )
    ended = []
    for request in requests:
        engine.add(engine.check(request))
    found = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id] += event.token_ids
            ended += [event.request_id] if event.finish else []
        engine.scheduler.check_integrity()
    assert ended == ["b", "a"]
    for request in requests:
        assert_drawn(request, found[request.id], load(folder).network.module)


def test_rows_of_state_that_guess_become_quantized_where_they_should(lively, make_request, assert_drawn):
    """A row runs nothing again across the token from which its keys and values are quantized."""
    folder = str(lively.folder("hybrid"))
    requests = [
        replace(
            make_request(str(n), "hello"[n:], max_tokens=40), precision=precision(4, start_after=12 + 3 * n)
        )
        for n in range(4)
    ]
    known = answers(Engine(load(folder)), requests)
    foreteller = Foreteller(known, random.Random(0), 0.3, 259)
    engine = Engine(load(folder), drafters={"told": foreteller}, drafter="told", gains=Eager(5))
    found = answers(engine, requests)
    for request in requests:
        assert_drawn(request, found[request.id], load(folder).network.module)
