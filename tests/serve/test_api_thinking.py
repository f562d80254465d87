"""Thoughts over HTTP: apart from the answer, whole and streamed, with their budget, for each way to ask."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import httpx
import jsonschema
import openai
import pytest
from tiny import QWEN3
from transformers import AutoTokenizer

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_tensors, write_adapter
from serve.api.server import serving
from serve.config import ServeConfig
from serve.errors import ConfigError
from serve.model.loading import load
from serve.model.template_rules import TemplateRules, make_template
from serve.runtime import Runtime

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello there"}]
BUDGET = 6
CONFIG = {**QWEN3, "vocab_size": 261}


@pytest.fixture(scope="module")
def thinker(make_model):
    """A model whose template begins a thought, and whose vocabulary has a token for each mark."""
    folder = make_model("thinker", CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def running(folder, **keys):
    runtime = Runtime.start(ServeConfig(model=str(folder), name="m", max_rows=8, **keys))
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield http
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def http(thinker):
    with running(thinker) as opened:
        yield opened


def body(**fields) -> dict:
    said = {"model": "m", "messages": MESSAGES, "max_tokens": 20, "temperature": 1.0, "seed": 5}
    # This model would begin thoughts anywhere.
    return {**said, "ignore_eos": True, "logit_bias": {"259": -100}, **fields}


def ask(http, **fields) -> dict:
    found = http.post(CHAT, json=body(**fields))
    assert found.status_code == 200, found.text
    return found.json()


def streamed(http, **fields) -> tuple[list[dict], dict]:
    """Each choice's message as its deltas join to, and the usage."""
    messages: dict[int, dict] = {}
    usage = {}
    options = {"include_usage": True}
    with http.stream("POST", CHAT, json=body(stream=True, stream_options=options, **fields)) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                message = messages.setdefault(choice["index"], {"logprobs": []})
                for name, value in choice["delta"].items():
                    message[name] = message.get(name, "") + value
                message["logprobs"] += (choice["logprobs"] or {}).get("content", [])
    return [messages[index] for index in sorted(messages)], usage


def refused(http, **fields) -> tuple[str, str]:
    found = http.post(CHAT, json=body(**fields))
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": BUDGET},
        {"thinking_budget": 0},
        {"thinking_budget": 1, "n": 3},
        {"thinking_token_budget": BUDGET, "logprobs": True, "top_logprobs": 2},
        {"thinking_budget": 50},
        {"thinking_budget": BUDGET, "enable_thinking": True, "repetition_penalty": 1.4},
        {"enable_thinking": False},
        {},
    ],
)
def test_streamed_thoughts_and_answers_are_those_of_the_whole(http, fields):
    whole = ask(http, **fields)
    parts, usage = streamed(http, **fields)
    budget = fields.get("thinking_budget", fields.get("thinking_token_budget", 50))
    n = fields.get("n", 1)
    thinks = fields.get("enable_thinking", True)
    count = n * min(budget, 20) * thinks
    assert usage == whole["usage"] | {"prompt_tokens_details": usage["prompt_tokens_details"]}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": count}
    assert usage["completion_tokens"] == 20 * n
    assert len(parts) == len(whole["choices"]) == n
    for part, choice in zip(parts, whole["choices"], strict=True):
        message = choice["message"]
        assert part["content"] == message["content"]
        assert part.get("reasoning_content") == part.get("reasoning") == message["reasoning_content"]
        assert message["reasoning"] == message["reasoning_content"]
        assert bool(message["reasoning_content"]) == (count > 0)
        assert bool(message["content"]) == (not thinks or budget < 19)
        assert "think>" not in message["content"] + (message["reasoning_content"] or "")
        if fields.get("logprobs"):
            entries = choice["logprobs"]["content"]
            assert [entry["token"] for entry in part["logprobs"]] == [entry["token"] for entry in entries]
            assert entries[BUDGET]["token"] == "</think>"
            assert len(entries) == 20


def test_the_openai_client_sees_thoughts(http):
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        asked = {**body(), "extra_body": {"thinking_budget": BUDGET, "ignore_eos": True}}
        del asked["ignore_eos"]
        whole = client.chat.completions.create(**asked)
        message = whole.choices[0].message
        assert message.reasoning_content
        assert whole.usage.completion_tokens_details.reasoning_tokens == BUDGET
        reasoning = content = ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            delta = chunk.choices[0].delta
            reasoning += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
        assert (reasoning, content) == (message.reasoning_content, message.content)


