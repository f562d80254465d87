"""/v1/responses over real HTTP with the official client: answers, streams, what is remembered, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import httpx
import openai
import pytest
from openai.types import responses
from pydantic import BaseModel
from response_events import check, nameless
from tiny import QWEN3
from transformers import AutoTokenizer
from waiting import until

from serve.api.responses.writer import ResponseWriter
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>"
    "{% endfor %}<|im_end|>\n{% endfor %}{{ reasoning_effort }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CONFIG = {**QWEN3, "vocab_size": 261}
EXTRAS = {"seed": 5, "ignore_eos": True, "logit_bias": {"259": -100}}
"""This model would begin thoughts anywhere."""
ASCII = {str(number): -100 for number in range(97, 259)}
"""Leaves the printable bytes, which stand first in the vocabulary; `"` is the second."""
THINKING = {"enable_thinking": True, "thinking_budget": 6}
ASK = {"model": "m", "input": "What is this about?", "max_output_tokens": 20}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.fixture(scope="module")
def runtime(make_model, make_adapter_of) -> Iterator[Runtime]:
    """A model that thinks where it is told to, and whose template reads all that a message can say."""
    folder = make_model("responder", CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = ServeConfig(
        model=str(folder),
        name="m",
        max_rows=8,
        enable_thinking=False,
        adapters=[{"name": "a1", "path": make_adapter_of(folder, 1)}],
    )
    runtime = Runtime.start(config)
    with closing(runtime):
        yield runtime
        assert runtime.worker.failure is None


@pytest.fixture(scope="module")
def url(runtime) -> Iterator[str]:
    with serving(runtime) as found:
        yield found


def ask(client: openai.OpenAI, **changes) -> responses.Response:
    extras = {**EXTRAS, **changes.pop("extra_body", {})}
    return client.responses.create(**{**ASK, **changes}, extra_body=extras)


def body(**changes) -> dict:
    return {**ASK, **EXTRAS, **changes}


def whole(http: httpx.Client, **changes) -> dict:
    answer = http.post("/v1/responses", json=body(**changes))
    assert answer.status_code == 200, answer.text
    return responses.Response.model_validate(answer.json()).model_dump(by_alias=True) and answer.json()


def streamed(http: httpx.Client, headers=None, **changes) -> list[dict]:
    """The events of a stream, each under its own name."""
    events = []
    with http.stream("POST", "/v1/responses", json=body(stream=True, **changes), headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        name = None
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                assert events[-1]["type"] == name
    return events


def refused(http: httpx.Client, path: str = "/v1/responses", **changes) -> dict:
    answer = http.post(path, json=body(**changes))
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return {**error, "status": answer.status_code}


SHAPES = [
    {},
    {"model": "a1"},
    {**THINKING},
    {**THINKING, "reasoning": {"summary": "auto", "effort": "low"}},
    {
        **THINKING,
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
        "top_logprobs": 2,
    },
    {**THINKING, "include_reasoning": False},
    {"enable_thinking": True, "thinking_budget": 50},
    {"include": ["message.output_text.logprobs"], "ignore_eos": False, "logit_bias": {"2": 4, "259": -100}},
    {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 60},
    {"instructions": "Be brief.", "metadata": {"a": "b"}, "user": "maria", "temperature": 0.5, "top_p": 0.9},
    {"tools": [{"type": "web_search"}, {"type": "local_shell"}], "tool_choice": "auto", "truncation": "auto"},
    {"max_output_tokens": None, "stop": [" "], "store": False},
]


@pytest.mark.parametrize("fields", SHAPES)
def test_a_stream_tells_what_the_same_request_gets_at_once(http, fields):
    found = whole(http, **fields)
    told = check(streamed(http, **fields))
    assert nameless(told) == nameless(found)
    assert found["store"] is fields.get("store", True)
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"]


def test_an_answer_is_the_chats_of_the_same_words(client, http):
    chat = client.chat.completions.create(
        model="m",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        max_tokens=20,
        extra_body={**EXTRAS, **THINKING},
    )
    answer = ask(client, instructions="Be brief.", input="Hello", extra_body=THINKING)
    thought, message = answer.output
    assert answer.output_text == message.content[0].text == chat.choices[0].message.content
    assert thought.content[0].text == chat.choices[0].message.reasoning_content
    assert thought.summary == []
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens == 6
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert message.status == "incomplete"
    assert thought.status == "completed"


def test_the_answer_is_of_the_adapter_that_was_asked(client):
    base, adapted = ask(client), ask(client, model="a1")
    assert adapted.model == "a1"
    assert base.output_text != adapted.output_text
    again = client.chat.completions.create(
        model="a1", messages=[{"role": "user", "content": ASK["input"]}], max_tokens=20, extra_body=EXTRAS
    )
    assert adapted.output_text == again.choices[0].message.content


def test_an_answer_that_ends_is_completed_and_one_that_is_cut_is_not(client):
    ended = ask(client, max_output_tokens=400, extra_body={"stop": ["a", "e", "i"]})
    assert (ended.status, ended.incomplete_details, ended.output[0].status) == (
        "completed",
        None,
        "completed",
    )
    assert ended.completed_at is not None
    cut = ask(client, max_output_tokens=3)
    assert (cut.status, cut.completed_at) == ("incomplete", None)
    assert cut.usage.output_tokens == 3


def test_the_clients_stream_helper_accumulates_the_final_response(client):
    with client.responses.stream(
        **{**ASK, "max_output_tokens": 400}, extra_body={**EXTRAS, **THINKING, "stop": ["e"]}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == text
    assert text
    assert [item.type for item in final.output] == ["reasoning", "message"]


class Ticket(BaseModel):
    """What an answer must be."""

    team: str
    urgent: bool


def test_the_client_parses_answers_of_a_schema(client):
    extras = {"logit_bias": {**ASCII, "4": 9, "259": -100, "260": -100}, "seed": 3}
    parsed = client.responses.parse(
        model="m", input="Route it.", text_format=Ticket, max_output_tokens=300, extra_body=extras
    )
    assert isinstance(parsed.output_parsed, Ticket)
    assert parsed.text.format.type == "json_schema"
    assert parsed.text.format.schema_["properties"].keys() == {"team", "urgent"}
    with client.responses.stream(
        model="m", input="Route it.", text_format=Ticket, max_output_tokens=300, extra_body=extras
    ) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        assert stream.get_final_response().output_parsed == parsed.output_parsed == done[0].parsed


def test_log_probabilities_join_to_the_text_and_are_of_no_thought(client):
    for extras in ({}, THINKING, {**THINKING, "stop": ["e", "a"]}):
        extras = {**extras, "logit_bias": {**ASCII, "259": -100, "260": -100}}
        answer = ask(
            client,
            include=["message.output_text.logprobs"],
            top_logprobs=3,
            max_output_tokens=30,
            extra_body=extras,
        )
        part = answer.output[-1].content[0]
        said = b"".join(bytes(entry.bytes) for entry in part.logprobs)
        assert said.decode().startswith(part.text)
        assert all(len(entry.top_logprobs) == 3 for entry in part.logprobs)
        assert "</think>" not in [entry.token for entry in part.logprobs]
        assert len(part.logprobs) > 1


def test_many_clients_at_once_get_what_each_gets_alone(client):
    def one(number: int) -> str:
        if number % 2:
            return ask(client, input=f"Number {number}").output_text
        events = ask(client, input=f"Number {number}", stream=True)
        return "".join(event.delta for event in events if event.type == "response.output_text.delta")

    alone = [one(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(one, range(8))] == alone
    assert len(set(alone)) == 8


# What is remembered


def test_a_chain_of_responses_is_the_conversation_written_out(client):
    extras = {"temperature": 0, "logit_bias": ASCII | {"259": -100}}
    first = ask(client, instructions="Be brief.", input="Hello", extra_body={**extras, **THINKING})
    second = ask(client, input="And then?", previous_response_id=first.id, extra_body=extras)
    third = ask(
        client, input="Why?", previous_response_id=second.id, instructions="Be long.", extra_body=extras
    )
    items = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "And then?"}]
    written = ask(client, input=items, extra_body=extras)
    assert (written.output_text, written.usage.input_tokens) == (
        second.output_text,
        second.usage.input_tokens,
    )
    items = [*items, *second.output, {"role": "user", "content": "Why?"}]
    written = ask(client, input=items, instructions="Be long.", store=False, extra_body=extras)
    assert (written.output_text, written.usage.input_tokens) == (third.output_text, third.usage.input_tokens)
    assert third.previous_response_id == second.id
    said = [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": first.output_text,
            "reasoning_content": first.output[0].content[0].text,
        },
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "Why?"},
    ]
    chat = client.chat.completions.create(
        model="m", messages=said, max_tokens=20, extra_body={**EXTRAS, **extras}
    )
    assert chat.choices[0].message.content == third.output_text


def test_input_tokens_are_those_of_the_response_that_is_asked_next(client):
    first = ask(client, instructions="Be brief.", input="Hello")
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
    for body in (
        {"input": "Hello"},
        {"input": "Hello", "instructions": "Be brief.", "reasoning": {"effort": "high"}, "tools": [tool]},
        {"input": "More", "previous_response_id": first.id, "instructions": "Be long."},
        {"input": [{"role": "user", "content": "Hello"}, *first.output]},
    ):
        told = client.responses.input_tokens.count(model="m", **body)
        assert told.object == "response.input_tokens"
        assert told.input_tokens == ask(client, **body).usage.input_tokens
    assert client.responses.input_tokens.count(input="Hello").input_tokens > 0
    assert client.responses.input_tokens.count(input="x" * 1500).input_tokens > 1500
    with pytest.raises(openai.BadRequestError, match=r"input: found none"):
        client.responses.input_tokens.count(model="m")
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.responses.input_tokens.count(model="nobody", input="Hello")
    with pytest.raises(openai.BadRequestError, match="personality"):
        client.responses.input_tokens.count(model="m", input="Hello", personality="friendly")


def test_a_second_turn_finds_what_the_first_computed(model_folder):
    extras = {"logit_bias": ASCII, "ignore_eos": True}
    with _own(model_folder) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        told = {"model": "own", "max_output_tokens": 20, "temperature": 0, "extra_body": extras}
        first = client.responses.create(
            input="A long beginning, computed once.", instructions="Be brief.", **told
        )
        second = client.responses.create(
            input="Go on.", instructions="Be brief.", previous_response_id=first.id, **told
        )
        assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_a_streamed_response_can_be_gone_on_from_and_one_that_is_not_stored_cannot(client, http):
    *_, last = ask(client, stream=True)
    assert ask(client, input="More", previous_response_id=last.response.id).status == "incomplete"
    lost = ask(client, store=False)
    error = refused(http, previous_response_id=lost.id)
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
    assert lost.id in error["message"]


def test_a_response_can_be_asked_for_its_input_listed_and_forgotten(client, http):
    made = ask(
        client,
        input=[
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
        ],
    )
    assert client.responses.retrieve(made.id) == made
    items = client.responses.input_items.list(made.id, order="asc").data
    assert [item.content[0].text for item in items] == ["one", "two", "three"]
    newest = client.responses.input_items.list(made.id, limit=2)
    assert [item.content[0].text for item in newest.data] == ["three", "two"]
    assert newest.has_more
    assert [item.content[0].text for item in newest] == ["three", "two", "one"]  # by its pages
    for query, name in (("limit=0", "limit"), ("order=up", "order"), ("after=msg_nowhere", "after")):
        wrong = http.get(f"/v1/responses/{made.id}/input_items?{query}")
        assert wrong.status_code == 400
        assert (wrong.json()["error"]["param"], wrong.json()["error"]["message"].split(":")[0]) == (
            name,
            name,
        )
    client.responses.delete(made.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as error:
            call(made.id)
        assert error.value.body["code"] == "response_not_found"


def test_items_that_are_referred_to_stand_where_they_are_named(client, http):
    made = ask(client, input="Hello")
    asked = client.responses.input_items.list(made.id).data[0]
    told = [
        {"type": "item_reference", "id": asked.id},
        {"id": made.output[0].id},
        {"role": "user", "content": "x"},
    ]
    referring = ask(client, input=told)
    chained = ask(client, input="x", previous_response_id=made.id)
    assert referring.output_text == chained.output_text
    assert [item.id for item in client.responses.input_items.list(referring.id, order="asc")][:2] == [
        asked.id,
        made.output[0].id,
    ]
    error = refused(http, input=[{"type": "item_reference", "id": "msg_nowhere"}])
    assert (error["param"], "input.0.id" in error["message"]) == ("input", True)


def test_nobody_reads_another_tenants_responses(client, http):
    made = client.responses.create(**ASK, extra_headers={"X-Tenant": "one"})
    assert http.get(f"/v1/responses/{made.id}").status_code == 404
    assert http.get(f"/v1/responses/{made.id}", headers={"X-Tenant": "two"}).status_code == 404
    assert http.get(f"/v1/responses/{made.id}", headers={"X-Tenant": "one"}).status_code == 200
    assert refused(http, previous_response_id=made.id)["code"] == "previous_response_not_found"
    assert refused(http, input=[{"id": made.output[0].id}])["param"] == "input"


# Ends that come early


def rows(runtime: Runtime) -> int:
    stats = runtime.worker.stats()
    return stats.num_decoding + stats.num_prefilling + stats.num_waiting


def wait_until_free(runtime: Runtime, client: openai.OpenAI) -> None:
    for _ in range(200):
        if not rows(runtime):
            return
        client.models.list()
    raise AssertionError(f"{rows(runtime)} rows are still taken")


def test_closing_a_stream_frees_its_row_and_keeps_nothing(client, runtime):
    before = runtime.worker.stats().num_generated_tokens
    stream = ask(client, stream=True, max_output_tokens=900)
    first = next(iter(stream))
    assert rows(runtime) == 1
    stream.close()
    wait_until_free(runtime, client)
    assert runtime.worker.stats().num_generated_tokens - before < 850, "it went on to its end"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.response.id)


def test_a_response_that_runs_is_seen_and_can_be_cancelled(client, http, runtime):
    events = iter(ask(client, stream=True, max_output_tokens=900))
    created = next(events)
    seen = [next(events) for _ in range(8)]
    running = client.responses.retrieve(created.response.id)
    assert running.status == "in_progress"
    cancelled = client.responses.cancel(created.response.id)
    assert cancelled.status == "cancelled"
    rest = list(events)
    told = check([event.model_dump(by_alias=True, exclude_unset=True) for event in (created, *seen, *rest)])
    assert told["status"] == "cancelled"
    assert 0 < told["usage"]["output_tokens"] < 900
    wait_until_free(runtime, client)
    kept = client.responses.retrieve(created.response.id)
    assert (kept.status, kept.output_text) == ("cancelled", told["output"][0]["content"][0]["text"])
    assert client.responses.cancel(created.response.id) == kept
    ended = ask(client)
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client.responses.cancel(ended.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_nowhere")


def polled(client, id: str):
    """As OpenAI's documentation has it, without the sleep."""
    while (response := client.responses.retrieve(id)).status in ("queued", "in_progress"):
        pass
    return response


