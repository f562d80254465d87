"""Laws of the engine with prefixes: cold ≡ warm, whatever the past of a text went through, and wherever it was kept.

Every answer is held to the whole model by `assert_drawn`; how many tokens nobody computed is told by the events.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from serve.adapters.versions.version import AdapterVersion
from serve.cache.capacity import Bucket
from serve.cache.precision import PLAIN, KvPrecision, precision
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Request, Sampling
from serve.model.loading import load
from serve.model.prompt import Prompt

pytestmark = pytest.mark.long
FORMS = {
    "plain": PLAIN,
    "q8": precision(8),
    "q4_late": precision(4, start_after=70, num_plain_layers=1),
    "turbo": precision(3.5),
}
MODELS = ("full", "sliding", "hybrid")
CHUNK = 32


def some_of(*dimensions: Sequence[Any]) -> list[Any]:
    """All combinations for parametrize: every third runs always, the others under `-m large`."""
    combinations = list(product(*dimensions))
    return [
        pytest.param(*each, marks=() if number % 3 == 0 else pytest.mark.large)
        for number, each in enumerate(combinations)
    ]


@dataclass
class Answer:
    """Of one request."""

    request: Request
    tokens: list[int]
    num_cached: int = 0

    @property
    def text(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.request.prompt.token_ids, *self.tokens)


class Talk:
    """Asks one engine; numbers the requests."""

    def __init__(self, engine: Engine, form: KvPrecision = PLAIN) -> None:
        self.engine, self.form = engine, form
        self._number = 0

    def request(
        self,
        prompt: Sequence[int],
        version: AdapterVersion | None = None,
        *,
        max_tokens: int = 12,
        **options: Any,
    ) -> Request:
        self._number += 1
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        options = {"precision": self.form, "sampling": sampling, **options}
        return Request(f"r{self._number}", Prompt(tuple(prompt)), adapter=version, **options)

    def ask(self, *requests: Request) -> list[Answer]:
        """All together, to their ends."""
        answers = {request.id: Answer(request, []) for request in requests}
        for request in requests:
            self.engine.add(self.engine.check(request))
        while self.engine.has_work:
            self.step(answers)
        return list(answers.values())

    def step(self, answers: dict[str, Answer]) -> None:
        for event in self.engine.step():
            assert event.error is None, event.error
            answer = answers[event.request_id]
            answer.tokens += event.token_ids
            answer.num_cached = max(answer.num_cached, event.num_cached_tokens)
        self.engine.scheduler.check_integrity()
        self.engine.prefixes.cache.check_integrity()

    def again(self, prompt: Sequence[int], version: AdapterVersion | None = None, **options: Any) -> Answer:
        """One request alone."""
        return self.ask(self.request(prompt, version, **options))[0]


@contextmanager
def talking(lively: Any, name: str, form: KvPrecision = PLAIN, **limits: Any) -> Iterator[Talk]:
    """An engine that is closed at the end: what waits for the disk is written."""
    limits = {"prefill_chunk_tokens": CHUNK, "max_rows": 8, **limits}
    engine = Engine(load(str(lively.folder(name)), name="law"), EngineLimits(**limits))
    try:
        yield Talk(engine, form)
    finally:
        engine.prefixes.cache.close()


def text(seed: object, count: int) -> tuple[int, ...]:
    rng = random.Random(str(seed))
    return tuple(rng.randrange(3, 259) for _ in range(count))


def reach(name: str, num_tokens: int, form: KvPrecision = PLAIN) -> int:
    """The longest prefix of so many tokens that a row can be given of a longer text: recurrent state is kept where a
    chunk ends, and a chunk ends where quantizing starts."""
    if name != "hybrid":
        return num_tokens
    start = form.start_after if form.start_after <= num_tokens else 0
    return start + (num_tokens - start) // CHUNK * CHUNK


@pytest.mark.parametrize(("name", "form"), some_of(MODELS, FORMS))
def test_warm_is_cold_for_the_base_its_adapters_and_one_replaced_in_place_also_after_a_restart(
    lively, assert_drawn, tmp_path, name, form
):
    """Four sources of the same text, each asked twice; then once more in a new process's engine."""
    prompt = text(name, 100)
    sources = [("base", 0), ("lora", 0), ("dora", 0), ("lora", 1)]  # the last one in the place of the second
    limits = {"prefix_cache_dir": tmp_path, "prefix_cache_disk_bytes": 1 << 30}
    answers = []
    for is_restart in (False, True):
        with talking(lively, name, FORMS[form], **limits) as talk:
            for kind, number in sources:
                version = None
                if kind != "base":
                    folder = lively.adapter(name, kind, number)
                    version = talk.engine.registry.load(kind, folder, replace=True)
                first = talk.again(prompt, version)
                second = talk.again([*prompt, *first.tokens, *text(kind, 5)], version)
                wanted = reach(name, 99, FORMS[form]) if is_restart else 0
                assert first.num_cached == wanted, "another source's prefix, or not all of its own"
                # The last drawn token was never an input; what the second one computed is there after the restart.
                assert second.num_cached == 111 if not is_restart else second.num_cached >= reach(name, 116)
                answers += [(kind, number, first), (kind, number, second)]
            assert talk.engine.stats().prefixes.num_disk_errors == 0
            from_disk = talk.engine.stats().prefixes.num_disk_hit_tokens
            assert (from_disk > 4 * 90) == is_restart
    assert len({tuple(answer.tokens) for _, _, answer in answers}) == 8, (
        "sources and prompts change the answer"
    )
    for kind, number, answer in answers:
        assert_drawn(answer.request, answer.tokens, lively.module(name, kind, number))