def test_a_switch_is_the_same_as_a_field_and_as_a_variable_of_the_template(http):
    thinks, does_not = ask(http), ask(http, enable_thinking=False)
    assert ask(http, enable_thinking=True)["choices"] == thinks["choices"]
    same = ask(http, chat_template_kwargs={"enable_thinking": False})
    assert same["choices"] == does_not["choices"] != thinks["choices"]
    assert does_not["choices"][0]["message"]["reasoning_content"] is None
    hidden = ask(http, thinking_budget=BUDGET, include_reasoning=False)
    assert "reasoning_content" not in hidden["choices"][0]["message"]
    shown = ask(http, thinking_budget=BUDGET)
    assert hidden["choices"][0]["message"]["content"] == shown["choices"][0]["message"]["content"]
    assert hidden["usage"]["completion_tokens_details"] == {"reasoning_tokens": BUDGET}
    parts, _ = streamed(http, thinking_budget=BUDGET, include_reasoning=False)
    assert "reasoning_content" not in parts[0]


def test_stop_strings_end_answers_and_not_thoughts(http):
    message = ask(http, thinking_budget=12, max_tokens=40)["choices"][0]["message"]
    inside = [char for char in message["reasoning_content"] if char.isascii()][3]
    choice = ask(http, thinking_budget=12, max_tokens=40, stop=inside)["choices"][0]
    assert choice["message"]["reasoning_content"] == message["reasoning_content"]
    assert choice["message"]["content"] == message["content"].partition(inside)[0]
    answer = next(char for char in message["content"] if char.isascii() and not char.isspace())
    choice = ask(http, thinking_budget=12, max_tokens=40, stop=[answer])["choices"][0]
    assert choice["message"]["content"] == message["content"].partition(answer)[0]
    assert choice["stop_reason"] == answer


def test_earlier_thoughts_go_where_the_template_puts_them(http):
    history = [*MESSAGES, {"role": "assistant", "content": "Yes.", "reasoning_content": "Is it?"}, *MESSAGES]
    told = ask(http, messages=history)["usage"]["prompt_tokens"]
    renamed = [MESSAGES[0], {"role": "assistant", "content": "Yes.", "reasoning": "Is it?"}, MESSAGES[0]]
    assert ask(http, messages=renamed)["usage"]["prompt_tokens"] == told
    silent = [MESSAGES[0], {"role": "assistant", "content": "Yes."}, MESSAGES[0]]
    added = len("\nIs it?\n\n\n") + 2  # a token a byte, and the marks
    assert ask(http, messages=silent)["usage"]["prompt_tokens"] == told - added