def test_a_response_in_the_background_is_made_while_nobody_waits_and_is_the_same(client, http, runtime):
    wanted = ask(client, temperature=0)
    begun = ask(client, temperature=0, background=True)
    assert begun.status in ("queued", "in_progress")
    assert (begun.background, begun.output) == (True, [])
    ended = polled(client, begun.id)
    assert (ended.status, ended.background, ended.id) == (wanted.status, True, begun.id)
    assert (ended.output_text, ended.usage.output_tokens) == (wanted.output_text, wanted.usage.output_tokens)
    after = ask(client, previous_response_id=begun.id, temperature=0)
    assert after.usage.input_tokens > ended.usage.input_tokens + ended.usage.output_tokens
    body = {**ASK, **EXTRAS, "background": True, "max_output_tokens": 900}
    running = http.post("/v1/responses", json=body).json()
    status = http.get("/v1/status").json()
    assert any("/v1/responses" in str(each) for each in status["requests"]), status
    cancelled = client.responses.cancel(running["id"])
    assert cancelled.status == "cancelled"
    kept = polled(client, running["id"])
    assert (kept.status, kept.incomplete_details) == ("cancelled", None)
    assert kept.usage.output_tokens < 900
    wait_until_free(runtime, client)
    assert client.responses.delete(running["id"]) is None
    running = http.post("/v1/responses", json=body).json()
    assert http.delete(f"/v1/responses/{running['id']}").json()["deleted"], "one that runs ends, too"
    wait_until_free(runtime, client)
    assert http.get(f"/v1/responses/{running['id']}").status_code == 404


