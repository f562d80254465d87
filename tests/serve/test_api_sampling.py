"""How tokens are drawn, over HTTP: every field on both endpoints, good and bad, with the official client where it has
them; echo, best_of, the prompt's log-probabilities, and the defaults of model and server."""

from __future__ import annotations

import json
import shutil

import httpx
import numpy as np
import pytest

from serve.api.server import serving
from serve.config import ServeConfig
from serve.errors import ConfigError
from serve.model.generation_config import SamplingDefaults, read_defaults
from serve.runtime import Runtime

PROMPT = "hello there, how are you"
PATHS = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def runtime(model_folder, make_adapter):
    adapters = [{"name": "a1", "path": make_adapter(1)}]
    found = Runtime.start(
        ServeConfig(model=str(model_folder), name="lively", adapters=adapters, max_rows=8, max_waiting=8)
    )
    yield found
    found.close()


@pytest.fixture(scope="module")
def url(runtime):
    with serving(runtime) as found:
        yield found


def body(path: str, **fields) -> dict:
    said = {"prompt": PROMPT}
    if "chat" in path:
        said = {"messages": [{"role": "user", "content": PROMPT}]}
    return {
        **{"model": "lively", "max_tokens": 16, "temperature": 0, "seed": 3, "ignore_eos": True},
        **said,
        **fields,
    }


def ask(http, path: str, **fields) -> list[str]:
    """The answers' texts."""
    answer = http.post(path, json=body(path, **fields))
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("changes", "neutral"),
    [
        ({"repetition_penalty": 3.0}, {"repetition_penalty": 1}),
        ({"repetition_penalty": 3.0, "repetition_context_size": 30}, {}),
        ({"presence_penalty": 2}, {"presence_penalty": 0}),
        ({"presence_penalty": 2, "presence_context_size": 40}, {}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 0}),
        ({"frequency_penalty": 2, "frequency_context_size": 40}, {}),
        ({"logit_bias": {"70": 100}}, {"logit_bias": {}}),
        ({"temperature": 1.5, "top_n_sigma": 0.4}, {}),
        ({"temperature": 1.5, "xtc_probability": 1.0, "xtc_threshold": 0.01}, {}),
    ],
)
def test_each_field_changes_what_is_drawn_and_its_neutral_value_does_not(http, path, changes, neutral):
    tuned = {name: changes[name] for name in ("temperature",) if name in changes}
    plain = ask(http, path, max_tokens=40, **tuned)
    assert ask(http, path, max_tokens=40, **tuned, **neutral) == plain
    assert ask(http, path, max_tokens=40, **dict.fromkeys(changes) | tuned) == plain
    assert ask(http, path, max_tokens=40, **changes) != plain


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("changes", "param", "told"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"repetition_penalty": "much"}, "repetition_penalty", "valid number"),
        ({"repetition_context_size": 5}, "repetition_context_size", "beside repetition_penalty only"),
        ({"repetition_penalty": 2, "repetition_context_size": 0}, "repetition_context_size", "greater than"),
        ({"presence_penalty": 2.1}, "presence_penalty", "less than or equal to 2"),
        ({"presence_context_size": 5}, "presence_context_size", "beside presence_penalty only"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"frequency_context_size": 5}, "frequency_context_size", "beside frequency_penalty only"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "expected a token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "expected a token id"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "expected a token id"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "expected a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "valid number"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "twice"),
        ({"logit_bias": {"259": 1}}, "logit_bias", "259 is not in this model's vocabulary"),
        ({"logit_bias": [5]}, "logit_bias", "valid dictionary"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 17}, "min_tokens", "at most 16 tokens"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "300 is not in"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "-1 is not in"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids", "valid integer"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids", "at most 128"),
        ({"top_n_sigma": -1}, "top_n_sigma", "greater than or equal to 0"),
        ({"xtc_probability": 1.1}, "xtc_probability", "less than or equal to 1"),
        ({"xtc_probability": 1, "xtc_threshold": 0.6}, "xtc_threshold", "less than or equal to 0.5"),
        ({"xtc_threshold": 0.1}, "xtc_threshold", "beside xtc_probability only"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream: false"),
        ({"repetiton_penalty": 1}, "repetiton_penalty", "did you mean repetition_penalty"),
    ],
)
def test_what_says_nothing_is_a_400_that_names_the_field(http, path, changes, param, told):
    answer = http.post(path, json=body(path, **changes))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert told in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "told"),
    [
        ({"best_of": 1, "n": 2}, "best_of", "n is 2"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"best_of": 129}, "best_of", "128"),
        ({"best_of": 100}, "best_of", "best_of: this asks for 100 answers"),
        ({"max_tokens": 0}, "max_tokens", "with echo: true"),
        ({"echo": "yes"}, "echo", "boolean"),
    ],
)
def test_what_completions_cannot_do_is_refused_by_its_name(http, changes, param, told):
    answer = http.post(PATHS[1], json=body(PATHS[1], **changes))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert told in error["message"]