@pytest.mark.parametrize(("name", "form", "ahead"), some_of(MODELS, FORMS, [True, False]))
def test_batches_of_mixed_lengths_leave_no_padding_in_what_they_keep(lively, assert_drawn, name, form, ahead):
    """Eight texts that part at random, asked together; then longer ones, in another order and company."""
    rng = random.Random(f"{name} {form}")
    root = text("root", 150)
    prompts = [(*root[: rng.randrange(3, 150)], *text(i, rng.randrange(1, 60))) for i in range(8)]
    with talking(lively, name, FORMS[form], ahead=ahead) as talk:
        cold = talk.ask(*(talk.request(prompt, max_tokens=rng.randrange(1, 20)) for prompt in prompts))
        follow = [(*answer.text, *text(answer.request.id, rng.randrange(1, 40))) for answer in cold]
        rng.shuffle(follow)
        warm = talk.ask(*(talk.request(prompt, max_tokens=rng.randrange(1, 20)) for prompt in follow))
        assert all(
            answer.num_cached > 0 or len(answer.request.prompt.token_ids) < 2 * CHUNK for answer in warm
        )
    module = lively.module(name, "base")
    for answer in [*cold, *warm]:
        assert_drawn(answer.request, answer.tokens, module)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_prompt_again_leaves_its_last_token_to_run(lively, assert_drawn, name):
    with talking(lively, name) as talk:
        for length in (1, 2, CHUNK, CHUNK + 1, 100):
            prompt = text(length, length)
            first, second = talk.again(prompt), talk.again(prompt)
            assert first.num_cached == 0
            assert second.num_cached == reach(name, length - 1)
            for answer in (first, second):
                assert_drawn(answer.request, answer.tokens, lively.module(name, "base"))


@pytest.mark.parametrize("ahead", [False, True], ids=["in_turn", "ahead"])
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_that_comes_back_as_history_is_found_to_its_last_forwarded_token(
    lively, assert_drawn, name, ahead
):
    """Also where it ended by an end token: that is drawn and never an input, but for a step ahead."""
    with talking(lively, name, ahead=ahead) as talk:
        free = talk.again(text("history", 40), max_tokens=30)
        end = {"stop_ids": (free.tokens[20],), "sampling": Sampling(max_tokens=30, temperature=0.0)}
        ended = talk.again(text("history", 40), tenant="t", **end)
        assert len(ended.tokens) < 30, "it ended by a token"
        found = talk.again((*ended.text, *text("next", 10)), tenant="t")
        assert found.num_cached == len(ended.text) - (not ahead)
        assert_drawn(found.request, found.tokens, lively.module(name, "base"))


