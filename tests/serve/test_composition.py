"""The composition law: whatever a request asks for, whatever company its row keeps and wherever its past comes from,
its tokens are those of that request alone on the merged model, with keys and values of the same precision.

`DIMENSIONS` is what combines; `SEEING` is the same of models that see, with pictures and clips among the tokens.
A case is one value of each, and its name seeds everything else in it, so a case that
fails is run again by its name. Cases in which every two values come together run always (of models that see, six of
them), those of every three under `-m large`, and any part of the full product with `--law-cases START:STOP`.
A new dimension, or a new value, is one line.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product, starmap
from math import prod
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from covering import covering, numbered
from drafting import Eager, Foreteller
from heads import write_eagle3
from sighted import moving, shown
from vlm_families import VLM_FAMILIES

from serve.adapters.sums.combination import Combination, Weighted, added_up
from serve.adapters.versions.version import AdapterVersion
from serve.cache.precision import PLAIN, KvPrecision, precision
from serve.constraints.compiler import GrammarCompiler
from serve.constraints.spec import ConstraintSpec
from serve.draft.lookup import LookupDrafter
from serve.draft.make_heads import heads_of
from serve.draft.model import DraftModel
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.engine.thinking import Thinking
from serve.media.content import Content
from serve.model.loading import load
from serve.model.ngrams import Ngrams
from serve.model.prompt import Prompt
from serve.model.thoughts import Mark, Thoughts
from serve.tools.formats import FORMATS
from serve.tools.grammar import calls_grammar
from serve.tools.rules import ToolMarks
from serve.tools.tool import Tool

pytestmark = pytest.mark.long

SPECIAL_TOKENS, VOCABULARY = 3, 259
SEEING_SPECIAL_TOKENS = 30
"""Of models that see at most so many are special, placeholders among them, which no text holds."""
NUM_TOKENS = 20
"""Of the answer that is asked for; the others' differ."""
SEEDED = ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 1.2, "top_k": 9})
EDITED = (
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.4, "repetition_context_size": 20, "temperature": 0.9, "top_k": 40},
    {"frequency_penalty": 0.9, "presence_penalty": 0.6, "temperature": 1.1, "min_p": 0.03},
    {"presence_penalty": 1.5, "presence_context_size": 30, "logit_bias": ((40, 4.0), (50, -9.0))},
    {
        **{"stop_token_ids": tuple(range(3, 40)), "min_tokens": NUM_TOKENS, "temperature": 1.3},
        **{"top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.04, "xtc_special_tokens": (50,)},
    },
)
"""What changes logits before they are drawn from, or looks at them otherwise."""
THINK, END, SHORT_END = 90, (101, 102, 101), (124,)
"""Tokens that mark thoughts."""


def _thoughts(end: tuple[int, ...]) -> Thoughts:
    written = {number: chr(0xD800 + number) for number in (THINK, *end)}
    closing = Mark("".join(written[number] for number in end), "content")
    marks = {"reasoning": (closing, Mark(written[THINK], "reasoning")), "content": (), "header": ()}
    return Thoughts("law", marks, written, end, begins_inside=True)


THOUGHTS, SHORT_THOUGHTS = _thoughts(END), _thoughts(SHORT_END)
LONG = {"type": "array", "items": {"enum": ["a", 1, None, "é"]}, "minItems": 99}
CALLED = Tool("f", None, {"properties": {"long": LONG}, "required": ["long"], "additionalProperties": False})
CALL = calls_grammar(ToolMarks(FORMATS["hermes"], frozenset(), (), {}), [CALLED], "required", is_single=True)
CONSTRAINTS = {
    "schema": ConstraintSpec.of_schema(LONG, ""),
    "regex": ConstraintSpec("regex", "[a-zéü ]{200,}"),
    "tool": ConstraintSpec("grammar", CALL or "", "tools"),
}
"""What answers must be that end by their length."""
ADAPTERS = ("base", "lora", "dora", "experts")

Change = Callable[["Setting"], "Setting"]
Items = tuple[int | Content, ...]
"""A prompt: tokens, pictures and clips."""