def test_chat_knows_no_best_of_and_no_echo(http):
    for field in ({"best_of": 2}, {"echo": True}):
        assert http.post(PATHS[0], json=body(PATHS[0], **field)).status_code == 400


def test_openais_own_fields_by_its_own_client(client, runtime):
    asked = {"model": "lively", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}
    forced = client.chat.completions.create(**asked, logit_bias={"80": 100}, temperature=0)
    assert len(set(forced.choices[0].message.content)) == 1
    varied = client.chat.completions.create(
        **asked,
        logit_bias={"80": 100},
        frequency_penalty=2,
        presence_penalty=2,
        temperature=0,
        top_logprobs=20,
        logprobs=True,
    )
    # 100 is more than a dozen times 2, and log-probabilities are the model's own.
    assert varied.choices[0].message.content == forced.choices[0].message.content
    entries = varied.choices[0].logprobs.content
    assert {len(entry.top_logprobs) for entry in entries} == {20}
    assert all(entry.logprob < -1 for entry in entries), "a bias shows in no log-probability"
    banned = client.completions.create(
        model="lively",
        prompt=PROMPT,
        max_tokens=40,
        temperature=1,
        seed=1,
        logit_bias={str(i): -100 for i in range(60, 259)},
        extra_body={"ignore_eos": True, "top_k": 9},
    )
    ids = runtime.model.tokenizer.encode(banned.choices[0].text, add_special_tokens=False)
    assert len(ids) > 20
    assert max(ids) < 60


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_ends_the_answer_and_is_told_and_min_tokens_keep_it_off(http, path, stream):
    ends = list(range(40, 130))

    def last(**fields):
        answer = http.post(path, json=body(path, stream=stream, temperature=1, **fields))
        if not stream:
            return answer.json()["choices"][0]
        lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
        return [choice for line in lines for choice in json.loads(line)["choices"]][-1]

    stopped = last(stop_token_ids=ends)
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] in ends
    held = last(stop_token_ids=ends, min_tokens=16)
    assert (held["finish_reason"], held["stop_reason"]) == ("length", None)


def test_a_stop_string_counts_from_min_tokens_on(http):
    text = ask(http, PATHS[1], max_tokens=30)[0]
    wanted = text[3]
    assert ask(http, PATHS[1], max_tokens=30, stop=wanted)[0] == text[: text.index(wanted)]
    held = ask(http, PATHS[1], max_tokens=30, stop=wanted, min_tokens=12)[0]
    assert len(held) >= 12
    assert text.startswith(held)


