"""Streams over real HTTP: signs of life while nothing comes, errors inside them, and usage in every chunk."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import openai
import pytest

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

LONG = {"model": "lively", "prompt": "hello there", "max_tokens": 900, "ignore_eos": True, "stream": True}
SHORT = {**LONG, "max_tokens": 4, "seed": 2}
KEEP_ALIVE = ": keep-alive"


@pytest.fixture
def start(model_folder):
    """start(**config) → (Runtime, URL of its server) with one row; ended after the test."""
    with ExitStack() as stack:

        def begin(**fields) -> tuple[Runtime, str]:
            runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", max_rows=1, **fields))
            stack.callback(runtime.close)
            return runtime, stack.enter_context(serving(runtime))

        yield begin


@contextmanager
def streaming(url: str, **fields) -> Iterator[Iterator[str]]:
    """The lines of a stream; leaving the block closes the connection."""
    with (
        httpx.Client(base_url=url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json={**LONG, **fields}) as answer,
    ):
        assert answer.status_code == 200
        yield answer.iter_lines()


def data_of(lines: list[str]) -> list[dict]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_a_stream_that_waits_shows_signs_of_life_and_then_answers_as_ever(start):
    _, url = start(stream_keep_alive_s=0.02)
    with streaming(url, **SHORT) as lines:
        alone = list(lines)
    with streaming(url) as first:
        next(first)
        with streaming(url, **SHORT) as second:
            signs = [line for _, line in zip(range(6), second, strict=False)]
            assert signs == [KEEP_ALIVE, ""] * 3
            first.close()
            rest = list(second)
    assert rest[-2:] == ["data: [DONE]", ""]
    texts = [[c["choices"][0]["text"] for c in data_of(lines)] for lines in (alone, rest)]
    assert texts[0] == texts[1]
    assert len("".join(texts[0])) > 2


def test_the_official_client_reads_past_signs_of_life(start):
    _, url = start(stream_keep_alive_s=0.01)
    with streaming(url) as first, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        next(first)
        fields = {
            "model": "lively",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 5,
            "seed": 1,
        }
        answer = client.chat.completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
        first.close()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        whole = client.chat.completions.create(**fields, extra_body={"ignore_eos": True})
        assert text == whole.choices[0].message.content


def test_without_signs_of_life_a_stream_says_nothing_before_its_first_token(start):
    runtime, url = start(stream_keep_alive_s=0)
    with ThreadPoolExecutor(1) as pool, streaming(url) as first:
        next(first)
        waiting = pool.submit(httpx.post, f"{url}/v1/completions", json=SHORT, timeout=60)
        while runtime.worker.stats().num_waiting < 1:
            next(first)
        for _ in range(100):  # many times what a sign of life took above
            next(first)
        first.close()
        answer = waiting.result()
    assert KEEP_ALIVE not in answer.text
    assert "[DONE]" in answer.text


def test_an_error_after_the_headers_is_an_event_of_the_stream_and_ends_it(start):
    runtime, url = start(stream_keep_alive_s=0.02)
    with streaming(url) as first:
        next(first)
        with streaming(url, **SHORT) as second:
            assert next(second) == KEEP_ALIVE
            runtime.worker.stop()
            rest = list(second)
    [event] = data_of(rest)
    assert set(event["error"]) == {"message", "type", "param", "code"}
    assert event["error"]["type"] == "server_error"
    assert [line for line in rest if line and line != KEEP_ALIVE][-1].startswith('data: {"error"')


def test_the_official_client_raises_an_error_that_comes_late(start):
    runtime, url = start(stream_keep_alive_s=0.02)
    with streaming(url) as first, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        next(first)
        answer = client.completions.create(model="lively", prompt="x", stream=True)
        runtime.worker.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(answer)


def test_a_refusal_that_comes_at_once_keeps_its_status(start):
    _, url = start(stream_keep_alive_s=0.02, max_waiting=0)
    with streaming(url) as first:
        next(first)
        for fields, status in [({}, 503), ({"model": "nope"}, 404), ({"prompt": "x" * 2000}, 400)]:
            assert httpx.post(f"{url}/v1/completions", json={**SHORT, **fields}).status_code == status


def test_leaving_while_waiting_for_the_first_token_frees_the_row(start):
    runtime, url = start(stream_keep_alive_s=0.02)
    with streaming(url) as first:
        next(first)
        with streaming(url, **SHORT) as second:
            assert next(second) == KEEP_ALIVE
            while (
                not runtime.worker.stats().num_waiting
            ):  # the comment may be from before it reached the engine
                next(first)
        while runtime.worker.stats().num_waiting:
            next(first)
        assert runtime.worker.stats().num_decoding == 1, "the other stream goes on"


@pytest.mark.parametrize("options", [{"include_usage": True}, {}])
def test_continuous_usage_counts_the_tokens_of_each_chunks_choice(start, options):
    _, url = start()
    stream_options = {**options, "continuous_usage_stats": True}
    with streaming(url, **SHORT, n=2, logprobs=0, stream_options=stream_options) as lines:
        chunks = data_of(list(lines))
    counted = {0: [], 1: []}
    for chunk in chunks[:-1]:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == len(LONG["prompt"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        counted[chunk["choices"][0]["index"]].append(usage["completion_tokens"])
    assert counted == {0: [1, 2, 3, 4], 1: [1, 2, 3, 4]}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_a_chat_opens_with_no_token_used(start):
    _, url = start()
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {
        "model": "lively",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 3,
        "logprobs": True,
    }
    body |= {"ignore_eos": True, "stream": True, "stream_options": options}
    lines = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text.splitlines()
    used = [chunk["usage"]["completion_tokens"] for chunk in data_of(lines)]
    assert used == [0, 1, 2, 3, 3, 3]


def test_usage_that_is_asked_for_and_not_is_refused(start):
    _, url = start()
    options = {"include_usage": False, "continuous_usage_stats": True}
    answer = httpx.post(f"{url}/v1/completions", json={**SHORT, "stream_options": options})
    assert answer.status_code == 400
    assert "stream_options.continuous_usage_stats: found true, but" in answer.json()["error"]["message"]


def test_a_failure_before_the_first_token_keeps_its_status(start):
    runtime, url = start(stream_keep_alive_s=30)
    runtime.worker.call(lambda: _break(runtime))
    answer = httpx.post(f"{url}/v1/completions", json=SHORT, timeout=60)
    assert answer.status_code in (500, 503)
    assert answer.json()["error"]["type"] == "server_error"


def _break(runtime: Runtime) -> None:
    runtime.engine._runner.start = None