def test_what_cannot_be_made_in_the_background_is_refused_at_once(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nobody", input="x", background=True)
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(client, input="x" * 3000, background=True)


def test_a_response_in_the_background_fails_with_its_server_and_says_so(model_folder):
    with _own(model_folder) as (runtime, url), httpx.Client(base_url=url, timeout=60) as http:
        body = {"model": "own", "input": "x", "background": True, "ignore_eos": True}
        begun = http.post("/v1/responses", json=body).json()
        runtime.worker.stop()
        while (told := http.get(f"/v1/responses/{begun['id']}").json())["status"] in (
            "queued",
            "in_progress",
        ):
            pass
        assert (told["status"], told["error"]["code"]) == ("failed", "server_error")


def test_a_response_in_the_background_that_breaks_as_nobody_foresaw_has_failed(model_folder, monkeypatch):
    async def broken(self: ResponseWriter) -> None:
        raise KeyError("nobody foresaw it")

    monkeypatch.setattr(ResponseWriter, "next", broken)
    with _own(model_folder) as (_, url), httpx.Client(base_url=url, timeout=60) as http:
        begun = http.post("/v1/responses", json={"model": "own", "input": "x", "background": True}).json()
        until(lambda: http.get(f"/v1/responses/{begun['id']}").json().get("status") != "queued")
        told = http.get(f"/v1/responses/{begun['id']}").json()
    assert (told["status"], told["error"]["code"]) == ("failed", "server_error")
    assert "KeyError" in told["error"]["message"]
    assert "nobody foresaw" not in told["error"]["message"]


def test_a_stream_that_breaks_tells_so_and_the_client_raises(make_model, model_folder):
    with (
        _own(model_folder, stream_keep_alive_s=0.02) as (runtime, url),
        httpx.Client(base_url=url, timeout=60) as http,
        http.stream("POST", "/v1/responses", json={"model": "own", "input": "x", "stream": True}) as first,
    ):
        lines = first.iter_lines()
        next(lines)
        with http.stream(
            "POST", "/v1/responses", json={"model": "own", "input": "x", "stream": True}
        ) as other:
            waiting = other.iter_lines()
            assert next(waiting) == ": keep-alive"
            runtime.worker.stop()
            late = [json.loads(line[6:]) for line in waiting if line.startswith("data: ")]
        begun = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    for events in (late, begun):
        told = check(events)
        assert told["status"] == "failed"
        assert told["error"]["code"] == "server_error"
        assert [event["type"] for event in events[-2:]] == ["response.failed", "error"]
        assert events[-1]["message"] == told["error"]["message"]
    assert told["output"][0]["status"] == "incomplete"


def test_the_client_raises_where_a_stream_breaks(model_folder):
    with (
        _own(model_folder) as (runtime, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.responses.create(model="own", input="x", stream=True, extra_body={"ignore_eos": True})
        seen = []

        def read() -> None:
            for event in stream:
                seen.append(event.type)
                if len(seen) == 6:
                    runtime.worker.stop()

        with pytest.raises(openai.APIError, match="shutting down"):
            read()
    assert seen[-1] == "response.failed"


@contextmanager
def _own(folder, **keys) -> Iterator[tuple[Runtime, str]]:
    """A server of its own, with one row."""
    runtime = Runtime.start(ServeConfig(model=str(folder), name="own", max_rows=1, **keys))
    try:
        with serving(runtime) as url:
            yield runtime, url
    finally:
        runtime.close()


def test_a_refusal_before_the_first_event_has_its_own_status(client, http):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, stream=True, input="x" * 5000)
    assert error.value.body["code"] == "context_length_exceeded"
    assert error.value.body["param"] == "input"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="nobody", stream=True)
    assert missing.value.body["param"] == "model"


# What does not fit


def test_truncation_leaves_out_the_oldest_turns_and_never_the_instructions_or_the_last_words(client, http):
    past = [
        item
        for number in range(40)
        for item in (
            {"role": "user", "content": f"question {number} " + "x" * 30},
            {"role": "assistant", "content": f"answer {number} " + "y" * 30},
        )
    ]
    items = [*past, {"role": "user", "content": "the last"}]
    assert refused(http, input=items, instructions="Be brief.")["code"] == "context_length_exceeded"
    short = ask(client, input=items, instructions="Be brief.", truncation="auto")
    assert short.truncation == "auto"
    assert 600 < short.usage.input_tokens < 1024
    tails = [[*past[first:], items[-1]] for first in range(0, len(past), 2)]
    answers = [answer for tail in tails if (answer := _fitting(client, tail, instructions="Be brief."))]
    assert short.output_text in answers
    nothing = refused(http, input="x" * 5000, truncation="auto")
    assert nothing["code"] == "context_length_exceeded"


def test_truncation_takes_a_call_away_with_its_result(client):
    steps = [
        item
        for number in range(30)
        for item in (
            {
                "type": "function_call",
                "call_id": f"c{number}",
                "name": "look",
                "arguments": f'{{"at": {number}}}',
            },
            {"type": "function_call_output", "call_id": f"c{number}", "output": "z" * 40},
        )
    ]
    items = [{"role": "user", "content": "Look around."}, *steps]
    short = ask(client, input=items, truncation="auto")
    answers = [_fitting(client, [items[0], *steps[first:]]) for first in range(0, len(steps), 2)]
    assert short.output_text in answers


def _fitting(client: openai.OpenAI, items: list[dict], **changes) -> str | None:
    """The answer to what fits the context."""
    try:
        return ask(client, input=items, **changes).output_text
    except openai.BadRequestError:
        return None