def test_recurrent_texts_that_share_a_beginning_share_its_state_from_the_third_on(lively, assert_drawn):
    """The second finds where it parts from the first, inside a chunk, and leaves a state there."""
    with talking(lively, "hybrid") as talk:
        shared = text("shared", CHUNK + 11)
        answers = [talk.ask(talk.request((*shared, *text(name, 20))))[0] for name in "abc"]
        assert [answer.num_cached for answer in answers] == [0, CHUNK, len(shared)]
        for answer in answers:
            assert_drawn(answer.request, answer.tokens, lively.module("hybrid", "base"))


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_tenants_and_salts_share_nothing_in_either_tier(lively, assert_drawn, tmp_path, tier):
    prompt = text("secret", 80)
    whose = [{}, {"tenant": "a"}, {"tenant": "b"}, {"cache_salt": "a"}, {"tenant": "a", "cache_salt": "a"}]
    limits = {"prefix_cache_dir": tmp_path, "prefix_cache_disk_bytes": 1 << 30} if tier == "disk" else {}
    cached = []
    for options in whose:
        with talking(lively, "full", **limits) as talk:
            if tier == "memory":
                cached = [talk.again(prompt, **each).num_cached for each in (*whose, *whose)]
                break
            cached.append(talk.again(prompt, **options).num_cached)
    if tier == "disk":
        with talking(lively, "full", **limits) as talk:
            cached += [talk.again(prompt, **options).num_cached for options in whose]
    assert cached == [0] * 5 + [79] * 5


@pytest.mark.parametrize(("name", "form"), some_of(MODELS, FORMS))
def test_a_row_that_was_preempted_goes_on_from_what_was_kept_of_it(lively, assert_drawn, name, form):
    """Two rows of one group and room for two: a third request takes the younger one's row."""
    with talking(lively, name, FORMS[form], max_rows=2) as talk:
        requests = [talk.request(text(i, 70), max_tokens=40, group="g") for i in range(2)]
        late = talk.request(text(2, 50))
        answers = {request.id: Answer(request, []) for request in (*requests, late)}
        for request in requests:
            talk.engine.add(talk.engine.check(request))
        while len(answers["r2"].tokens) < 10:
            talk.step(answers)
        talk.engine.add(talk.engine.check(late))
        while talk.engine.has_work:
            talk.step(answers)
        stats = talk.engine.stats()
    assert stats.num_preempted >= 1
    # Both prompts are computed once, and of what was taken back little more than the token that draws the next.
    assert stats.num_prompt_tokens <= 2 * 70 + 50 + stats.num_preempted * 2
    for answer in answers.values():
        assert len(answer.tokens) == answer.request.sampling.max_tokens
        assert_drawn(answer.request, answer.tokens, lively.module(name, "base"))


@pytest.mark.parametrize("name", MODELS)
def test_who_leaves_early_leaves_what_was_computed(lively, assert_drawn, name):
    with talking(lively, name) as talk:
        request = talk.request(text("left", 100), max_tokens=200)
        answers = {request.id: Answer(request, [])}
        talk.engine.add(talk.engine.check(request))
        while len(answers[request.id].tokens) < 5:
            talk.step(answers)
        assert talk.engine.cancel(request.id).finish == "cancelled"
        while talk.engine.has_work:
            talk.engine.step()
        warm = talk.again((*request.prompt.token_ids, 77))
        assert warm.num_cached >= reach(name, 100)
        assert_drawn(warm.request, warm.tokens, lively.module(name, "base"))


