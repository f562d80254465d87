"""Budgets of thoughts in the engine: held to the token, alone and in company, in step and one step ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.cache.capacity import Bucket
from serve.cache.precision import PLAIN
from serve.engine.engine import Engine
from serve.engine.request import Event, Request
from serve.engine.thinking import Thinking
from serve.model.loading import load
from serve.model.prompt import Prompt
from serve.model.template import ChatTemplate
from serve.model.thoughts import ThoughtRules

TEXTS = ("hello there", "how are you today, then?", "a", "tell me what the weather is like", "so long")
BUDGETS = (0, 1, 7, None, 30, 2)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def rules(model_folder) -> tuple[ThoughtRules, ChatTemplate]:
    tokenizer = load(str(model_folder)).tokenizer
    return ThoughtRules(tokenizer, "qwen3"), ChatTemplate(tokenizer)


def thinking(rules, request: Request, budget: int | None, opens: bool, **marks: str) -> Request:
    """The request with a prompt that has begun a thought, or not; marks are several tokens of this vocabulary."""
    template = rules[1]
    thoughts = rules[0].of(template, *(marks.get(name) for name in ("start", "end")))
    assert thoughts is not None
    begun = template.tokenizer.encode(f"{marks.get('start', '<think>')}\n") if opens else []
    prompt = (*request.prompt.token_ids, 1, *begun)
    cue = thoughts.cue(prompt, template.end_ids)
    return replace(request, prompt=Prompt(prompt), thinking=Thinking(thoughts, cue, budget))


def run(engine: Engine, requests: list[Request]) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(engine.check(request))
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    assert all(each[-1].finish == "length" for each in events.values()), events
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def check(request: Request, events: list[Event], budget: int | None, assert_drawn, module) -> None:
    """So many tokens as the model draws, the end mark's, and what the model draws after those."""
    close = request.thinking.thoughts.close_ids
    found = tokens_of(events)
    num_tokens = request.sampling.max_tokens
    count = num_tokens if budget is None else min(budget, num_tokens)
    assert_drawn(request, found[:count], module) if count else None
    rest = found[count : count + len(close)]
    assert tuple(rest) == close[: len(rest)]
    after = found[count + len(close) :]
    if after:
        told = (*request.prompt.token_ids, *found[: count + len(close)])
        assert_drawn(replace(request, prompt=Prompt(told)), after, module)
    assert events[-1].num_reasoning_tokens == count
    assert bool("".join(event.reasoning for event in events)) == (count > 0)
    assert len(set(found[:count])) >= min(count / 2, 20)


@pytest.mark.parametrize("marks", [{}, {"start": "((", "end": "\n- done -\n"}], ids=["family", "own"])
def test_a_thought_that_the_prompt_began_ends_with_its_budget_alone_and_in_company(
    rules, model_folder, make_engine, make_request, assert_drawn, marks
):
    model = load(str(model_folder))
    module = load(str(model_folder)).network.module
    requests = [
        thinking(
            rules, make_request(f"r{n}", TEXTS[n % 5], max_tokens=NUM_TOKENS), budget, opens=True, **marks
        )
        for n, budget in enumerate(BUDGETS)
    ]
    plain = make_request("plain", "and without", max_tokens=NUM_TOKENS)
    engine = make_engine(model, kv_budget_bytes=1 << 22)
    together = run(engine, [*requests, plain])
    assert "".join(event.reasoning for event in together["plain"]) == ""
    for request, budget in zip(requests, BUDGETS, strict=True):
        check(request, together[request.id], budget, assert_drawn, module)
    for request, budget in list(zip(requests, BUDGETS, strict=True))[:3]:
        check(request, run(engine, [request])[request.id], budget, assert_drawn, module)


def test_rows_preempted_for_memory_have_the_budget_that_was_left(
    rules, model_folder, make_engine, make_request, assert_drawn
):
    model = load(str(model_folder))
    row_bytes = make_engine(model).scheduler.budget.row_cost.row_bytes(Bucket(PLAIN, 512))
    engine = make_engine(load(str(model_folder)), kv_budget_bytes=2 * row_bytes, prefix_cache_bytes=0)
    requests = [
        thinking(rules, make_request(f"r{n}", TEXTS[n % 5], max_tokens=560), 530 + n, opens=True)
        for n in range(3)
    ]
    events = run(engine, requests)
    assert engine.stats().num_preempted > 0
    assert [events[request.id][-1].num_reasoning_tokens for request in requests] == [530, 531, 532]
    check(requests[-1], events["r2"], 532, assert_drawn, model.network.module)


def test_a_thought_that_the_row_begins_itself_is_counted_from_there(
    rules, model_folder, make_engine, make_request
):
    """The row's own tokens are given by a bias that allows one of two."""
    model = load(str(model_folder))
    x = model.tokenizer.encode("x")[0]
    request = make_request("r", max_tokens=NUM_TOKENS, logit_bias=((x, 100.0),))
    request = thinking(rules, request, 5, opens=False, start="xxx", end="</")
    events = run(make_engine(model), [request])["r"]
    told = model.tokenizer.decode(tokens_of(events))
    # Where it begins another one, that ends at once.
    assert told == "xxx" + "xxxxx" + "</" + "xxx" + "</" + "xxx" + "</" + "xxx" + "<"
    assert events[-1].num_reasoning_tokens == 5
    assert "".join(event.reasoning for event in events) == "xx"


def test_a_budget_below_0_is_refused_by_name(rules):
    with pytest.raises(ValueError, match="thinking_budget is -1"):
        Thinking(rules[0].of(rules[1]), (), -1)