class Talk:
    """One engine's requests on their way, and their tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.num_cached: dict[str, int] = {}
        """Tokens of the prompt that came from a prefix."""
        self.asked: dict[str, Request] = {}
        self.added: Callable[[Request], None] = lambda request: None
        """Told of each request that was added."""

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.asked[request.id], self.tokens[request.id] = request, []
            if request.adapter is not None:
                self.engine.registry.acquire(request.adapter.id)
            self.engine.add(self.engine.check(request))
            self.added(request)

    def step(self) -> None:
        for event in self.engine.step():
            assert event.error is None, event.error
            adapter = self.asked[event.request_id].adapter
            if event.finish is not None and adapter is not None:
                self.engine.registry.release(adapter)
            self.tokens[event.request_id] += event.token_ids
            self.num_cached.setdefault(event.request_id, event.num_cached_tokens)
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
        if len(talk.tokens[asked.id]) < NUM_TOKENS // 3:
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
    """One of LIVELY, or of VLM_FAMILIES."""
    seen: tuple[str, ...] = ()
    """What the asked prompt shows."""
    samplings: tuple[dict[str, Any], ...] = ({},)
    """The asked request draws by one of them."""
    place: Callable[[Talk, Request, Sequence[Request], random.Random], None] = alone
    life: str = "loaded"
    """How the asked adapter came, and what becomes of it: a folder ("loaded"), the same in PEFT's layout ("peft"), a
    sum of two ("merged"), its name is given another version while its request runs ("updated"), or it has lost its
    slot to another before it is asked for ("reloaded")."""
    past: str = "none"
    """What was asked before: nothing; or what the request shares tokens with, in the same engine ("memory"), in one
    before it ("disk"), or of the adapter that its own has replaced in place ("replaced")."""
    tenant: str = ""
    """Who asks; what was before was of nobody in particular."""
    precisions: tuple[KvPrecision, ...] = (PLAIN,)
    """Of the asked request one of them."""
    drafter: str = "none"
    """Who guesses what is said: one who was told, and says otherwise now and then ("told"), or who looks it up in a
    prediction that is wrong in places, and wherever else it looks ("ngram"), or another model ("model"), or a random
    head, which reads the model's states and keeps a layer in the rows ("head")."""
    budgets: tuple[int | None, ...] = ()
    """Of tokens that requests think, in answers that begin with a thought, one of them; None: until they end it
    themselves, which they like to. Of no budgets: they answer at once."""
    said: str = "free"
    """What the asked answer must be, one of CONSTRAINTS; half of its company too."""
    limits: Mapping[str, Any] = field(default_factory=dict)


def put(**changes: Any) -> Change:
    """The setting with other values; limits are added to those there are."""

    def change(setting: Setting) -> Setting:
        limits = {**setting.limits, **changes.get("limits", {})}
        return replace(setting, **{**changes, "limits": limits})

    return change