def test_a_continued_answer_begins_where_it_was_left(http):
    last = {"role": "assistant", "content": "<think>\nLet me see"}
    asked = {"messages": [*MESSAGES, last], "continue_final_message": True, "thinking_budget": 4}
    found = ask(http, **asked)
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    message = found["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"]
    over = {"role": "assistant", "content": "", "reasoning_content": "Let me see"}
    asked["messages"] = [*MESSAGES, {**over, "content": "It is"}]
    assert ask(http, **asked)["choices"][0]["message"]["reasoning_content"] is None


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"thinking_budget": -1}, "thinking_budget", "greater than or equal to 0"),
        ({"thinking_budget": "5"}, "thinking_budget", "valid integer"),
        ({"thinking_budget": 1.5}, "thinking_budget", "valid integer"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "greater than or equal to 0"),
        ({"thinking_budget": 1, "thinking_token_budget": 2}, "thinking_token_budget", "send one"),
        ({"enable_thinking": "yes"}, "enable_thinking", "valid boolean"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True}},
            "enable_thinking",
            "send one",
        ),
        ({"thinking_start_token": ""}, "thinking_start_token", "at least 1 character"),
        ({"thinking_end_token": "x" * 129}, "thinking_end_token", "at most 128 characters"),
        ({"thinking_end_token": "<think>"}, "thinking_end_token", "begins a thought too"),
        ({"thinking_start_token": 5}, "thinking_start_token", "valid string"),
        ({"include_reasoning": 1}, "include_reasoning", "valid boolean"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(http, fields, param, told):
    found, message = refused(http, **fields)
    assert found == param
    assert told in message


def test_marks_may_be_a_requests_own_and_several_tokens(http):
    fields = {"enable_thinking": False, "thinking_start_token": "Hm", "thinking_end_token": " so:\n"}
    continued = {"messages": [*MESSAGES, {"role": "assistant", "content": "Hm, well"}]}
    choice = ask(
        http, **fields, **continued, continue_final_message=True, thinking_budget=BUDGET, logprobs=True
    )
    tokens = [entry["token"] for entry in choice["choices"][0]["logprobs"]["content"]]
    assert "".join(tokens[BUDGET : BUDGET + 5]) == " so:\n"
    assert choice["usage"]["completion_tokens_details"] == {"reasoning_tokens": BUDGET}


def test_a_model_without_marks_says_so(model_folder, thinker):
    free: dict = {"logit_bias": {}}
    with running(model_folder) as http:
        assert "reasoning_content" not in ask(http, **free)["choices"][0]["message"]
        assert "completion_tokens_details" not in ask(http, **free)["usage"]
        assert refused(http, **free, thinking_budget=3)[0] == "thinking_budget"
        assert refused(http, **free, thinking_token_budget=3)[0] == "thinking_token_budget"
        assert refused(http, **free, thinking_start_token="a")[0] == "thinking_end_token"
        assert refused(http, **free, enable_thinking=True)[0] == "enable_thinking"
        assert ask(http, **free, enable_thinking=False)["choices"] == ask(http, **free)["choices"]
    for keys, told in (
        ({"thinking_budget": 3}, "thinking_budget: found 3"),
        ({"thinking_start_token": "a"}, "thinking_end_token: found none"),
        ({"reasoning_parser": "mistral"}, "reasoning_parser: found mistral"),
    ):
        with pytest.raises(ConfigError, match=told):
            Runtime.start(ServeConfig(model=str(model_folder), **keys))


def test_the_server_has_defaults_for_requests_that_say_nothing(thinker):
    with running(thinker, thinking_budget=4, thinking_end_token="!!", default_max_tokens=20) as http:
        found = ask(http, logprobs=True)
        tokens = [entry["token"] for entry in found["choices"][0]["logprobs"]["content"]]
        assert tokens[4:6] == ["!", "!"]
        assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
        own = ask(http, thinking_budget=2, thinking_end_token="</think>", logprobs=True)
        assert own["choices"][0]["logprobs"]["content"][2]["token"] == "</think>"
    with running(thinker, enable_thinking=False) as http:
        quiet = ask(http)
        assert quiet["choices"][0]["message"]["reasoning_content"] is None
        assert ask(http, enable_thinking=True)["choices"][0]["message"]["reasoning_content"]
        assert ask(http, chat_template_kwargs={"enable_thinking": True})["usage"]["completion_tokens_details"]
    with running(thinker, reasoning_parser="none") as http:
        message = ask(http)["choices"][0]["message"]
        assert message["content"]
        assert "reasoning_content" not in message


def test_an_adapter_thinks_as_its_own_template_has_it(thinker, make_adapter_of, tmp_path):
    """One whose template begins no thought, one whose template is told not to; both beside the base, and with it."""
    model = load(str(thinker))
    own = TEMPLATE.replace("<think>\n{% else %}<think>\n\n</think>\n\n", "{% else %}")
    ways = {"plain": (own, {}), "told": (TEMPLATE, {"enable_thinking": False})}
    adapters = []
    for name, (template, variables) in ways.items():
        rules = TemplateRules(source=template, variables=variables)
        hash = make_template(model.tokenizer, rules).hash
        lineage = Lineage("thinker", model.fingerprint, hash, "", "", "", "0", chat_template=template)
        lineage = replace(lineage, chat_template_kwargs=variables)
        tensors = read_tensors(make_adapter_of(thinker, 1))
        write_adapter(tmp_path / name, tensors, AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
        adapters.append({"name": name, "path": tmp_path / name})
    with running(thinker, adapters=adapters) as http:
        for name in ways:
            message = ask(http, model=name, thinking_budget=BUDGET)["choices"][0]["message"]
            assert message["content"]
            assert message["reasoning_content"] is None
        thinks = ask(http, model="told", enable_thinking=True, thinking_budget=BUDGET)
        assert thinks["usage"]["completion_tokens_details"] == {"reasoning_tokens": BUDGET}
        assert ask(http, thinking_budget=BUDGET)["choices"][0]["message"]["reasoning_content"]
        begins = ask(http, model="plain", logit_bias={"259": 100}, max_tokens=2, thinking_budget=BUDGET)
        assert begins["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}


SCHEMA = {
    "type": "object",
    "properties": {"mark": {"enum": ["<think>", "</think>\n"]}, "name": {"type": "string", "maxLength": 4}},
    "required": ["mark", "name"],
    "additionalProperties": False,
}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
LIKES_TO_ANSWER = {"logit_bias": {"259": -100, "260": 2}}


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": BUDGET},
        {"thinking_budget": 0},
        {"thinking_budget": 3, "n": 3, "logprobs": True, "top_logprobs": 3},
        {**LIKES_TO_ANSWER, "seed": 6, "ignore_eos": False},
        {**LIKES_TO_ANSWER, "seed": 6, "n": 2, "repetition_penalty": 1.2, "temperature": 1.3},
        {"enable_thinking": False},
        {"thinking_budget": 4, "thinking_end_token": " so:\n"},
        {"thinking_budget": 9, "stop": ["zz"], "logprobs": True},
    ],
)
def test_a_schema_begins_behind_the_thought_streamed_and_whole(http, fields):
    asked = {"response_format": AS_JSON, "max_tokens": 200, **fields}
    whole = ask(http, **asked)
    parts, _ = streamed(http, **asked)
    thinks = fields.get("enable_thinking", True) and fields.get("thinking_budget") != 0
    assert len(whole["choices"]) == len(parts) == fields.get("n", 1)
    for part, choice in zip(parts, whole["choices"], strict=True):
        message = choice["message"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(message["content"]), SCHEMA)
        assert bool(message["reasoning_content"]) == thinks
        assert part["content"] == message["content"]
        assert part.get("reasoning_content") == message["reasoning_content"]
        if fields.get("logprobs"):
            entries = choice["logprobs"]["content"]
            said = [bytes(entry["bytes"]) for entry in entries]
            count = fields["thinking_budget"]
            assert entries[count]["token"] == "</think>"
            assert b"".join(said[count + 1 :]).decode() == message["content"]
            assert [entry["token"] for entry in part["logprobs"]] == [entry["token"] for entry in entries]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == len(parts)


def test_a_thought_that_never_ends_leaves_an_answer_empty(http):
    never = {
        "logit_bias": {"259": -100, "260": -100, "2": 50},
        "ignore_eos": False,
    }  # it would rather end it all
    choice = ask(http, response_format=AS_JSON, max_tokens=30, **never)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"]
    free = ask(http, max_tokens=30, **never)["choices"][0]
    assert free["finish_reason"] == "stop"


def test_a_continued_thought_has_its_grammar_behind_it_and_a_continued_answer_from_its_first_token(http):
    asked = {"guided_regex": "\n?[a-c]{3,5}", "continue_final_message": True, "thinking_budget": 4}
    last = {"role": "assistant", "content": "<think>\nLet me see"}
    found = ask(http, messages=[*MESSAGES, last], max_tokens=40, **asked)
    message = found["choices"][0]["message"]
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert message["reasoning_content"]
    assert 3 <= len(message["content"].strip("abc")) + len(message["content"].strip("\n")) <= 6
    over = {"role": "assistant", "content": "It is ", "reasoning_content": "Let me see"}
    message = ask(http, messages=[*MESSAGES, over], max_tokens=40, **asked)["choices"][0]["message"]
    assert message["reasoning_content"] is None
    assert set(message["content"]) <= set("abc\n")


def test_a_model_that_begins_its_thoughts_itself_may_think_before_its_grammar(thinker, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    tokenizer.chat_template = TEMPLATE.replace("<think>\n{% else %}<think>\n\n</think>\n\n", "{% else %}")
    folder = tmp_path / "beginner"
    shutil.copytree(thinker, folder)
    tokenizer.save_pretrained(folder)
    with running(folder) as http:
        asked = {"guided_choice": ["yes", "no"], "max_tokens": 60}
        silent = ask(http, **asked)["choices"][0]["message"]  # whose bias keeps it from the mark
        assert silent["reasoning_content"] is None
        likes = {"logit_bias": {"259": 50}, "thinking_budget": BUDGET}
        thinks = ask(http, **asked, **likes)
        assert thinks["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        assert {silent["content"], thinks["choices"][0]["message"]["content"]} <= {"yes", "no"}
