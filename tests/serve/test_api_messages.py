"""Anthropic's Messages over real HTTP with the official client: blocks, usage, events, errors, what agents send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message
from tiny import QWEN3, running
from transformers import AutoTokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CONFIG = {**QWEN3, "vocab_size": 261, "max_position_embeddings": 2048}
HELLO = [{"role": "user", "content": "hello there"}]
# This model would begin thoughts anywhere.
EXTRA = {"ignore_eos": True, "seed": 5, "logit_bias": {"259": -100}}
THINK = {"type": "enabled", "budget_tokens": 6}


@pytest.fixture(scope="module")
def thinker(make_model):
    """A model whose template begins a thought, and whose vocabulary has a token for each mark."""
    folder = make_model("messenger", CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(thinker):
    with running(thinker) as (_, url):
        yield url


@pytest.fixture(scope="module")
def claude(url) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
def start(thinker):
    """start(**config) → (Runtime, URL, client) of a server with one row; ended after the test."""
    with ExitStack() as stack:

        def begin(**keys):
            runtime, url = stack.enter_context(running(thinker, **{"max_rows": 1, **keys}))
            client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
            return runtime, url, stack.enter_context(client)

        yield begin


def asked(**fields) -> dict[str, Any]:
    extra = fields.pop("extra_body", {})
    # The official client has no argument for these any more; the API takes them.
    extra |= {name: fields.pop(name) for name in ("temperature", "top_k", "top_p") if name in fields}
    said = {"model": "m", "max_tokens": 20, "messages": HELLO}
    return {**said, "extra_body": {"temperature": 1.0, **EXTRA, **extra}, **fields}


def plain(message: Message) -> dict[str, Any]:
    """What must be the same of an answer however it came."""
    return message.to_dict(mode="json", exclude_none=True) | {"id": "", "usage": {}}


def alike(claude: anthropic.Anthropic, **fields) -> Message:
    """The whole answer, which the streamed one equals: by the helper, and joined by hand."""
    whole = claude.messages.create(**asked(**fields))
    with claude.messages.stream(**asked(**fields)) as stream:
        events = [event.to_dict() for event in stream]
        final = stream.get_final_message()
    assert plain(final) == plain(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.output_tokens_details == whole.usage.output_tokens_details
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + usage.cache_read_input_tokens == counted(claude, **fields)
    assert final.id.startswith("msg_")
    assert whole._request_id
    assert final.id != whole.id
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds.count("message_start") == kinds.count("message_delta") == kinds.count("message_stop") == 1
    assert kinds[-2:] == ["message_delta", "message_stop"]
    began = events[0]["message"]["usage"]
    assert began["input_tokens"] + began["cache_read_input_tokens"] == counted(claude, **fields)
    return whole


def counted(claude: anthropic.Anthropic, **fields) -> int:
    known = ("messages", "system", "thinking", "tools", "tool_choice", "output_config")
    said = {"messages": HELLO, **{name: fields[name] for name in known if name in fields}}
    return claude.messages.count_tokens(model="m", **said).input_tokens


def chat(url: str, messages: list[dict], **fields) -> dict[str, Any]:
    body = {"model": "m", "messages": messages, "max_tokens": 20, "temperature": 1.0, **EXTRA, **fields}
    found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def test_an_answer_is_the_chats_of_the_same_words_and_seed(claude, url):
    for fields, same in [
        ({}, {}),
        ({"system": "Be kind."}, {"messages": [{"role": "system", "content": "Be kind."}, *HELLO]}),
        ({"top_k": 5, "top_p": 0.8, "temperature": 0.7}, {"top_k": 5, "top_p": 0.8, "temperature": 0.7}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"thinking": THINK}, {"enable_thinking": True, "thinking_budget": 6}),
    ]:
        message = alike(claude, **fields)
        expected = chat(url, **{"messages": HELLO, **same})
        said = expected["choices"][0]["message"]
        assert "".join(block.text for block in message.content if block.type == "text") == said["content"]
        thoughts = "".join(block.thinking for block in message.content if block.type == "thinking")
        assert thoughts == (said["reasoning_content"] or "")
        usage = message.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == expected["usage"]["prompt_tokens"]
        assert usage.output_tokens == expected["usage"]["completion_tokens"] == 20
        assert message.stop_reason == "max_tokens"


def test_thoughts_are_a_block_of_their_own_before_the_answer(claude):
    message = alike(claude, thinking=THINK)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].signature == ""
    assert message.usage.output_tokens_details.thinking_tokens == 6
    hidden = alike(claude, thinking={**THINK, "display": "omitted"})
    assert [block.type for block in hidden.content] == ["text"]
    assert hidden.content[0].text == message.content[1].text
    assert hidden.usage.output_tokens_details.thinking_tokens == 6


def test_thoughts_that_are_sent_back_are_told_to_the_template(claude, url):
    message = alike(claude, thinking=THINK)
    back = [*HELLO, {"role": "assistant", "content": message.content}, *HELLO]
    thought, said = message.content
    turn = {"role": "assistant", "content": said.text, "reasoning_content": thought.thinking}
    expected = chat(url, [HELLO[0], turn, HELLO[0]])["usage"]["prompt_tokens"]
    assert counted(claude, messages=back) == expected
    assert alike(claude, messages=back).content


def test_a_stop_sequence_ends_the_answer_and_is_told(claude):
    text = alike(claude, thinking={"type": "disabled"}).content[0].text
    stop = next(char for char in text[2:] if char.isascii() and char.isprintable() and not char.isspace())
    message = alike(claude, thinking={"type": "disabled"}, stop_sequences=["never said", stop])
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == stop
    assert message.content[0].text == text.partition(stop)[0]


def test_an_answer_that_ends_by_itself_ends_its_turn(claude):
    ended = {"extra_body": {"ignore_eos": False, "logit_bias": {"2": 100}, "min_tokens": 3}}
    message = alike(claude, thinking={"type": "disabled"}, **ended)
    assert message.stop_reason == "end_turn"
    assert message.stop_sequence is None


def test_an_answer_goes_on_from_a_last_turn_of_the_assistants(claude, url):
    prefill = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "The answer is ("}]}]
    message = alike(claude, messages=prefill)
    begun = [*HELLO, {"role": "assistant", "content": "The answer is ("}]
    expected = chat(url, begun, continue_final_message=True)
    assert message.content[-1].text == expected["choices"][0]["message"]["content"]


def test_answers_keep_to_a_schema(claude):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = alike(
        claude,
        output_config=config,
        thinking={"type": "disabled"},
        max_tokens=60,
        extra_body={"ignore_eos": False},
    )
    assert json.loads(message.content[0].text)["a"] in ("x", "y")
    assert message.stop_reason == "end_turn"


def test_what_was_read_before_is_told_apart_and_counts_once(claude):
    words = [{"role": "user", "content": "what nobody else has said: " + "x" * 80}]
    warmed = claude.messages.create(**asked(messages=words, max_tokens=0))
    assert warmed.content == []
    assert (warmed.stop_reason, warmed.usage.output_tokens) == ("max_tokens", 0)
    again = claude.messages.create(**asked(messages=words))
    total = counted(claude, messages=words)
    assert warmed.usage.input_tokens + warmed.usage.cache_read_input_tokens == total
    assert warmed.usage.input_tokens > 80
    assert again.usage.cache_read_input_tokens > 80
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == total
    with claude.messages.stream(**asked(messages=words, max_tokens=0)) as stream:
        assert stream.get_final_message().content == []


def test_a_line_that_changes_with_every_request_does_not_spoil_the_cache(claude):
    def ask(number: int) -> Message:
        line = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.37; cch={number};"}
        rest = {"type": "text", "text": "You are an agent. " * 5, "cache_control": {"type": "ephemeral"}}
        return claude.messages.create(**asked(system=[line, rest]))

    first, second = ask(11111), ask(22222)
    assert (
        second.usage.cache_read_input_tokens
        >= first.usage.input_tokens + first.usage.cache_read_input_tokens - 1
    )


def test_streams_of_the_asynchronous_client_can_be_left(start):
    runtime, _, claude = start()
    with claude.messages.stream(**asked(max_tokens=1500)) as stream:
        for event in stream:
            if event.type == "text":
                break
        assert runtime.worker.stats().num_decoding == 1
    with claude.messages.stream(**asked(max_tokens=3)) as stream:  # it has the only row
        assert stream.get_final_message().usage.output_tokens == 3
    assert runtime.worker.stats().num_decoding == 0


def test_a_stream_that_waits_pings_and_then_answers_as_ever(start):
    _, url, claude = start(stream_keep_alive_s=0.01)
    alone = claude.messages.create(**asked(max_tokens=4, thinking={"type": "disabled"}))
    with claude.messages.stream(**asked(max_tokens=1500)) as first:
        next(iter(first))
        body = {**asked(max_tokens=4, thinking={"type": "disabled"}), "stream": True}
        body |= body.pop("extra_body")
        with httpx.stream("POST", f"{url}/v1/messages?beta=true", json=body, timeout=60) as second:
            lines = second.iter_lines()
            pings = [next(lines) for _ in range(6)]
            assert pings == ["event: ping", 'data: {"type":"ping"}', ""] * 2
            waiting = claude.messages.create(
                **asked(max_tokens=4), stream=True
            )  # the official client skips them
            first.close()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert next(event["type"] for event in events if event["type"] != "ping") == "message_start"
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(delta.get("text", "") for delta in deltas) == alone.content[-1].text
        assert [event.type for event in waiting][-1] == "message_stop"


def test_an_error_after_the_headers_is_an_event_that_the_client_raises(start):
    runtime, _, claude = start(stream_keep_alive_s=0.01)
    with claude.messages.stream(**asked(max_tokens=1500)) as first:
        next(iter(first))
        second = claude.messages.create(**asked(), stream=True)
        runtime.worker.stop()
        with pytest.raises(anthropic.APIStatusError, match="shutting down") as caught:
            list(second)
    assert set(caught.value.body) == {"type", "error", "request_id"}
    assert caught.value.body["error"]["type"] == "api_error"
    assert caught.value.body["request_id"] == caught.value.request_id is not None


def test_a_server_that_is_full_says_so_and_the_client_asks_again(start):
    _, url, claude = start(max_waiting=0)
    with claude.messages.stream(**asked(max_tokens=1500)) as first:
        next(iter(first))
        for ask in (claude.messages.create, lambda **fields: claude.messages.create(stream=True, **fields)):
            with pytest.raises(anthropic.APIStatusError) as caught:
                ask(**asked())
            assert caught.value.status_code == 529
            assert caught.value.body["error"]["type"] == "overloaded_error"
            assert int(caught.value.response.headers["retry-after"]) >= 1
        with anthropic.Anthropic(base_url=url, api_key="x", max_retries=1) as patient:
            first.close()
            assert patient.messages.create(**asked(max_tokens=2)).usage.output_tokens == 2


@pytest.mark.parametrize(
    ("fields", "kind", "named"),
    [
        ({"model": "nope"}, anthropic.NotFoundError, "nope"),
        ({"max_tokens": -1}, anthropic.BadRequestError, "max_tokens"),
        ({"temperature": -1}, anthropic.BadRequestError, "temperature"),
        ({"extra_body": {"stop_sequencs": ["a"]}}, anthropic.BadRequestError, "did you mean stop_sequences"),
        ({"messages": [{"role": "tool", "content": "x"}]}, anthropic.BadRequestError, "messages.0.role"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        (
            {"messages": [{"role": "user", "content": "x" * 3000}]},
            anthropic.BadRequestError,
            r"prompt is too long: \d+ tokens > 2047 maximum",
        ),
        (
            {
                "system": "s",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}],
                    }
                ],
            },
            anthropic.BadRequestError,
            r"messages\.0\.content\.0: .*reads text only",
        ),
    ],
)
def test_errors_are_worded_as_the_official_client_reads_them(claude, fields, kind, named):
    for ask in (claude.messages.create, lambda **said: claude.messages.create(stream=True, **said)):
        with pytest.raises(kind, match=named) as caught:
            ask(**asked(**fields))
        error = caught.value.body
        assert set(error) == {"type", "error", "request_id"}
        assert error["type"] == "error"
        assert set(error["error"]) == {"type", "message"}
        assert error["request_id"] == caught.value.request_id is not None
        expected = "not_found_error" if kind is anthropic.NotFoundError else "invalid_request_error"
        assert error["error"]["type"] == expected


def test_errors_of_the_protocol_have_the_same_shape(url):
    bad, json_type = "invalid_request_error", {"content-type": "application/json"}
    with httpx.Client(base_url=url, timeout=60) as http:
        for answer, status, kind in [
            (http.get("/v1/messages"), 405, bad),
            (http.post("/v1/messages/nowhere", json={}), 404, "not_found_error"),
            (http.post("/v1/messages", content=b"{}", headers={"content-type": "text/plain"}), 415, bad),
            (http.post("/v1/messages", content=b"{", headers=json_type), 400, bad),
            (http.post("/v1/messages", json={}), 400, bad),
            (http.post("/v1/messages/count_tokens", json={}), 400, bad),
        ]:
            assert answer.status_code == status
            assert answer.json()["type"] == "error"
            assert answer.json()["error"]["type"] == kind
        # Agents are often told a base URL that ends in /v1.
        twice = http.post("/v1/v1/messages", json={})
        assert twice.status_code == 404
        assert "one /v1 too many" in twice.json()["error"]["message"]


def test_thoughts_that_a_model_does_not_have_are_a_wish(model_folder):
    with (
        running(model_folder) as (_, url),
        anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as claude,
    ):
        said = {
            "model": "m",
            "max_tokens": 8,
            "messages": HELLO,
            "extra_body": {"seed": 1, "ignore_eos": True},
        }
        without = claude.messages.create(**said)
        for thinking in (THINK, {"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled"}):
            assert plain(claude.messages.create(**said | {"thinking": thinking})) == plain(without)