def forms(bits: float, **always: Any) -> tuple[KvPrecision, ...]:
    """Keys and values of so many bits, by themselves and with each setting."""
    each = ({}, {"group_size": 32}, {"start_after": 40}, {"num_plain_layers": 1}, {"value_bits": 8})
    return tuple(precision(bits, **{**settings, **always}) for settings in each)


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
    "life": {
        "loaded": put(),
        "peft": put(life="peft"),
        "merged": put(life="merged"),
        "updated": put(life="updated"),
        "reloaded": put(life="reloaded", limits={"max_adapters": 2}),
    },
    "prefix": {
        "cold": put(limits={"prefix_cache_bytes": 0}),
        "warm": put(past="memory"),
        "restarted": put(past="disk", limits={"prefix_cache_disk_bytes": 1 << 28}),
        "replaced": put(past="replaced"),
        "stranger": put(past="memory", tenant="another"),
    },
    "drawn": {"greedy": put(), "seeded": put(samplings=SEEDED), "edited": put(samplings=EDITED)},
    "placement": {
        "alone": put(),
        "mixed": put(place=mixed),
        "late": put(place=late),
        "preempted": put(place=preempted, limits={"max_rows": 2}),
    },
    "thought": {
        "answers": put(),
        "thinks": put(budgets=(None,)),
        "budget": put(budgets=(0, 1, 4, 11, NUM_TOKENS - 2)),
    },
    "said": {
        "free": put(),
        "schema": put(said="schema"),
        "regex": put(said="regex"),
        "tool": put(said="tool"),
    },
    "steps": {"in_turn": put(limits={"ahead": False}), "ahead": put(limits={"ahead": True})},
    "drafts": {
        "undrafted": put(),
        "told": put(drafter="told"),
        "ngram": put(drafter="ngram"),
        "headed": put(drafter="head"),
        "modelled": put(drafter="model"),
    },
}
SEEING: dict[str, dict[str, Change]] = {
    **DIMENSIONS,
    "rows": {
        "positions": put(model="qwen2_5_vl"),
        "positions_q8": put(model="qwen2_5_vl", precisions=forms(8, group_size=32)),
        "deepstack": put(model="qwen3_vl"),
        "deepstack_turbo": put(model="qwen3_vl", precisions=forms(3.5)),
        "blocks": put(model="gemma3"),
        "sighted_hybrid": put(model="qwen3_5"),
        "tiles": put(model="smolvlm"),
    },
    "seen": {
        "text": put(),
        "picture": put(seen=("picture",)),
        "pictures": put(seen=("picture",) * 3),
        "clip": put(seen=("clip",)),
    },
}
"""Of experts there are none: such an adapter is one of tower and projector, and a little of the language part."""
RECURRENT = ("hybrid", "qwen3_5")
COMPANY_PRECISIONS = (PLAIN, PLAIN, *forms(8), *forms(4), *forms(3.5))
SEEING_PRECISIONS = (PLAIN, PLAIN, *forms(8, group_size=32), *forms(4, group_size=32), *forms(3.5))
SHARES = (0.7, 0.4)
"""Of the two adapters that are merged."""
MAX_GUESSES = 5
SHARE_OF_LIES = 0.25

Case = tuple[str, ...]


def named(numbers: Sequence[int], dimensions: Mapping[str, Mapping[str, Change]]) -> Case:
    return tuple(list(values)[number] for values, number in zip(dimensions.values(), numbers, strict=True))


def cases_of(dimensions: Mapping[str, Mapping[str, Change]], strength: int) -> list[Case]:
    """Cases in which every so many values come together."""
    return [named(numbers, dimensions) for numbers in covering(list(map(len, dimensions.values())), strength)]