def test_echo_gives_the_prompt_and_what_the_model_thinks_of_it(client, http):
    asked = {"model": "lively", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    plain = client.completions.create(**asked, prompt=[PROMPT, "other"], logprobs=3, n=1)
    echoed = client.completions.create(**asked, prompt=[PROMPT, "other"], logprobs=3, n=1, echo=True)
    for without, choice, prompt in zip(plain.choices, echoed.choices, (PROMPT, "other"), strict=True):
        assert choice.text == prompt + without.text
        said, count = choice.logprobs, len(prompt)
        assert "".join(said.tokens[:count]) == prompt
        assert said.tokens[count:] == without.logprobs.tokens
        assert said.token_logprobs[0] is None
        assert said.top_logprobs[0] is None
        assert all(len(top) >= 3 for top in said.top_logprobs[1:])
        assert said.text_offset[: count + 1] == list(range(count + 1))
        assert [offset - count for offset in said.text_offset[count:]] == without.logprobs.text_offset
        np.testing.assert_allclose(said.token_logprobs[count:], without.logprobs.token_logprobs, atol=1e-3)
    alone = http.post(
        PATHS[1], json=body(PATHS[1], prompt=PROMPT, echo=True, max_tokens=0, logprobs=0)
    ).json()
    assert alone["choices"][0]["text"] == PROMPT
    assert alone["usage"]["completion_tokens"] == 0
    np.testing.assert_allclose(
        alone["choices"][0]["logprobs"]["token_logprobs"][1:],
        echoed.choices[0].logprobs.token_logprobs[1 : len(PROMPT)],
        atol=1e-3,
    )
    from_ids = ask(http, PATHS[1], prompt=list(range(100, 110)), echo=True, max_tokens=3)
    assert len(from_ids[0]) == 13


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_streamed_echo_is_the_whole_one(client, logprobs):
    asked = {"model": "a1", "prompt": PROMPT, "max_tokens": 9, "seed": 4, "echo": True, "n": 2}
    asked |= {"logprobs": logprobs, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**asked)
    chunks = [choice for chunk in client.completions.create(**asked, stream=True) for choice in chunk.choices]
    for index, choice in enumerate(whole.choices):
        own = [piece for piece in chunks if piece.index == index]
        assert "".join(piece.text for piece in own) == choice.text
        if logprobs is not None:
            told = [name for piece in own if piece.logprobs for name in piece.logprobs.tokens]
            assert told == choice.logprobs.tokens


def test_best_of_sends_the_likeliest_of_what_was_drawn(client):
    asked = {"model": "lively", "prompt": [PROMPT, "abc"], "max_tokens": 12, "seed": 7}
    asked["extra_body"] = {"ignore_eos": True}
    every = client.completions.create(**asked, n=4, logprobs=0)
    best = client.completions.create(**asked, best_of=4, n=2)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    for prompt in range(2):
        drawn = every.choices[4 * prompt : 4 * prompt + 4]
        ranked = sorted(drawn, key=lambda choice: -np.mean(choice.logprobs.token_logprobs))
        sent = best.choices[2 * prompt : 2 * prompt + 2]
        assert [choice.text for choice in sent] == [choice.text for choice in ranked[:2]]
        assert sent[0].logprobs is None
    assert best.usage.completion_tokens == 2 * 4 * 12
    told = client.completions.create(**asked, best_of=4, logprobs=1)
    assert [choice.text for choice in told.choices] == [best.choices[0].text, best.choices[2].text]
    assert all(len(choice.logprobs.tokens) == 12 for choice in told.choices)


@pytest.mark.parametrize("path", PATHS)
def test_the_prompts_log_probabilities_are_vllms(http, path):
    answer = http.post(
        path, json=body(path, prompt_logprobs=2, logprobs=1 if "chat" not in path else True)
    ).json()
    said = answer["prompt_logprobs"] if "chat" in path else answer["choices"][0]["prompt_logprobs"]
    assert said[0] is None
    assert len(said) == answer["usage"]["prompt_tokens"]
    for entries in said[1:]:
        ranks = sorted(entry["rank"] for entry in entries.values())
        assert ranks[:2] == [1, 2]
        assert len(entries) in (2, 3)
        assert all(
            entry["logprob"] <= 0 and isinstance(entry["decoded_token"], str) for entry in entries.values()
        )
    plain = http.post(path, json=body(path)).json()
    assert "prompt_logprobs" not in json.dumps(plain)


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_is_scored_once_for_all_its_choices(http, runtime, path):
    text = f"{path} is where this was asked, and four answers are wanted. " * 4
    said = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": [text, PROMPT]}
    ask(http, path, **said)  # so there is a prefix, which is nothing to whoever scores
    before = runtime.engine.stats().num_prompt_tokens
    answer = http.post(path, json=body(path, **said, prompt_logprobs=1, n=4)).json()
    computed = runtime.engine.stats().num_prompt_tokens - before
    assert computed < 1.5 * answer["usage"]["prompt_tokens"]
    if "chat" in path:
        assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
        return
    told = [choice["prompt_logprobs"] for choice in answer["choices"]]
    assert told[0] != told[4]
    assert told == [told[0]] * 4 + [told[4]] * 4
    assert len(told[0]) + len(told[4]) == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", PATHS)
def test_a_seed_gives_the_same_with_every_filter_alone_and_in_company(http, path):
    settings = {
        **{"temperature": 1.2, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.2},
        **{"xtc_probability": 0.5, "xtc_threshold": 0.05, "top_n_sigma": 2, "frequency_penalty": 0.3},
    }
    alone = [ask(http, path, **settings, seed=20 + number)[0] for number in range(3)]
    together = ask(http, path, **settings, seed=20, n=3)
    assert together == alone
    assert len(set(alone)) == 3


@pytest.fixture
def tuned_folder(model_folder, tmp_path):
    """A model whose generation_config.json says how it is sampled."""
    folder = tmp_path / "tuned"
    shutil.copytree(model_folder, folder)
    said = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


def test_defaults_are_the_requests_then_the_servers_then_the_models(tuned_folder):
    models = {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3}
    cases = [
        ({}, {}, {"temperature": 0.7, **models}),
        ({}, {"temperature": 0}, {"temperature": 0, **models}),
        (
            {"default_sampling": {"temperature": 1.1, "top_k": 0}},
            {},
            {**models, "temperature": 1.1, "top_k": 0},
        ),
        ({"default_sampling": {"top_p": 0.5}}, {"top_p": 1}, {**models, "temperature": 0.7, "top_p": 1}),
        ({"generation_config": "none"}, {}, {"temperature": 1}),
    ]
    for settings, own, meant in cases:
        runtime = Runtime.start(ServeConfig(model=str(tuned_folder), name="lively", **settings))
        try:
            with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
                sent = {"temperature": None, **own}
                found = ask(http, PATHS[1], max_tokens=30, **sent)
                neutral = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
                assert ask(http, PATHS[1], max_tokens=30, **{**neutral, **meant}) == found
                others = {**neutral, **meant, "temperature": 2.5}
                assert ask(http, PATHS[1], max_tokens=30, **others) != found
        finally:
            runtime.close()


def test_a_generation_config_that_says_nonsense_is_refused_at_start(tmp_path):
    assert read_defaults(tmp_path) == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 5, "top_k": null, "max_length": 20}')
    assert read_defaults(tmp_path) == SamplingDefaults()
    for said, told in (
        ('{"top_p": 2, "temperature": -1}', "temperature is -1, top_p is 2"),
        ('{"top_k": true}', "top_k is True"),
        ("{", "cannot be read"),
    ):
        file.write_text(said)
        with pytest.raises(ConfigError, match=told):
            read_defaults(tmp_path)
