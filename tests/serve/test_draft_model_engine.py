"""A draft model at work in an engine: no token changes, and guesses are right as often as they must be."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import pytest
from drafting import Eager
from mlx.utils import tree_map

from serve.constraints.compiler import GrammarCompiler
from serve.constraints.spec import ConstraintSpec
from serve.draft.model import DraftModel
from serve.engine.drafts import DraftStats
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request
from serve.engine.thinking import Thinking
from serve.model.loading import LoadedModel, load
from serve.model.thoughts import Mark, Thoughts

ROOM = 64 << 20
MOST = 4
SETTINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.2, "top_k": 9, "xtc_probability": 0.5, "xtc_threshold": 0.04},
    {"temperature": 0.9, "repetition_penalty": 1.4, "logit_bias": ((40, 3.0), (50, -9.0))},
    {"num_logprobs": 3, "frequency_penalty": 0.5},
)
"""The last two have edits."""
TEXTS = (
    "hello there",
    "a much longer prompt, of many words. " * 12,
    "x",
    "some words",
    "short",
    "and a last one",
)


def nearly(folder: Path, share: float) -> LoadedModel:
    """The model in a folder, its weights shaken by a share of their size: it says much the same."""
    model = load(str(folder), name="draft")
    mx.random.seed(5)
    shaken = tree_map(
        lambda weight: weight + share * mx.std(weight) * mx.random.normal(weight.shape),
        model.network.module.parameters(),
    )
    model.network.module.update(shaken)
    mx.eval(shaken)
    return model


@dataclass
class Served:
    """An engine whose rows a draft model guesses for, and what they said."""

    target: Path
    draft: LoadedModel
    ahead: bool = False
    limits: Mapping[str, object] = field(default_factory=dict)
    own: Mapping[str, Path] = field(default_factory=dict)
    """Adapters of the draft model, by name of the target's."""

    def __post_init__(self) -> None:
        model = load(str(self.target), name="target")
        self.drafter = DraftModel(self.draft, model, max_bytes=ROOM, adapters=self.own)
        self.engine = Engine(
            model,
            EngineLimits(ahead=self.ahead, **self.limits),
            drafters={"model": self.drafter},
            drafter="model",
            gains=Eager(MOST),
        )
        self.asked: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            if request.adapter is not None:
                self.engine.registry.acquire(request.adapter.id)
            self.asked[request.id] = self.engine.check(request)
            self.tokens[request.id] = []
            self.engine.add(self.asked[request.id])

    def step(self) -> None:
        for event in self.engine.step():
            self.tokens[event.request_id] += event.token_ids
            assert event.error is None
        self.drafter.check_integrity()
        self.engine.scheduler.check_integrity()

    def run(self, *requests: Request) -> None:
        """From beginning to end."""
        self.add(*requests)
        while self.engine.has_work:
            self.step()

    def drafts(self, adapter: str = "") -> DraftStats:
        return self.engine.stats().drafts[adapter]

    def share_right(self, adapter: str = "") -> float:
        found = self.drafts(adapter)
        assert found.num_drafted > 100, "hardly anything was guessed"
        return found.num_accepted / found.num_drafted


def in_all_settings(make_request, *, max_tokens: int = 40, **options: object) -> list[Request]:
    return [
        make_request(f"{number}", text, max_tokens=max_tokens, seed=100 + number, **settings, **options)
        for number, (text, settings) in enumerate(zip(TEXTS, SETTINGS, strict=True))
    ]


def constrained(served: Served, requests: Sequence[Request]) -> list[Request]:
    """The same, each with a grammar; those of an even number are inside a thought first."""
    model = served.engine.model
    compiler = GrammarCompiler(model.tokenizer, served.engine.token_bytes, model.network.vocab_size)
    grammar = compiler.compile(ConstraintSpec("regex", "([a-f]{2,5} )*[0-9]{20}", "guided_regex"))
    ends = {101: "\ud801", 102: "\ud802"}
    marks = {"reasoning": (Mark("\ud801\ud802", "content"),), "content": (), "header": ()}
    thinking = Thinking(Thoughts("test", marks, ends, tuple(ends), begins_inside=True), (), budget=5)
    return [
        replace(request, grammar=grammar, thinking=None if int(request.id) % 2 else thinking)
        for request in requests
    ]


@pytest.mark.parametrize("is_constrained", [False, True])
def test_the_target_as_its_own_draft_model_is_always_right_at_any_temperature_and_with_edits(
    model_folder, make_request, ahead, is_constrained
):
    served = Served(model_folder, load(str(model_folder), name="draft"), ahead)
    requests = in_all_settings(make_request)
    if is_constrained:
        requests = constrained(served, requests)
    served.run(*requests, *(replace(request, id=f"again {request.id}") for request in requests))
    assert served.share_right() > 0.995  # a near-tie may fall either way
    assert all(len(set(tokens)) > (5 if is_constrained else 20) for tokens in served.tokens.values())
    assert served.drafter._rows.num_bytes == 0, "a sequence was not forgotten"