@pytest.mark.parametrize("ahead", [False, True], ids=["in_turn", "ahead"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_found_while_the_row_that_computed_it_still_runs(lively, assert_drawn, name, ahead):
    """Every chunk of it, though a step ahead the chunk before is not read yet."""
    with talking(lively, name, ahead=ahead) as talk:
        first = talk.request(text("shared", 150), max_tokens=60)
        second = talk.request((*text("shared", 150), 7))
        answers = {request.id: Answer(request, []) for request in (first, second)}
        talk.engine.add(talk.engine.check(first))
        while len(answers[first.id].tokens) < 5:
            talk.step(answers)
        talk.engine.add(talk.engine.check(second))
        while talk.engine.has_work:
            talk.step(answers)
    assert answers[second.id].num_cached == 150
    for answer in answers.values():
        assert_drawn(answer.request, answer.tokens, lively.module(name, "base"))


def test_an_idle_engine_keeps_prefixes_and_no_rows(lively):
    with talking(lively, "full") as talk:
        talk.again(text(0, 100))
        memory = talk.engine.stats().memory
        assert memory.kv_bytes == 0
        assert memory.prefix_bytes > 0
        assert talk.again(text(0, 100)).num_cached == 99


def test_rows_and_prefixes_stay_within_one_budget_and_rows_come_first(lively, assert_drawn):
    """A budget of two long rows: prefixes have what rows leave, and give it back."""
    rng = random.Random(0)
    with talking(lively, "full") as talk:
        cost = talk.engine.scheduler.budget.row_cost
        row = cost.row_bytes(Bucket(PLAIN, 512))
    with talking(lively, "full", kv_budget_bytes=2 * row + cost.state_bytes) as talk:
        prompts = [text(i % 5, rng.randrange(60, 300)) for i in range(12)]
        answers = {}
        for prompt in prompts:
            request = talk.request(prompt, max_tokens=rng.randrange(1, 60))
            answers[request.id] = Answer(request, [])
            talk.engine.add(talk.engine.check(request))
        while talk.engine.has_work:
            talk.step(answers)
            memory = talk.engine.stats().memory
            assert memory.kv_bytes + memory.prefix_bytes <= 2 * row + cost.state_bytes
        assert talk.engine.stats().prefixes.num_evicted > 0
    for answer in answers.values():
        assert_drawn(answer.request, answer.tokens, lively.module("full", "base"))


def test_two_precisions_of_one_text_share_nothing(lively, assert_drawn):
    with talking(lively, "full") as talk:
        prompt = text("forms", 90)
        for form in FORMS.values():
            first, second = (talk.again(prompt, precision=form) for _ in range(2))
            assert (first.num_cached, second.num_cached) == (0, 89)
            for answer in (first, second):
                assert_drawn(answer.request, answer.tokens, lively.module("full", "base"))


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_shorter_than_where_quantizing_starts_is_plain(lively, assert_drawn, name):
    """A long text is quantized as a whole; a short text that shares its beginning is not, and computes its own."""
    form = precision(4, start_after=64)
    with talking(lively, name, form) as talk:
        long = talk.again(text("long", 150))
        short = talk.again((*text("long", 150)[:40], 5))
        again = talk.again((*text("long", 150)[:40], 5, 6))
        longer = talk.again((*text("long", 150), 9))
        assert longer.num_cached >= reach(name, 150)
        for answer in (long, short, again, longer):
            assert_drawn(answer.request, answer.tokens, lively.module(name, "base"))


def test_a_row_that_is_kept_quantized_from_its_first_token_on_serves_no_shorter_one(lively, assert_drawn):
    """What was kept of its plain beginning is forgotten while it runs, so that it is kept anew when it ends."""
    with talking(lively, "full", precision(4, start_after=64)) as talk:
        request = talk.request(text("long", 100), max_tokens=20)
        answers = {request.id: Answer(request, [])}
        talk.engine.add(talk.engine.check(request))
        while len(answers[request.id].tokens) < 5:
            talk.step(answers)
        talk.engine.forget()
        while talk.engine.has_work:
            talk.step(answers)
        short = talk.again((*text("long", 100)[:40], 5))
        longer = talk.again((*text("long", 100), 9))
        assert (short.num_cached, longer.num_cached) == (0, 100)
        for answer in (short, longer):
            assert_drawn(answer.request, answer.tokens, lively.module("full", "base"))


def test_the_middle_of_a_long_answer_is_no_prefix_where_windows_have_moved_on(lively, assert_drawn):
    """Windows of 16 in rings of 64: of an answer of 150 tokens the first 90 can be gone through, not ended in."""
    with talking(lively, "sliding") as talk:
        long = talk.again(text("windows", 40), max_tokens=150)
        ended = talk.again((*long.text, 7))
        inside = talk.again((*long.text[:100], 7))
        assert (ended.num_cached, inside.num_cached) == (189, 40)
        for answer in (long, ended, inside):
            assert_drawn(answer.request, answer.tokens, lively.module("sliding", "base"))


def test_files_torn_while_it_runs_cost_time_and_no_token(lively, assert_drawn, tmp_path):
    limits = {"prefix_cache_dir": tmp_path, "prefix_cache_disk_bytes": 1 << 30}
    prompts = [text(i, 100) for i in range(4)]
    with talking(lively, "full", **limits) as talk:
        for prompt in prompts:
            talk.again(prompt)
    with talking(lively, "full", **limits) as talk:
        for number, path in enumerate(sorted(Path(tmp_path).glob("kv-*"))):
            if number % 2:
                path.write_bytes(path.read_bytes()[: -(number + 1)] + bytes(number + 1))
        for prompt in prompts:
            answer = talk.again(prompt)
            assert_drawn(answer.request, answer.tokens, lively.module("full", "base"))
        stats = talk.engine.stats().prefixes
        assert stats.num_disk_errors > 0


@pytest.mark.parametrize(("name", "seed"), some_of(MODELS, range(4)))
def test_conversations_in_too_little_memory_are_right_whatever_was_evicted(
    lively, assert_drawn, tmp_path, name, seed
):
    """Twelve conversations of four turns over three system prompts, of two tenants, some rows quantized."""
    rng = random.Random(f"{name} {seed}")
    limits = {
        "prefix_cache_bytes": 400_000,
        "prefix_cache_dir": tmp_path,
        "prefix_cache_disk_bytes": 2_000_000,
    }
    systems = [text(("system", i), 60) for i in range(3)]
    talks = [
        {
            "tokens": rng.choice(systems),
            "options": {"tenant": rng.choice("ab"), "precision": rng.choice([*FORMS.values()])},
        }
        for _ in range(12)
    ]
    with talking(lively, name, ahead=bool(seed % 2), **limits) as talk:
        answers = []
        for _ in range(4):
            rng.shuffle(talks)
            for start in range(0, 12, 6):
                some = talks[start : start + 6]
                for each in some:
                    each["tokens"] = (*each["tokens"], *text(rng.random(), rng.randrange(1, 30)))
                requests = [
                    talk.request(each["tokens"], max_tokens=rng.randrange(1, 20), **each["options"])
                    for each in some
                ]
                for each, answer in zip(some, talk.ask(*requests), strict=True):
                    each["tokens"] = answer.text
                    answers.append(answer)
        stats = talk.engine.stats().prefixes
        assert stats.num_evicted > 0
        assert stats.num_hit_tokens > 0
        assert stats.num_disk_errors == 0
    module = lively.module(name, "base")
    for answer in answers:
        assert_drawn(answer.request, answer.tokens, module)


def test_a_replaced_request_field_is_all_it_takes(lively):
    """Nothing but its space keeps one request from another's prefix: the same one again finds all of it."""
    with talking(lively, "full") as talk:
        request = talk.request(text("same", 50), tenant="t", cache_salt="s")
        talk.ask(request)
        assert talk.ask(replace(request, id="again"))[0].num_cached == 49
