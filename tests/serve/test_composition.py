"""The composition law: whatever a request asks for, whatever company its row keeps and wherever its past comes from,
its tokens are those of that request alone on the merged model, with keys and values of the same precision.

`DIMENSIONS` is what combines. A case is one value of each, and its name seeds everything else in it, so a case that
fails is run again by its name. A sample that holds every pair of values runs always, all of them under `-m large`.
A new dimension, or a new value, is one line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from serve.adapters.version import AdapterVersion
from serve.cache.precision import PLAIN, KvPrecision, precision
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.model.loading import load
from serve.model.prompt import Prompt

SPECIAL_TOKENS, VOCABULARY = 3, 259
NUM_TOKENS = 20
"""Of the answer that is asked for; the others' differ."""
SEEDED = ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 1.2, "top_k": 9})
ADAPTERS = ("base", "lora", "dora", "experts")

Change = Callable[["Setting"], "Setting"]


class Talk:
    """One engine's requests on their way, and their tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.asked: dict[str, Request] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.asked[request.id], self.tokens[request.id] = request, []
            self.engine.add(self.engine.check(request))

    def step(self) -> None:
        for event in self.engine.step():
            assert event.error is None, event.error
            self.tokens[event.request_id] += event.token_ids
        self.engine.scheduler.check_integrity()

    def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            assert self.engine.has_work, "what is waited for never came"
            self.step()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()


# Placements: when the asked request's row joins, and beside whom. `company` are seven requests of both kinds.


def alone(talk: Talk, asked: Request, company: Sequence[Request], rng: random.Random) -> None:
    talk.add(asked)
    talk.finish()


def mixed(talk: Talk, asked: Request, company: Sequence[Request], rng: random.Random) -> None:
    """One of eight that come together."""
    requests = [asked, *company]
    rng.shuffle(requests)
    talk.add(*requests)
    talk.finish()


def late(talk: Talk, asked: Request, company: Sequence[Request], rng: random.Random) -> None:
    """Joins rows that decode, of which some end before it."""
    talk.add(*company[:4])
    talk.until(lambda: sum(len(tokens) >= 2 for tokens in talk.tokens.values()) >= 3)
    talk.add(asked, company[4])
    talk.finish()


def preempted(talk: Talk, asked: Request, company: Sequence[Request], rng: random.Random) -> None:
    """The younger of two rows of one group, in an engine of two rows, when somebody else comes."""
    neighbour = replace(company[0], group="g", sampling=replace(company[0].sampling, max_tokens=60))
    talk.add(neighbour, replace(asked, group="g"))
    scheduler, delay = talk.engine.scheduler, rng.randrange(1, 12)
    talk.until(lambda: asked.id in {sequence.request.id for sequence in scheduler.running})
    for _ in range(delay):
        talk.step()
    assert len(talk.tokens[asked.id]) < NUM_TOKENS
    talk.add(company[1])
    talk.until(lambda: asked.id in {sequence.request.id for sequence in scheduler.waiting})
    talk.finish()


@dataclass(frozen=True)
class Setting:
    """What a case is made of; each dimension changes it."""

    asked: str = "base"
    """The kind that is asked for."""
    beside: str = "base"
    """The kind of half its company."""
    model: str = "full"
    """One of LIVELY."""
    samplings: tuple[dict[str, Any], ...] = ({},)
    """The asked request draws by one of them."""
    place: Callable[[Talk, Request, Sequence[Request], random.Random], None] = alone
    precisions: tuple[KvPrecision, ...] = (PLAIN,)
    """Of the asked request one of them."""
    limits: Mapping[str, Any] = field(default_factory=dict)


def put(**changes: Any) -> Change:
    """The setting with other values; limits are added to those there are."""

    def change(setting: Setting) -> Setting:
        limits = {**setting.limits, **changes.get("limits", {})}
        return replace(setting, **{**changes, "limits": limits})

    return change


def forms(bits: float) -> tuple[KvPrecision, ...]:
    """Keys and values of so many bits, by themselves and with each setting."""
    each = ({}, {"group_size": 32}, {"start_after": 40}, {"num_plain_layers": 1}, {"value_bits": 8})
    return tuple(precision(bits, **settings) for settings in each)


DIMENSIONS: dict[str, dict[str, Change]] = {
    "asked": {kind: put(asked=kind) for kind in ADAPTERS},
    "beside": {f"by_{kind}": put(beside=kind) for kind in ADAPTERS},
    "rows": {
        "plain": put(),
        "q8": put(precisions=forms(8)),
        "q4": put(precisions=forms(4)),
        "turbo": put(precisions=forms(3.5)),
        "sliding": put(model="sliding"),
        "hybrid": put(model="hybrid"),
        "sliding_q8": put(model="sliding", precisions=forms(8)),
        "hybrid_q4": put(model="hybrid", precisions=forms(4)),
    },
    "drawn": {"greedy": put(), "seeded": put(samplings=SEEDED)},
    "placement": {
        "alone": put(),
        "mixed": put(place=mixed),
        "late": put(place=late),
        "preempted": put(place=preempted, limits={"max_rows": 2}),
    },
    "steps": {"in_turn": put(limits={"ahead": False}), "ahead": put(limits={"ahead": True})},
}
COMPANY_PRECISIONS = (PLAIN, PLAIN, *forms(8), *forms(4), *forms(3.5))
CASES = list(product(*DIMENSIONS.values()))


def pairs_of(case: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
    """Each two of its values, with their dimensions."""
    return {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(case), 2)}


def sample_of(cases: Sequence[tuple[str, ...]], rng: random.Random) -> list[tuple[str, ...]]:
    """Few cases in which every pair of values comes together: of some random ones always that with most new pairs."""
    missing = set().union(*map(pairs_of, cases))
    sample = []
    while missing:
        best = max(rng.sample(cases, min(60, len(cases))), key=lambda case: len(pairs_of(case) & missing))
        if pairs_of(best) & missing:
            sample.append(best)
            missing -= pairs_of(best)
    return sample


SAMPLE = set(sample_of(CASES, random.Random(0)))


def setting_of(case: tuple[str, ...]) -> Setting:
    setting = Setting()
    for values, name in zip(DIMENSIONS.values(), case, strict=True):
        setting = values[name](setting)
    return setting


def random_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(SPECIAL_TOKENS, VOCABULARY) for _ in range(count))


class Scene:
    """A case, about to run: an engine with the adapters of both kinds, and requests."""

    def __init__(self, setting: Setting, rng: random.Random, lively: Any) -> None:
        self.setting, self.rng, self.lively = setting, rng, lively
        self.sources = {"asked": (setting.asked, 0), "beside": (setting.beside, 1)}
        """Kind and number of the adapters."""
        limits = {"max_rows": 8, "prefill_chunk_tokens": rng.choice([16, 64, 256]), **setting.limits}
        self.limits = EngineLimits(**limits)
        self.source_of: dict[str, tuple[str, int]] = {}

    def open(self) -> tuple[Engine, dict[str, AdapterVersion | None]]:
        engine = Engine(load(str(self.lively.folder(self.setting.model)), name="law"), self.limits)
        versions = {
            name: None
            if kind == "base"
            else engine.registry.load(name, self.lively.adapter(self.setting.model, kind, number))
            for name, (kind, number) in self.sources.items()
        }
        return engine, versions

    def request(
        self,
        id: str,
        name: str,
        version: AdapterVersion | None,
        prompt: tuple[int, ...],
        max_tokens: int,
        samplings: Sequence[dict[str, Any]],
        precisions: Sequence[KvPrecision],
    ) -> Request:
        """Of one of the two kinds ("asked" or "beside")."""
        settings = {"temperature": 0.0, **self.rng.choice(samplings)}
        self.source_of[id] = self.sources[name]
        sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, seed=self.rng.getrandbits(40), **settings)
        form = self.rng.choice(precisions)
        return Request(id, Prompt(prompt), sampling, adapter=version, precision=form)

    def run(self) -> Talk:
        rng, setting = self.rng, self.setting
        prompt = random_tokens(rng, rng.choice([1, 5, 30, 64, 65, 130, 240, 250]))
        engine, versions = self.open()
        asked = self.request(
            "asked", "asked", versions["asked"], prompt, NUM_TOKENS, setting.samplings, setting.precisions
        )
        company = [
            self.request(
                f"{name}-{i}",
                name,
                versions[name],
                random_tokens(rng, rng.choice([1, 7, 33, 100])),
                rng.randrange(3, 24),
                ({}, *SEEDED),
                COMPANY_PRECISIONS,
            )
            for i, name in enumerate(["beside", "asked", "beside", "asked", "beside", "beside", "asked"])
        ]
        talk = Talk(engine)
        setting.place(talk, asked, company, rng)
        return talk


def again(case: Sequence[str], request: pytest.FixtureRequest) -> str:
    path = Path(request.node.path).relative_to(request.config.rootpath)
    return f"rerun alone: pytest {path} -m 'large or not large' -k {'-'.join(case)}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id="-".join(case), marks=() if case in SAMPLE else pytest.mark.large)
        for case in CASES
    ],
)
def test_a_request_draws_what_it_draws_alone_on_the_merged_model(case, lively, assert_drawn, request):
    scene = Scene(setting_of(case), random.Random("-".join(case)), lively)
    talk = scene.run()
    for name, asked in talk.asked.items():
        tokens = talk.tokens[name]
        assert len(tokens) == asked.sampling.max_tokens, again(case, request)
        module = lively.module(scene.setting.model, *scene.source_of[name])
        try:
            assert_drawn(asked, tokens, module)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{again(case, request)}") from None


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["full", "sliding", "hybrid"])
def test_the_models_of_the_law_are_lively_enough_to_tell(name, kind, lively, greedy_by_mlx_lm):
    """Answers hold many tokens and depend on the first one of the prompt and on the adapter."""
    prompt, module = list(range(40, 70)), lively.module(name, kind, 0)
    answer = greedy_by_mlx_lm(module, prompt, 40)
    assert len(set(answer)) >= 20
    other = greedy_by_mlx_lm(module, [200, *prompt[1:]], 40)
    assert sum(a != b for a, b in zip(answer, other, strict=True)) >= 15
    if kind != "base":
        others = [lively.module(name, "base"), lively.module(name, kind, 1)]
        assert all(greedy_by_mlx_lm(each, prompt, 40)[:10] != answer[:10] for each in others)
