"""What went wrong with drafts elsewhere: in vLLM, SGLang, llama.cpp and mlx-lm, as their users have told."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest
from constrained import PERSON
from drafting import Eager, Foreteller

from serve.api.server import serving
from serve.config import ServeConfig
from serve.constraints.compiler import GrammarCompiler
from serve.constraints.spec import ConstraintSpec
from serve.draft.model import DraftModel
from serve.engine.drafts import Wanted
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.model.loading import load
from serve.model.token_bytes import TokenBytes
from serve.runtime import Runtime

MODELS = ("full", "hybrid")
"""Rows that are cut where a guess was wrong, and rows that give a block back."""
PROMPT = "one two three, one two three, one two three, one two"


@pytest.fixture(params=MODELS)
def folder(request, lively):
    return str(lively.folder(request.param))


@contextmanager
def served(folder: str, **config: Any):
    """A server that checks every guess, whatever it costs."""
    made = ServeConfig.model_validate({"model": folder, "name": "lively", "max_rows": 8, **config})
    runtime = Runtime.around(load(folder, name="lively"), made, Eager(6))
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url, timeout=120) as http:
        yield http


def ask(http: httpx.Client, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    body = {
        "model": "lively",
        "prompt": PROMPT,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


class Sayer:
    """Guesses always the same, whatever came before."""

    max_bytes = num_bytes = 0

    def __init__(self, *guesses: Sequence[int]) -> None:
        self._guesses, self._number = guesses, 0

    def propose(self, wanted: Sequence[Wanted]) -> list[Sequence[int]]:
        self._number += 1
        return [self._guesses[self._number % len(self._guesses)][: one.most] for one in wanted]

    def forget(self, sequence: object) -> None:
        pass

    def clear(self, tenant: str | None) -> None:
        pass


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one ahead"])
def test_guesses_that_no_grammar_allows_end_no_answer_and_no_server(folder, ahead, make_request):
    """vLLM stopped where a drafter said what the schema forbids, the same again and again, of many rows at once."""
    model = load(folder)
    grammar = GrammarCompiler(model.tokenizer, TokenBytes(model.tokenizer), model.network.vocab_size).compile(
        ConstraintSpec.of_schema(PERSON, "response_format")
    )
    forbidden = model.tokenizer.encode("```json\n\n", add_special_tokens=False)
    engine = Engine(
        model,
        EngineLimits(max_rows=16, ahead=ahead),
        drafters={"sayer": Sayer(forbidden, [model.tokenizer.eos_token_id, 5, 6])},
        drafter="sayer",
        gains=Eager(5),
    )
    requests = [
        replace(
            make_request(f"{n}", PROMPT[n:], temperature=1.0, seed=n, max_tokens=150, ignore_eos=False),
            grammar=grammar,
        )
        for n in range(30)
    ]
    for answer in generate(engine, requests):
        assert answer.finish in ("stop", "length")
        if answer.finish == "stop":
            jsonschema.validate(json.loads(answer.text), PERSON)
    assert engine.stats().drafts[""].num_drafted > 100


def test_nothing_behind_a_stop_string_is_told_though_it_was_guessed_with_it(folder):
    """vLLM told tokens and log-probabilities of what stood behind it in the same block."""
    with served(folder) as http:
        whole = ask(http, drafter="none")["choices"][0]["text"]
        for at in range(3, 24, 5):
            asked = {"stop": [whole[at : at + 2]], "logprobs": 2, "max_tokens": 40}
            plain = ask(http, drafter="none", **asked)
            found = ask(http, prediction={"type": "content", "content": whole}, **asked)
            choice, expected = found["choices"][0], plain["choices"][0]
            assert choice["text"] == expected["text"]
            assert choice["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(
                expected["logprobs"]["token_logprobs"], abs=1e-4
            )
            assert all(value < 0 for value in choice["logprobs"]["token_logprobs"]), "0 of what was guessed"
            assert found["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


def test_penalties_and_least_tokens_count_every_token_of_a_block(folder):
    """SGLang counted one a step: penalties were weaker, and answers longer, the better the guesses were."""
    asked = {
        "frequency_penalty": 0.4,
        "min_tokens": 17,
        "stop_token_ids": list(range(3, 131)),
        "ignore_eos": False,
    }
    with served(folder) as http:
        plain = ask(http, drafter="none", **asked)
        text = plain["choices"][0]["text"]
        found = ask(http, prediction={"type": "content", "content": text + text}, **asked)
    assert found["choices"][0]["text"] == text
    assert found["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert 17 <= found["usage"]["completion_tokens"] < 40
    assert found["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one ahead"])
def test_a_drafter_that_knows_something_now_and_then_leaves_no_state_behind(
    folder, ahead, make_request, assert_drawn
):
    """llama.cpp ran a token twice where a lookup found nothing, and kept recurrent state of wrong guesses."""
    drafter = Sayer([], [7], [], [], [9, 9, 9, 9], [])
    engine = Engine(
        load(folder), EngineLimits(ahead=ahead), drafters={"sayer": drafter}, drafter="sayer", gains=Eager(4)
    )
    request = make_request("a", PROMPT, max_tokens=60)
    (answer,) = generate(engine, [request])
    assert_drawn(request, answer.token_ids, load(folder).network.module)
    assert len(set(answer.token_ids)) > 15


@pytest.mark.parametrize("left", [1, 2, 3, 7])
def test_a_block_of_guesses_ends_where_the_context_does(folder, left):
    """llama.cpp guessed beyond it, and stopped."""
    with served(folder, max_context=96) as http:
        prompt = [40 + number % 100 for number in range(96 - left)]
        asked = {"prompt": prompt, "max_tokens": None}
        plain = ask(http, drafter="none", **asked)
        found = ask(
            http,
            prediction={"type": "content", "content": plain["choices"][0]["text"] + "and so on"},
            **asked,
        )
    assert found["choices"] == plain["choices"]
    assert found["usage"]["completion_tokens"] == left


def test_a_draft_model_of_a_shorter_context_guesses_as_far_as_it_goes(
    folder, make_model, make_request, assert_drawn
):
    """llama.cpp's server went down behind its end."""
    config = {
        **{"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6},
        **{"vocab_size": 259, "rope_theta": 10000.0, "tie_word_embeddings": False},
        "max_position_embeddings": 64,
    }
    draft, target = load(str(make_model("short-sighted", config))), load(folder)
    drafter = DraftModel(draft, target, max_bytes=1 << 22)
    engine = Engine(target, drafters={"model": drafter}, drafter="model", gains=Eager(4))
    requests = [make_request(f"{n}", PROMPT[: 20 + 30 * n], max_tokens=80) for n in range(2)]
    for request, answer in zip(requests, generate(engine, requests), strict=True):
        assert_drawn(request, answer.token_ids, load(folder).network.module)
    assert 0 < engine.stats().drafts[""].num_drafted < 400


def test_rows_that_come_while_others_guess_do_not_change_what_these_say(folder):
    """Of hybrid models, neighbours' states were mixed where rows were few and then many."""
    with served(folder) as http:
        alone = {n: ask(http, seed=n, temperature=1.0, drafter="none", prompt=PROMPT[n:]) for n in range(6)}
        rng = random.Random(0)

        def later(n: int) -> dict[str, Any]:
            text = alone[n]["choices"][0]["text"]
            told = "".join(letter if rng.random() < 0.9 else "?" for letter in text)
            said = {"prediction": {"type": "content", "content": told}} if n % 2 else {"drafter": "ngram"}
            return ask(http, seed=n, temperature=1.0, prompt=PROMPT[n:], **said)

        with ThreadPoolExecutor(6) as threads:
            for n, found in enumerate(threads.map(later, range(6))):
                assert found["choices"][0]["text"] == alone[n]["choices"][0]["text"]


def test_a_told_answer_is_its_request_s_own_wherever_its_row_is_taken_back(
    folder, make_request, assert_drawn
):
    """mlx-lm's cache kept what was guessed and refused, and later answers began with it."""
    requests = [make_request(f"{n}", PROMPT, max_tokens=30, seed=n, temperature=1.0) for n in range(3)]
    plain = generate(Engine(load(folder)), requests)
    told = {one.id: answer.token_ids for one, answer in zip(requests, plain, strict=True)}
    foreteller = Foreteller(told, random.Random(1), 0.4, 259)
    engine = Engine(load(folder), drafters={"told": foreteller}, drafter="told", gains=Eager(5))
    module = load(folder).network.module
    for request in requests:
        (answer,) = generate(engine, [request])
        assert_drawn(request, answer.token_ids, module)
        # A conversation goes on from what the row has left in the prefix cache.
        prompt = replace(request.prompt, token_ids=(*request.prompt.token_ids, *answer.token_ids, 50, 60))
        more = replace(request, id=f"{request.id}-more", prompt=prompt)
        (answer,) = generate(engine, [more])
        assert_drawn(more, answer.token_ids, module)
    assert engine.stats().prefixes.num_hit_tokens > 0