@pytest.mark.parametrize("share", [0.05, 1.0], ids=["much the same", "another one"])
def test_guesses_change_no_token_whoever_comes_leaves_or_is_preempted(
    share, model_folder, make_adapter, merged, make_request, assert_drawn, ahead
):
    """Rows of the base and two adapters, in all settings, some cancelled, some given back for others."""
    paths = {name: make_adapter(seed, rank=3 + seed) for seed, name in enumerate("ab")}
    served = Served(model_folder, nearly(model_folder, share), ahead, {"max_rows": 5}, own={"a": paths["a"]})
    versions = {name: served.engine.registry.load(name, path) for name, path in paths.items()}
    rng, requests = random.Random(share), []
    for name in ("", "a", "b"):
        for request in in_all_settings(make_request):
            group = "many" if name == "b" else ""
            changed = replace(request, id=f"{name}{request.id}", adapter=versions.get(name), group=group)
            requests.append(changed)
    served.add(*(request for request in requests if request.group))
    rest = [request for request in requests if not request.group]
    rng.shuffle(rest)
    gone: set[str] = set()
    while served.engine.has_work or rest:
        if rest:
            served.add(rest.pop())
        for _ in range(rng.randint(1, 3)):
            served.step()
        running = [each.request.id for each in served.engine.scheduler.decoding]
        if len(running) > 3 and len(gone) < 2:
            gone.add(running[1])
            served.engine.cancel(running[1])
    assert served.engine.stats().num_preempted > 0
    modules = {name: merged(model_folder, path).freeze() for name, path in paths.items()}
    modules[""] = load(str(model_folder)).network.module
    for request_id in served.tokens.keys() - gone:
        request = served.asked[request_id]
        assert len(served.tokens[request_id]) == 40
        assert_drawn(request, served.tokens[request_id], modules[request_id.rstrip("012345")])
    stats = served.engine.stats().drafts
    right = sum(each.num_accepted for each in stats.values())
    assert 0 < right < 0.95 * sum(each.num_drafted for each in stats.values())
    assert set(stats) == {"", "a", "b"}
    assert served.drafter._rows.num_bytes == 0, "a sequence was not forgotten"


def test_a_like_model_is_right_far_more_often_than_by_chance_where_tokens_are_drawn(
    model_folder, make_request
):
    """By one random number for both: with another one, guesses of the very same model are right much less often."""
    asked = [make_request(f"{number}", seed=number, temperature=1.5, max_tokens=60) for number in range(8)]
    together = Served(model_folder, nearly(model_folder, 0.02))
    together.run(*asked)
    module, equal = load(str(model_folder)).network.module, []
    for request in asked:
        tokens = mx.array([[*request.prompt.token_ids, *together.tokens[request.id]]])
        probs = mx.softmax(module(tokens)[0, len(request.prompt.token_ids) - 1 : -1] / 1.5, axis=-1)
        equal += mx.square(probs).sum(axis=-1).tolist()  # that two draws of their own are the same token
    assert together.share_right() > 2 * sum(equal) / len(equal)


def test_an_adapter_of_its_own_is_right_where_the_draft_model_alone_is_not(
    model_folder, make_adapter, make_request
):
    path, shares = make_adapter(1), {}
    for own in ({"a": path}, {}):
        served = Served(model_folder, load(str(model_folder), name="draft"), own=own)
        version = served.engine.registry.load("a", path)
        for number in range(2):  # twelve rows in one batch
            for each in in_all_settings(make_request):
                served.add(replace(each, id=f"base {number} {each.id}"))
                served.add(replace(each, id=f"{number} {each.id}", adapter=version))
        served.run()
        shares[bool(own)] = served.share_right("a")
        assert served.share_right() > 0.995
    assert shares[True] > 0.995
    assert shares[False] < 0.3


def test_a_request_may_do_without(model_folder, make_request):
    served = Served(model_folder, load(str(model_folder), name="draft"))
    requests = in_all_settings(make_request)
    served.run(*(replace(request, drafter="none") for request in requests))
    assert not served.engine.stats().drafts
    plain = served.tokens
    again = Served(model_folder, load(str(model_folder), name="draft"))
    again.run(*requests)
    assert again.drafts().num_drafted
    same = sum(a == b for name in plain for a, b in zip(plain[name], again.tokens[name], strict=True))
    assert same > 0.98 * sum(map(len, plain.values()))
