"""What changes logits: by the formulas of mlx-lm, transformers and vLLM, in any company, and in the engine."""

from __future__ import annotations

import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from serve.engine.edited import edited
from serve.engine.edits import Edits, LogitsChange, PenaltyEdit
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.engine.penalties import Penalties
from serve.engine.request import Sampling
from serve.engine.sampler import Sampler
from serve.model.prompt import Prompt

V = 70
EVERYTHING = 1 << 20


def some_sampling(rng: random.Random, **fixed: object) -> Sampling:
    """Penalties of every kind, each as often there as not."""
    settings: dict[str, object] = {}
    for name, low, high in (("repetition", 0.5, 2.5), ("presence", -2, 2), ("frequency", -2, 2)):
        if rng.random() < 0.6:
            settings[f"{name}_penalty"] = rng.uniform(low, high)
            settings[f"{name}_context_size"] = rng.choice([None, None, 1, 3, 20])
    if rng.random() < 0.6:
        ids = rng.sample(range(V), rng.randrange(1, 9))
        settings["logit_bias"] = tuple((token_id, rng.uniform(-100, 100)) for token_id in ids)
    return Sampling(**{**settings, **fixed})


def by_mlx_lm(logits: mx.array, asked: Sampling, prompt: list[int], answer: list[int]) -> mx.array:
    """Logits [V] through mlx-lm's processors; those without a context size see the answer alone, but repetition."""
    own = {"repetition_penalty": asked.repetition_penalty, "logit_bias": dict(asked.logit_bias)}
    steps = [
        (own | {"repetition_context_size": asked.repetition_context_size or EVERYTHING}, prompt + answer)
    ]
    for name in ("presence", "frequency"):
        window = getattr(asked, f"{name}_context_size")
        penalty = {f"{name}_penalty": getattr(asked, f"{name}_penalty")}
        history = answer if window is None else prompt + answer
        steps.append((penalty | {f"{name}_context_size": window or EVERYTHING}, history))
    logits = logits[None]
    for settings, history in steps:
        for processor in make_logits_processors(**settings):
            logits = processor(mx.array(history, dtype=mx.int32), logits)
    return logits[0]


def by_vllm(logits: np.ndarray, asked: Sampling, prompt: list[int], answer: list[int]) -> np.ndarray:
    """vLLM's apply_penalties, in numpy."""
    counts = np.bincount(np.asarray(answer, dtype=int), minlength=V)
    has_come = (counts > 0) | (np.bincount(np.asarray(prompt, dtype=int), minlength=V) > 0)
    factor = np.where(has_come, asked.repetition_penalty, 1.0)
    logits = np.where(logits > 0, logits / factor, logits * factor)
    logits = logits - asked.frequency_penalty * counts
    return logits - asked.presence_penalty * (counts > 0)


def changed(logits: mx.array, penalties: Penalties) -> np.ndarray:
    change = PenaltyEdit(penalties).change()
    return np.asarray(edited(logits[None], {} if change is None else {0: change})[0])


@pytest.mark.parametrize("seed", range(60))
def test_penalties_are_mlx_lms_whatever_is_asked_and_however_tokens_come(seed):
    rng = random.Random(seed)
    asked = some_sampling(rng)
    prompt = [rng.randrange(V) for _ in range(rng.choice([1, 2, 19, 60]))]
    penalties, answer = Penalties(asked, Prompt(tuple(prompt)), ends=()), []
    for _ in range(12):
        logits = mx.array([rng.gauss(0, 3) for _ in range(V)])
        expected = np.asarray(by_mlx_lm(mx.array(logits), asked, prompt, answer))
        np.testing.assert_allclose(changed(logits, penalties), expected, rtol=1e-5, atol=1e-4)
        if answer and rng.random() < 0.3:
            count = rng.randrange(1, len(answer) + 1)
            penalties.pop(count)
            del answer[len(answer) - count :]
        else:
            news = [rng.randrange(V) for _ in range(rng.randrange(1, 6))]
            penalties.push(news)
            answer += news


@pytest.mark.parametrize("seed", range(20))
def test_penalties_are_vllms_and_transformers(seed):
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = random.Random(seed)
    asked = Sampling(
        repetition_penalty=rng.uniform(0.5, 2), presence_penalty=rng.uniform(-2, 2), frequency_penalty=0.7
    )
    prompt, answer = ([rng.randrange(V) for _ in range(count)] for count in (15, 25))
    logits = np.asarray([rng.gauss(0, 3) for _ in range(V)], dtype=np.float32)
    penalties = Penalties(asked, Prompt(tuple(prompt)), ends=())
    penalties.push(answer)
    found = changed(mx.array(logits), penalties)
    np.testing.assert_allclose(found, by_vllm(logits, asked, prompt, answer), rtol=1e-5, atol=1e-5)
    alone = Penalties(replace(asked, presence_penalty=0, frequency_penalty=0), Prompt(tuple(prompt)), ends=())
    alone.push(answer)
    processor = RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)
    by_hf = processor(torch.tensor([prompt + answer]), torch.tensor(logits[None]))[0].numpy()
    np.testing.assert_allclose(changed(mx.array(logits), alone), by_hf, rtol=1e-6)


