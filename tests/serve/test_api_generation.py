"""Chat and completions over real HTTP, with the official client: what comes back, and what is refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import openai
import pytest

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

MESSAGES = [{"role": "user", "content": "What is this ticket about?"}]
PROMPT = "hello there, how are you"
FREE = {"ignore_eos": True}


@pytest.fixture(scope="module")
def url(model_folder, make_adapter):
    adapters = [{"name": f"a{i}", "path": make_adapter(i)} for i in (1, 2)]
    config = ServeConfig(model=str(model_folder), name="lively", adapters=adapters, max_rows=8, max_waiting=4)
    runtime = Runtime.start(config)
    with closing(runtime), serving(runtime) as found:
        yield found


def chat(client, **changes):
    fields = {"model": "lively", "messages": MESSAGES, "max_tokens": 24, "seed": 5, "extra_body": FREE}
    return client.chat.completions.create(**{**fields, **changes})


def text_of(chunks) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def counts(usage) -> dict:
    """Tokens, but not how many of them were found in the cache."""
    return usage.model_dump(exclude={"prompt_tokens_details"})


def refused(client_call) -> dict:
    with pytest.raises(openai.APIStatusError) as caught:
        client_call()
    return {"status": caught.value.status_code, **caught.value.body}


@pytest.mark.parametrize("model", ["lively", "a1", "a2@1"])
def test_streaming_and_not_streaming_give_the_same_text(client, model):
    whole = chat(client, model=model)
    chunks = list(chat(client, model=model, stream=True))
    text = whole.choices[0].message.content
    assert text_of(chunks) == text
    assert len(set(text)) > 8
    assert whole.model == model == chunks[0].model
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_stream_what_they_answer_whole(client):
    fields = {"model": "a1", "prompt": PROMPT, "max_tokens": 16, "seed": 3, "extra_body": FREE}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert counts(chunks[-1].usage) == counts(whole.usage)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 16)


def test_a_seed_repeats_its_answer_and_no_seed_does_not(client):
    first, again, other = (chat(client, seed=s).choices[0].message.content for s in (1, 1, 2))
    assert first == again != other
    unseeded = {chat(client, seed=None).choices[0].message.content for _ in range(3)}
    assert len(unseeded) == 3


def test_choices_are_the_answers_of_consecutive_seeds(client):
    alone = [chat(client, seed=7 + i).choices[0].message.content for i in range(3)]
    together = chat(client, seed=7, n=3)
    assert [choice.message.content for choice in together.choices] == alone
    assert together.usage.completion_tokens == 3 * 24
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chat(client, seed=7, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == alone


def test_a_list_of_prompts_is_each_of_them_alone_and_token_ids_are_their_text(client):
    def complete(prompt):
        return client.completions.create(model="a2", prompt=prompt, max_tokens=12, seed=4, extra_body=FREE)

    both = complete([PROMPT, "another prompt"])
    assert [c.text for c in both.choices] == [complete(p).choices[0].text for p in (PROMPT, "another prompt")]
    logged = client.completions.create(model="a2", prompt=PROMPT, max_tokens=1, logprobs=0)
    assert logged.usage.prompt_tokens == len(PROMPT)
    ids = [ord(c) - ord("!") + 3 for c in "hello"]
    assert complete(ids).choices[0].text == complete("hello").choices[0].text
    assert complete([ids, ids]).choices[1].text == complete("hello").choices[0].text


def test_text_ends_before_a_stop_string_streaming_or_not(client):
    text = chat(client).choices[0].message.content
    stop = text[6:8]
    whole = chat(client, stop=[stop, "never"])
    assert whole.choices[0].message.content == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    assert text_of(chat(client, stop=stop, stream=True)) == whole.choices[0].message.content
    assert whole.usage.completion_tokens < 24


def test_a_stream_ends_with_true_usage_if_asked(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert counts(chunks[-1].usage) == counts(chat(client).usage)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 24


def test_logprobs_come_one_a_token_in_both_ways(client):
    whole = chat(client, logprobs=True, top_logprobs=3).choices[0]
    entries = whole.logprobs.content
    assert len(entries) == 24
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    streamed = [
        entry.logprob
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([entry.logprob for entry in entries], abs=1e-4)
    greedy = chat(client, logprobs=True, top_logprobs=2, temperature=0).choices[0].logprobs.content
    assert all(entry.logprob == pytest.approx(entry.top_logprobs[0].logprob) for entry in greedy)
    plain = client.completions.create(
        model="lively", prompt=PROMPT, max_tokens=5, logprobs=2, extra_body=FREE
    )
    assert [len(top) for top in plain.choices[0].logprobs.top_logprobs] == [2] * 5
    assert plain.choices[0].logprobs.text_offset[0] == 0


def test_models_asked_at_once_share_the_engine_and_answer_as_alone(client, http):
    names = ["lively", "a1", "a2", "a1@1"] * 2
    alone = {name: chat(client, model=name).choices[0].message.content for name in set(names)}
    assert len({alone["lively"], alone["a1"], alone["a2"]}) == 3
    steps = _metric(http, "lathe_steps_total")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: chat(client, model=name).choices[0].message.content, names))
    assert answers == [alone[name] for name in names]
    assert _metric(http, "lathe_steps_total") - steps < 8 * 24


def test_a_response_says_which_version_answered(client):
    raw = client.chat.completions.with_raw_response.create(model="a1", messages=MESSAGES, max_tokens=1)
    assert raw.headers["x-lathe-model"] == "a1@1"
    assert raw.parse().model == "a1"


def test_text_parts_and_developer_messages_are_read_as_text_and_system(client):
    parts = [{"type": "text", "text": "What is this "}, {"type": "text", "text": "ticket about?"}]
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices == chat(client).choices
    answers = [
        chat(client, messages=[{"role": role, "content": "Be brief."}, *MESSAGES]).choices
        for role in ("system", "developer")
    ]
    assert answers[0] == answers[1] != chat(client).choices


def test_an_answer_can_be_sent_back_as_the_client_dumps_it(client):
    turn = chat(client).choices[0].message.model_dump()
    assert chat(client, messages=[*MESSAGES, turn, *MESSAGES]).choices[0].message.content


def test_a_request_that_names_no_length_gets_what_remains_of_the_context_at_most(client):
    left = client.completions.create(model="lively", prompt="x" * 1000, extra_body=FREE)
    assert left.usage.completion_tokens == 24


def showing(part: dict) -> dict:
    """What makes a chat of `part` and a text before it."""
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]}


MEDIA = [
    (
        {"type": "image_url", "image_url": {"url": "data:,"}},
        "images are not accepted, this model reads text only",
    ),
    ({"type": "image_url", "image_url": "data:,"}, "a part of type 'image_url'; images are not accepted"),
    ({"type": "input_image", "image_url": "data:,", "detail": "low"}, "images are not accepted"),
    (
        {"type": "image", "image": "x.png", "max_pixels": 5000},
        "a part of type 'image'; images are not accepted",
    ),
    ({"type": "video_url", "video_url": {"url": "x.mp4"}, "fps": 1}, "videos are not accepted"),
    ({"type": "video", "video": ["a.png", "b.png"]}, "videos are not accepted, this model reads text only"),
    ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "sounds are not accepted"),
]
HERE = "messages.0.content.1"
NO_PARTS = [
    ({"type": "file", "file": {}}, f"{HERE}: Input tag 'file' found"),
    ({"type": "image_url"}, f"{HERE}.image_url: missing"),
    ({"type": "image_url", "image_url": {}}, f"{HERE}.image_url.url: missing"),
    ({"type": "image_url", "image_url": {"url": 5}}, f"{HERE}.image_url.url: Input should be a valid string"),
    ({"type": "image_url", "image_url": {"url": ""}}, f"{HERE}.image_url.url: String should have at least"),
    (
        {"type": "image_url", "image_url": {"url": "x", "detail": "fine"}},
        f"{HERE}.image_url.detail: Input should",
    ),
    ({"type": "input_image", "image_url": "x", "file_id": "f"}, f"{HERE}.file_id: found"),
    ({"type": "image", "image": "x", "max_pixels": 0}, f"{HERE}.max_pixels: Input should be greater"),
    ({"type": "video", "video": ["x", ""]}, f"{HERE}.video.1: String should have at least"),
    ({"type": "video_url", "video_url": "x", "fps": "two"}, f"{HERE}.fps: Input should be a valid number"),
]


@pytest.mark.parametrize(
    ("changes", "param", "told"),
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format", "json_schema"),
        ({"tools": [{"type": "function"}]}, "tools", "tools.0.function: missing"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "tools.0: Input tag 'custom'"),
        ({"tool_choice": "required"}, "tool_choice", "found without tools"),
        ({"verbosity": "chatty"}, "verbosity", "'low', 'medium' or 'high'"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "max_tokens is 24"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"stop": ["x"] * 65}, "stop", "at most 64"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 13}, "n", "takes 12 at most"),
        ({"messages": []}, "messages", "at least 1"),
        *((showing(part), HERE, told) for part, told in MEDIA),
        *((showing(part), "messages", told) for part, told in NO_PARTS),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages", "'assistant'"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean temperature"),
        (
            {"extra_body": {"chat_template_kwargs": {"messages": []}}},
            "chat_template_kwargs",
            "set by the server",
        ),
    ],
)
def test_what_chat_does_not_do_is_refused_by_its_name(client, changes, param, told):
    for stream in (False, True):
        if "stream_options" not in changes:
            changes = {**changes, "stream": stream}
        error = refused(lambda changes=changes: chat(client, **changes))
        assert error["status"] == 400
        assert error["param"] == param
        assert told in error["message"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param", "told"),
    [
        ({"suffix": "x"}, "suffix", "null"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [5, 99999]}, "prompt", "99999"),
        ({"prompt": [5, "x"]}, "prompt", "prompt"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"prompt": "x" * 1024}, "prompt", "leaves no room"),
    ],
)
def test_what_completions_do_not_do_is_refused_by_its_name(client, changes, param, told):
    error = refused(lambda: client.completions.create(**{"model": "lively", "prompt": PROMPT, **changes}))
    assert (error["status"], error["param"]) == (400, param)
    assert told in error["message"]


def test_neutral_values_of_what_is_not_done_are_accepted(client):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
    }
    neutral |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "store": False, "n": 1}
    assert chat(client, **neutral).choices == chat(client).choices


def test_an_unknown_model_is_404_and_the_message_names_those_there_are(client):
    every = "lively, a1, a2"
    for model, told in {"nope": every, "a1@7": "there are 1", "lively@1": every}.items():
        error = refused(lambda model=model: chat(client, model=model))
        assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")
        assert told in error["message"]


def test_too_long_has_openais_code_and_no_body_no_model_no_json_are_400(client, http):
    long = [{"role": "user", "content": "x" * 1100}]
    error = refused(lambda: chat(client, messages=long))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "maximum context length is 1024 tokens" in error["message"]  # litellm knows it by these words
    for content, told in ((b"{", "not JSON"), (b"{}", "messages: missing"), (b"[]", "the body")):
        answer = http.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
        assert told in answer.json()["error"]["message"]
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("unnamed", [{}, {"model": ""}, {"model": None}])
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_who_names_no_model_is_answered_by_the_first(http, path, unnamed):
    """As mlx_lm.server's and vLLM's examples ask; Codex leaves it out of what goes on."""
    asked = {"responses": "input", "completions": "prompt"}.get(path, "messages")
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    body = {asked: MESSAGES if asked == "messages" else "Hi", limit: 3, **unnamed}
    answer = http.post(f"/v1/{path}", json=body)
    assert (answer.status_code, answer.json().get("model")) == (200, "lively"), answer.text


def test_what_goes_on_from_a_response_and_names_no_model_has_that_ones(http):
    body = {"input": "Hi", "max_output_tokens": 3}
    first = http.post("/v1/responses", json={**body, "model": "a1"}).json()
    then = http.post("/v1/responses", json={**body, "previous_response_id": first["id"]}).json()
    assert then["model"] == first["model"] == "a1"


def test_every_event_of_a_stream_is_one_json_line_and_the_last_is_done(http):
    body = {"model": "lively", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-lathe-model"] == "lively"
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(
        json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-1]
    )


def _metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))