SAMPLE = cases_of(DIMENSIONS, 2)
SEEN_SAMPLE = cases_of(SEEING, 2)[:6]
LARGE = [*cases_of(DIMENSIONS, 3), *cases_of(SEEING, 3)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The sample, and with `-m large` the larger ones: of every three values, and those of `--law-cases`."""
    if "case" not in metafunc.fixturenames:
        return
    further = [
        named(numbered(list(map(len, dimensions.values())), number), dimensions)
        for dimensions in (DIMENSIONS, SEEING)
        for number in metafunc.config.getoption("law_cases")
    ]
    always = [*SAMPLE, *SEEN_SAMPLE]
    large = dict.fromkeys([*LARGE, *further]).keys() - set(always)
    cases = [pytest.param(case, id="-".join(case)) for case in always]
    cases += [pytest.param(case, id="-".join(case), marks=pytest.mark.large) for case in sorted(large)]
    metafunc.parametrize("case", cases)


def setting_of(case: tuple[str, ...]) -> Setting:
    setting = Setting()
    dimensions = DIMENSIONS if len(case) == len(DIMENSIONS) else SEEING
    for values, name in zip(dimensions.values(), case, strict=True):
        setting = values[name](setting)
    return setting


def random_tokens(rng: random.Random, count: int, first: int = SPECIAL_TOKENS) -> tuple[int, ...]:
    return tuple(rng.randrange(first, VOCABULARY) for _ in range(count))


class Scene:
    """A case, about to run: an engine with the adapters of both kinds, and requests."""

    def __init__(
        self, setting: Setting, name: str, lively: Any, folder: Path, told: Mapping[str, Sequence[int]] = {}
    ) -> None:
        """`told`: answers by request, of the same scene without drafts."""
        self.setting, self.rng, self.lively, self.told = setting, random.Random(name), lively, told
        self.folder = folder / "head"
        rng, self.foretellers = self.rng, list[Foreteller]()
        limits = {"max_rows": 8, "prefill_chunk_tokens": rng.choice([16, 64, 256]), **setting.limits}
        self.sees = setting.model in VLM_FAMILIES
        self.first_token = SEEING_SPECIAL_TOKENS if self.sees else SPECIAL_TOKENS
        if self.sees:
            limits["encode_patches"] = rng.choice([1, 64, 1024])
            limits["feature_cache_bytes"] = rng.choice([None, 0, 30_000])
        if setting.past == "disk":
            limits["prefix_cache_dir"] = folder / "prefixes"
            limits |= {"feature_cache_dir": folder / "features"} if self.sees else {}
        self.limits = EngineLimits(**limits)
        self.form = rng.choice(setting.precisions)
        self.talks: list[Talk] = []
        self.source_of: dict[str, tuple[str, int]] = {}
        """Kind and number of each request's adapter."""
        self.num_shared = 0
        """Tokens of the asked prompt that were computed before, for the same adapter."""

    def open(self, *, asked: int = 0) -> None:
        """Another engine. `asked`: which adapter the asked request's is, for now."""
        model = load(str(self.lively.folder(self.setting.model)), name="law")
        drafters: dict[str, Any] = {}
        if self.told and self.setting.drafter == "ngram":
            drafters["ngram"] = LookupDrafter()
        elif self.told:
            rng = random.Random(len(self.foretellers))  # one of its own: the scene goes as it went without
            self.foretellers.append(Foreteller(self.told, rng, SHARE_OF_LIES, model.network.vocab_size))
            drafters["told"] = self.foretellers[-1]
        if self.setting.drafter == "head":
            network = model.network
            layers = len(network.layers)
            head = write_eagle3(
                self.folder, inputs=(1, layers - 1, layers), width=network.width, vocab=network.vocab_size
            )
            drafters["head"] = heads_of(str(head), model)
        if self.setting.drafter == "model":
            small = load(str(self.lively.small(self.setting.model)), name="small")
            drafters["model"] = DraftModel(small, model, max_bytes=1 << 24, max_rows=6, catch_up_tokens=64)
        self.engine = Engine(
            model,
            self.limits,
            drafters=drafters,
            drafter=self.setting.drafter if drafters else None,
            gains=Eager(MAX_GUESSES),
        )
        tokens = self.engine.token_bytes
        self.grammars = GrammarCompiler(model.tokenizer, tokens, model.network.vocab_size)
        self.versions: dict[str, AdapterVersion | None] = {}
        self.sources: dict[str, tuple[str, int]] = {}
        self.load("asked", self.setting.asked, asked)
        self.load("beside", self.setting.beside, 1)
        self.talk()

    def load(self, name: str, kind: str, number: int) -> None:
        """An adapter under a name, or the base; in place of what the name stood for."""
        self.sources[name] = (kind, number)
        self.versions[name] = None
        if kind == "base":
            return
        registry, life = self.engine.registry, self.setting.life if name == "asked" else "loaded"
        model = self.setting.model
        if life == "merged":
            self.sources[name] = (f"{kind} and more", number)
            parts = [
                (
                    registry.load(
                        f"{name}-{each}", self.lively.adapter(model, each, 1 + number), replace=True
                    ),
                    weight,
                )
                for each, weight in ((kind, SHARES[0]), ("lora", SHARES[1]))
            ]
            source = Combination(added_up(starmap(Weighted, parts)), registry.contents)
            self.versions[name] = registry.add(source.name, source, is_found=True, is_combined=True)
            return
        folder = self.lively.adapter(model, kind, number)
        # What PEFT has under no known name: experts of that model, and towers and projectors of those that see.
        is_peft = life == "peft" and not (kind == "experts" and (model == "sliding" or self.sees))
        if is_peft:
            folder = self.lively.in_pefts_layout(model, kind, number)
        self.versions[name] = registry.load(name, folder, replace=True)

    def lose_slot(self) -> None:
        """Two other adapters answer while the asked one does not, and there are two slots."""
        registry, talk, asked = self.engine.registry, self.talk(), self.versions["asked"]
        for number, name in enumerate(("other", "another")):
            self.sources[name] = ("lora", 2 + number)
            self.versions[name] = registry.load(
                name, self.lively.adapter(self.setting.model, "lora", 2 + number)
            )
            talk.add(self.request(f"{name}-passing", self.tokens(5), 2))
        talk.finish()
        assert asked is None or registry.slot_of(asked) is None

    def update(self, request: Request) -> None:
        """Its name gets another version as soon as it has been asked for."""
        if request.id == "asked" and request.adapter is not None:
            folder = self.lively.adapter(self.setting.model, self.setting.asked, 2)
            assert self.engine.registry.load("asked", folder, replace=True) != request.adapter

    def talk(self) -> Talk:
        self.talks.append(Talk(self.engine))
        return self.talks[-1]

    def request(
        self,
        id: str,
        prompt: Items,
        max_tokens: int,
        samplings: Sequence[dict[str, Any]] = ({}, *SEEDED, *EDITED[:-1]),
        precisions: Sequence[KvPrecision] | None = None,
        said: str = "free",
    ) -> Request:
        """`id` begins with whose adapter it is for: "asked" or "beside"."""
        name, rng = id.partition("-")[0], self.rng
        self.source_of[id] = self.sources[name]
        settings = {"temperature": 0.0, "ignore_eos": True, **rng.choice(samplings)}
        if said in ("schema", "tool"):  # which need some of the tokens that may not come
            settings = {key: settings[key] for key in settings if key not in ("stop_token_ids", "min_tokens")}
        thinking = None
        if self.setting.budgets and (name == "asked" or rng.random() < 0.5):
            budget = rng.choice(self.setting.budgets)
            thinking = Thinking(SHORT_THOUGHTS if budget is None else THOUGHTS, (), budget)
            liked = () if budget is not None else ((SHORT_END[0], rng.choice([3.0, 6.0, 12.0])),)
            settings["logit_bias"] = (*settings.get("logit_bias", ()), *liked)
        sampling = Sampling(max_tokens=max_tokens, seed=rng.getrandbits(40), **settings)
        precision = rng.choice(precisions or self.company_precisions)
        grammar = None if said == "free" else self.grammars.compile(CONSTRAINTS[said])
        adapter = self.versions[name]
        request = Request(id, self.build(prompt), sampling, adapter=adapter, precision=precision)
        if self.setting.drafter == "ngram" and id in self.told:
            # Wrong in places that follow from the answer alone: the scene goes as it went without.
            foreseen = [4 if number % 6 == 5 else token for number, token in enumerate(self.told[id])]
            request = replace(request, prediction=Ngrams(array("q", foreseen)))
        return replace(request, thinking=thinking, grammar=grammar)

    @property
    def company_precisions(self) -> Sequence[KvPrecision]:
        if (
            self.setting.model == "gemma3"
        ):  # the oracle has none of windows, blocks and quantized keys at once
            return (PLAIN,)
        return SEEING_PRECISIONS if self.sees else COMPANY_PRECISIONS

    def build(self, items: Items) -> Prompt:
        if not self.sees:
            return Prompt(tuple(item for item in items if isinstance(item, int)))
        parts = [[item] if isinstance(item, int) else item for item in items]
        return self.lively.eyes(self.setting.model).prompt(*parts)

    def shown(self, kind: str) -> list[Content]:
        """A picture of a few there are, or a clip, which may be a longer cut of another; pictures where the family
        takes no clips."""
        rng = self.rng
        if kind == "picture":
            width, height = rng.choice([(56, 56), (56, 56), (84, 56), (112, 112)])
            return [shown(rng.randrange(4), width, height)]
        if "video" in self.lively.eyes(self.setting.model).kinds:
            return [moving(rng.randrange(2), rng.choice([4, 6]))]
        return [shown(number) for number in range(rng.choice([2, 3]))]

    def with_media(self, items: Items, kinds: Sequence[str]) -> Items:
        """Each at a place of its own among the items."""
        for kind in kinds if self.sees else ():
            at = self.rng.randrange(len(items) + 1)
            items = (*items[:at], *self.shown(kind), *items[at:])
        return items

    def remember(self, prompt: Items) -> Items:
        """Ask before what shares tokens with `prompt`, of both adapters. Returns the prompt to ask."""
        rng, talk, form = self.rng, self.talks[-1], (self.form,)
        talk.add(self.request("beside-before", prompt, 3, precisions=form))
        talk.finish()
        cut = rng.randrange(len(prompt)) if rng.random() < 0.3 else len(prompt)
        earlier = prompt[:cut] + self.tokens(rng.randrange(20) if cut else 5)
        talk.add(self.request("asked-before", earlier, rng.randrange(1, 12), precisions=form))
        talk.finish()
        self.num_shared = min(self.length(prompt[:cut]), self.length(prompt) - 1)
        answer = talk.tokens["asked-before"]
        if cut == len(earlier) and min(answer) >= self.first_token and rng.random() < 0.5:
            history = (*earlier, *answer)  # a conversation goes on
            self.num_shared = self.length(history) - 1  # the last token was drawn and never computed
            return history + self.tokens(rng.randrange(1, 20))
        return prompt

    def tokens(self, count: int) -> tuple[int, ...]:
        return random_tokens(self.rng, count, self.first_token)

    def length(self, items: Items) -> int:
        """In tokens."""
        return len(self.build(items).token_ids)

    def begin(self, prompt: Items) -> Items:
        """What was before the case itself. Returns the prompt to ask."""
        past = self.setting.past
        self.open(asked=2 if past == "replaced" else 0)
        if past != "none":
            prompt = self.remember(prompt)
        if past == "disk":
            self.engine.close()
            self.open()
        if past == "replaced" and self.setting.asked != "base":
            self.load("asked", self.setting.asked, 0)
            self.num_shared = 0
        return prompt

    def run(self) -> None:
        rng, setting = self.rng, self.setting
        tokens = self.tokens(rng.choice([1, 5, 30, 64, 65, 130, 240, 250]))
        prompt = self.begin(self.with_media(tokens, setting.seen))
        asked = self.request("asked", prompt, NUM_TOKENS, setting.samplings, (self.form,), setting.said)
        names = ["beside", "asked", "beside", "asked", "beside", "beside", "asked"]
        company = [self.companion(f"{name}-{number}", prompt) for number, name in enumerate(names)]
        asked = replace(asked, tenant=setting.tenant)
        if setting.life == "reloaded":
            self.lose_slot()
        talk = self.talk()
        if setting.life == "updated":
            talk.added = self.update
        setting.place(talk, asked, company, rng)

    def companion(self, id: str, prompt: Items) -> Request:
        """One of any length and form; half of them begin as the asked prompt does, and are stored as it is."""
        rng = self.rng
        is_akin = rng.random() < 0.5
        head = prompt[: rng.randrange(len(prompt) + 1)] if is_akin else ()
        tail = self.with_media(
            self.tokens(rng.choice([1, 7, 33, 100])), rng.choice([(), ("picture",), ("clip",)])
        )
        forms = (self.form,) if is_akin else None
        said = rng.choice(["free", self.setting.said])
        return self.request(id, head + tail, rng.randrange(3, 24), precisions=forms, said=said)

    def check(self, assert_drawn: Callable[[Request, Sequence[int], nn.Module], None]) -> None:
        """Every answer that there was."""
        for talk in self.talks:
            for name, asked in talk.asked.items():
                assert len(talk.tokens[name]) == asked.sampling.max_tokens
                module = self.lively.module(self.setting.model, *self.source_of[name])
                assert_drawn(asked, talk.tokens[name], module)

    def check_drafts(self) -> None:
        """Of guesses some were right and some were not, and each answer's drafter was told of its end."""
        for foreteller in self.foretellers:
            ended = sorted(foreteller.forgotten)
            assert ended == sorted(set(ended)), "told twice"
        if self.told:
            stats = list(self.engine.guesses.stats.values())
            assert 0 < sum(one.num_accepted for one in stats) < sum(one.num_drafted for one in stats)
        elif self.engine.guesses.names and not (self.setting.drafter == "model" and self.setting.seen):
            stats = list(self.engine.guesses.stats.values())
            assert sum(one.num_drafted for one in stats)
            # Turbo's few bits change what a random model says: its twin, whose keys are plain, need not guess that.
            is_exact = all(each.scheme != "turbo" for each in self.setting.precisions)
            is_twin = self.setting.drafter == "model" and self.setting.model == "full" and is_exact
            if is_twin and (self.setting.asked, self.setting.said, self.setting.budgets) == (
                "base",
                "free",
                (),
            ):
                assert sum(one.num_accepted for one in stats)

    def check_hits(self) -> None:
        """Without recurrent state, what was computed before is not computed again; what must not be used is."""
        num_cached, setting = self.talks[-1].num_cached["asked"], self.setting
        if setting.past == "none" or setting.tenant:
            assert num_cached == 0
        elif setting.past == "replaced" and setting.asked != "base":
            # What came meanwhile may begin alike, and be of the same adapter.
            assert num_cached == 0 or setting.place is not alone, "the replaced adapter computed it"
        elif setting.model not in RECURRENT and self.form.start_after == 0:
            assert num_cached >= self.talks[-1].asked["asked"].prompt.whole(self.num_shared)


def test_a_request_draws_what_it_draws_alone_on_the_merged_model(case, lively, assert_drawn, tmp_path):
    name, setting = "-".join(case), setting_of(case)
    told: dict[str, list[int]] = {}
    if setting.drafter in ("told", "ngram"):
        first = Scene(setting, name, lively, tmp_path / "first")
        try:
            first.run()
        finally:
            first.engine.close()
        told = {id: tokens for talk in first.talks for id, tokens in talk.tokens.items()}
    scene = Scene(setting, name, lively, tmp_path / "case", told)
    try:
        scene.run()
        scene.check(assert_drawn)
        scene.check_hits()
        scene.check_drafts()
    except Exception as error:
        error.add_note(
            f"again: pytest tests/serve/test_composition.py -m 'large or not large' -k {name}\n"
            f"{scene.form.label}, {scene.limits.prefill_chunk_tokens} tokens a chunk, asked in this order: "
            + ", ".join(
                f"{id} ({len(r.prompt.token_ids)} tokens)" for t in scene.talks for id, r in t.asked.items()
            )
        )
        raise
    finally:
        scene.engine.close()


@pytest.mark.parametrize("dimensions", [DIMENSIONS, SEEING], ids=["reading", "seeing"])
def test_the_large_cases_hold_every_three_values_and_the_full_product_every_case(dimensions):
    cases = cases_of(dimensions, 3)
    for places in combinations(range(len(dimensions)), 3):
        wanted = set(product(*(list(dimensions.values())[place] for place in places)))
        assert {tuple(case[place] for place in places) for case in cases} == wanted
    sizes = list(map(len, list(dimensions.values())[:5]))
    assert sorted(numbered(sizes, number) for number in range(prod(sizes))) == sorted(
        product(*map(range, sizes))
    )


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.large)
        for name in ("qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_5", "smolvlm")
    ],
)
def test_the_models_that_see_are_lively_enough_to_tell(name, kind, lively):
    """Likeliest tokens along a text are many, and hang on the picture and on the adapter."""
    eyes, answer = lively.eyes(name), [(7 * number) % 200 + 10 for number in range(40)]

    def likeliest(picture: int, module: Any) -> list[int]:
        request = Request("r", eyes.prompt(list(range(40, 70)), shown(picture), [50, 60]), Sampling())
        return module.logits(request, answer).argmax(axis=-1).tolist()

    module = lively.module(name, kind, 0)
    drawn = likeliest(1, module)
    assert len(set(drawn)) >= 12
    assert sum(a != b for a, b in zip(drawn, likeliest(2, module), strict=True)) >= 8
    if kind != "base":
        for other in (lively.module(name, "base"), lively.module(name, kind, 1)):
            assert sum(a != b for a, b in zip(drawn, likeliest(1, other), strict=True)) >= 10


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