def test_nothing_ends_before_min_tokens_and_a_bias_on_an_end_counts_after_it():
    asked = Sampling(min_tokens=2, logit_bias=((5, 3.0),))
    penalties, logits = Penalties(asked, Prompt((1,)), ends=(5, 9)), mx.zeros((V,))
    for pushed in ((), (2,)):
        penalties.push(pushed)
        found = changed(logits, penalties)
        assert set(np.flatnonzero(found == -np.inf)) == {5, 9}
    penalties.push([2])
    assert (changed(logits, penalties)[5], changed(logits, penalties)[9]) == (3.0, 0.0)
    penalties.pop(1)
    assert set(np.flatnonzero(changed(logits, penalties) == -np.inf)) == {5, 9}
    only = Penalties(Sampling(min_tokens=1), Prompt((1,)), ends=(5,))
    only.push([1])
    assert only.changes() is None, "what does nothing any more costs nothing"


def some_change(rng: random.Random) -> LogitsChange | None:
    kind = rng.choice(["none", "tokens", "mask", "forced", "both"])
    asked = some_sampling(rng, logit_bias=((3, 1.5), (V - 1, -2.0)))
    penalties = Penalties(asked, Prompt(tuple(rng.randrange(V) for _ in range(9))), ends=())
    words = np.asarray([rng.getrandbits(32) | 1 for _ in range(-(-V // 32))], dtype=np.uint32)
    return {
        "none": None,
        "tokens": LogitsChange(penalties.changes()),
        "mask": LogitsChange(allowed=words),
        "forced": LogitsChange(forced=rng.randrange(V)),
        "both": LogitsChange(penalties.changes(), words),
    }[kind]


def some_row(rng: random.Random, seed: int) -> Sampling:
    drawn = [
        {"temperature": 0.0},
        {},
        {"min_p": 0.05},
        {"top_k": 7},
        {"top_p": 0.8},
        {"xtc_probability": 0.7, "xtc_threshold": 0.05, "xtc_special_tokens": (4, seed % V)},
        {"top_n_sigma": 1.0, "top_k": 5, "xtc_probability": 0.5, "xtc_threshold": 0.1},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 30, "min_p": 0.01},
    ]
    return Sampling(seed=seed, num_logprobs=rng.choice([None, 0, 3]), **rng.choice(drawn))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rows_with_and_without_edits_in_one_batch_are_each_as_alone(seed, dtype):
    rng = random.Random(seed)
    mx.random.seed(seed)
    rows = [some_row(rng, 100 * seed + number) for number in range(13)]
    changes = {number: change for number in range(13) if (change := some_change(rng)) is not None}
    logits = (mx.random.normal((13, V)) * 3).astype(dtype)
    before = np.asarray(logits.astype(mx.float32))
    counters = [rng.randrange(50) for _ in rows]
    together = Sampler(rows).draw(logits, counters, changes)
    assert (np.asarray(logits.astype(mx.float32)) == before).all(), "the logits themselves are not changed"
    assert all(together.is_sound.tolist())
    asking = [number for number, row in enumerate(rows) if row.num_logprobs is not None]
    for number, row in enumerate(rows):
        own = {0: changes[number]} if number in changes else {}
        alone = Sampler([row]).draw(logits[number : number + 1], [counters[number]], own)
        assert together.token_ids[number].item() == alone.token_ids[0].item()
        if number in asking:
            at = asking.index(number)
            assert together.logprobs.drawn[at].item() == pytest.approx(alone.logprobs.drawn[0].item())
        elif row.temperature == 0 and number not in changes:
            assert alone.token_ids[0].item() == int(before[number].argmax())


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 97])
def test_a_mask_lets_through_what_its_bits_say_and_no_other(size):
    rng = np.random.default_rng(size)
    allowed = rng.random(size) < 0.4
    words = np.packbits(np.pad(allowed, (0, -size % 32)), bitorder="little").view(np.uint32)
    found = np.asarray(edited(mx.zeros((2, size)), {1: LogitsChange(allowed=words)}))
    assert ((found[1] == 0) == allowed).all()
    assert (found[0] == 0).all()
    both = LogitsChange(allowed=words).then(LogitsChange(allowed=~words))
    assert (np.asarray(edited(mx.zeros((1, size)), {0: both})) == -np.inf).all()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_token_is_forced_where_the_mask_lets_it_through_and_waits_where_not(is_first):
    """A thought's end inside a character was forced on a grammar that then could not go on: a 500."""
    bits = np.zeros(64, dtype=bool)
    bits[[3, 40]] = True
    mask = LogitsChange(allowed=np.packbits(bits, bitorder="little").view(np.uint32))
    for token, comes in ((40, {40}), (41, {3, 40})):
        force = LogitsChange(forced=token)
        both = force.then(mask) if is_first else mask.then(force)
        found = np.asarray(edited(mx.zeros((1, 64)), {0: both}))[0]
        assert set(np.flatnonzero(found == 0).tolist()) == comes
        assert {each for each in range(64) if both.allows(each)} == comes


def test_where_nothing_may_come_nothing_is_drawn():
    nothing = LogitsChange(allowed=np.zeros(-(-V // 32), dtype=np.uint32))
    for row in (Sampling(temperature=0.0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)):
        for broken in (0.0, mx.nan):
            draws = Sampler([row, row, row]).draw(
                mx.array([[0.0], [0.0], [broken]]) * mx.ones(V), [0, 0, 0], {1: nothing}
            )
            assert draws.may_come is not None
            assert draws.may_come.tolist()[:2] == [True, False]
            assert draws.is_sound.tolist() == [True, True, broken == 0.0]


class Counting:
    """An edit as thoughts and grammars will be: after token t nothing but t + 1 comes, or what a mask of it alone
    allows; it raises at the token `bad`."""

    def __init__(self, first: int, vocabulary: int, *, by_mask: bool, bad: int | None = None) -> None:
        self.told: list[int] = [first - 1]
        self._words, self._by_mask, self._bad = -(-vocabulary // 32), by_mask, bad

    def advance(self, token_ids):
        self.told += token_ids

    def retract(self, count):
        del self.told[len(self.told) - count :]

    def change(self):
        following = self.told[-1] + 1
        if following == self._bad:
            raise ArithmeticError("this grammar is broken")
        if not self._by_mask:
            return LogitsChange(forced=following)
        words = np.zeros(self._words, dtype=np.uint32)
        words[following // 32] = 1 << following % 32
        return LogitsChange(allowed=words)


@pytest.fixture
def run(model):
    """run(requests, edits by id, **limits) → events."""

    def play(requests, edits, **limits):
        engine = Engine(model, EngineLimits(max_rows=4, **limits))
        try:
            for request in requests:
                engine.add(engine.check(request))
                if request.id in edits:
                    engine._by_id[request.id].edit = edits[request.id]
            events = []
            while engine.has_work:
                events += engine.step()
                engine.scheduler.check_integrity()
            return events
        finally:
            engine.close()

    return play


def tokens_of(events, name):
    return [token for event in events if event.request_id == name for token in event.token_ids]


@pytest.mark.parametrize("ahead", [False, True])
def test_an_edit_hears_each_token_before_it_is_asked_also_a_step_ahead(
    run, make_request, assert_drawn, model, ahead
):
    free = [make_request(f"free {i}", "to be or not to be"[i:], max_tokens=9 + i) for i in range(3)]
    requests = [
        free[0],
        make_request("forced", max_tokens=20),
        free[1],
        make_request("masked", "another", max_tokens=14, temperature=1.0),
        free[2],
        make_request(
            "penalized", "aaaa bbbb aaaa", repetition_penalty=1.7, frequency_penalty=0.4, max_tokens=22
        ),
        make_request(
            "windowed", "aaaa bbbb", repetition_penalty=1.9, repetition_context_size=4, max_tokens=22
        ),
    ]
    edits = {"forced": Counting(40, 259, by_mask=False), "masked": Counting(70, 259, by_mask=True)}
    events = run(requests, edits, ahead=ahead)
    assert tokens_of(events, "forced") == list(range(40, 60))
    assert tokens_of(events, "masked") == list(range(70, 84))
    for request in (*free, *requests[-2:]):
        assert_drawn(request, tokens_of(events, request.id), model.network.module)
    plain = replace(requests[-2].sampling, repetition_penalty=1.0, frequency_penalty=0.0)
    without = run([replace(requests[-2], sampling=plain)], {}, ahead=ahead)
    assert tokens_of(without, "penalized") != tokens_of(events, "penalized")


@pytest.mark.parametrize("ahead", [False, True])
def test_an_edit_that_raises_ends_its_row_and_no_other(run, make_request, assert_drawn, model, ahead):
    others = [make_request(f"{i}", "hello"[i:], max_tokens=16) for i in range(3)]
    events = run(
        [*others, make_request("broken")], {"broken": Counting(40, 259, by_mask=True, bad=45)}, ahead=ahead
    )
    ends = [event for event in events if event.request_id == "broken" and event.finish is not None]
    assert [event.finish for event in ends] == ["error"]
    assert "this grammar is broken" in str(ends[0].error)
    assert tokens_of(events, "broken") == list(range(40, 45))
    for request in others:
        assert_drawn(request, tokens_of(events, request.id), model.network.module)


def test_a_preempted_row_goes_on_with_the_edit_it_had(model, make_request, make_engine, assert_drawn):
    settings = {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "max_tokens": 40, "temperature": 0.9}
    requests = [
        replace(make_request(f"{i}", "hello there"[i:], seed=i, **settings), group="g") for i in range(2)
    ]
    engine = make_engine(model, max_rows=2)
    for request in requests:
        engine.add(engine.check(request))
    events = [event for _ in range(9) for event in engine.step()]
    late = make_request("late", max_tokens=5)
    engine.add(engine.check(late))
    while engine.has_work:
        events += engine.step()
    assert engine.stats().num_preempted > 0
    for request in (*requests, late):
        assert_drawn(request, tokens_of(events, request.id), model.network.module)


def test_several_edits_of_one_row_are_told_and_asked_in_order():
    first, second = Counting(10, V, by_mask=True), Counting(10, V, by_mask=False)
    both = Edits((first, second))
    both.advance([10, 11])
    both.retract(1)
    assert first.told == second.told == [9, 10]
    change = both.change()
    assert (change.forced, change.allowed[0]) == (11, 1 << 11)


def test_an_answer_with_min_tokens_is_at_least_that_long(model, make_request, make_engine):
    engine = make_engine(model)
    ends = tuple(range(3, 200))
    free = make_request("free", temperature=1.0, stop_token_ids=ends)
    assert len(generate(engine, [free])[0].token_ids) == 1
    held = replace(free, sampling=replace(free.sampling, min_tokens=7))
    answer = generate(engine, [held])[0].token_ids
    assert len(answer) >= 8
    assert not set(answer[:7]) & set(ends)


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e308},
        {"presence_penalty": -1e308},
        {"frequency_penalty": 1e308},
        {"logit_bias": ((5, 1e308),)},
        {"logit_bias": tuple((token_id, -1e308) for token_id in range(V))},
    ],
)
def test_the_edges_of_penalties_leave_something_to_draw(changes):
    penalties = Penalties(Sampling(**changes), Prompt(tuple(range(0, V, 2))), ends=())
    penalties.push(list(range(0, V, 2)) * 3)
    change = LogitsChange(penalties.changes())
    for settings in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}):
        draws = Sampler([Sampling(**settings)]).draw(mx.random.normal((1, V)), [0], {0: change})
        assert draws.is_sound.tolist() == [True]
        assert draws.may_come is not None
        assert draws.may_come.tolist() == [True]
        assert np.isfinite(
            np.asarray(
                Sampler([Sampling(**settings)]).probabilities(
                    edited(mx.random.normal((1, V)), {0: change}), [0]
                )
            )
        ).all()


def test_xtc_spares_newlines_and_whatever_ends_the_answer(model, make_request, make_engine):
    engine = make_engine(model)
    asked = replace(make_request("r", xtc_probability=0.5, stop_token_ids=(77,)), stop_ids=(88,))
    newline = model.tokenizer.encode("\n", add_special_tokens=False)
    spared = {*newline, *model.tokenizer.eos_token_ids, 77, 88}
    assert set(engine.check(asked).sampling.xtc_special_tokens) == spared
    assert engine.check(make_request("r")).sampling.xtc_special_tokens == ()


def test_answers_to_one_prompt_share_what_it_holds_and_nothing_that_comes_after():
    asked = Sampling(
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        frequency_context_size=4,
        logit_bias=((2, 3.0), (9, -1.0)),
    )
    prompt = Prompt((5, 2, 2, 7))
    fresh = Penalties(asked, Prompt(prompt.token_ids), ends=()).changes()
    one, other = (Penalties(asked, prompt, ends=()) for _ in range(2))
    one.push([7, 8, 11])
    for theirs, expected in zip(other.changes(), fresh, strict=True):
        np.testing.assert_array_equal(theirs, expected)
    one.pop(3)
    again = dict(zip(one.changes().token_ids.tolist(), zip(*one.changes()[1:], strict=True), strict=True))
    for token_id, values in zip(fresh.token_ids.tolist(), zip(*fresh[1:], strict=True), strict=True):
        assert again.pop(token_id) == values
    assert all(values == (0, 1, 0) for values in again.values()), "tokens taken back change nothing"
