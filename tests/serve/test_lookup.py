"""Looking up what comes next: n-grams of a text against a search of it, and guesses by where they may come from."""

from __future__ import annotations

import gc
import random
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from dry_engine import media

from serve.adapters.versions.version import AdapterVersion
from serve.draft import lookup
from serve.draft.lookup import LookupDrafter
from serve.engine.drafts import Wanted
from serve.engine.plan import SequenceState
from serve.engine.request import Request, Sampling
from serve.model.ngrams import SIZES, Ngrams, ngram_keys
from serve.model.prompt import Prompt

MOST = 8


def text(*token_ids: int) -> Ngrams:
    return Ngrams(array("q", token_ids))


def grown(token_ids: Sequence[int], rng: random.Random) -> Ngrams:
    """The same in pieces."""
    found, start = text(), 0
    while start < len(token_ids):
        stop = start + rng.choice([1, 1, 2, 3, 9, 31, 32, 33, 200])
        found.extend(token_ids[start:stop])
        start = stop
    return found


def last(token_ids: Sequence[int], gram: Sequence[int]) -> int | None:
    """Where the text went on when it last said that."""
    size = len(gram)
    ends = range(len(token_ids) - 1, size - 1, -1)
    return next((end for end in ends if list(token_ids[end - size : end]) == list(gram)), None)


@pytest.mark.parametrize("vocabulary", [2, 30, 2000, 1 << 18])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 127, 128, 129, 3000])
def test_what_is_found_is_where_an_ngram_came_last_and_nearly_all_are_found(vocabulary, length):
    rng = random.Random(f"{vocabulary} {length}")
    token_ids = [
        rng.choice([-1, rng.randrange(vocabulary), rng.randrange(vocabulary)]) for _ in range(length)
    ]
    num_there = num_found = 0
    for index in (text(*token_ids), grown(token_ids, rng)):
        assert index.tokens.tolist() == token_ids
        for _ in range(300):
            end = rng.randrange(length + 1)
            tail = array("q", token_ids[max(end - 4, 0) : end])
            for size, key in zip(SIZES, ngram_keys(tail), strict=False):
                wanted = last(token_ids, tail[-size:])
                found = index.find(size, key, tail)
                assert found in (None, wanted)
                num_there += wanted is not None
                num_found += found is not None
    assert num_found >= 0.75 * num_there
    assert num_there > 0 or length < 4


def test_ngrams_that_nobody_said_are_not_found():
    rng = random.Random(0)
    index = text(*(rng.randrange(100) for _ in range(20_000)))
    for _ in range(2000):
        tail = array("q", (rng.randrange(100, 200) for _ in range(4)))
        assert all(index.find(*each, tail) is None for each in zip(SIZES, ngram_keys(tail), strict=True))


def sequence(prompt: Sequence[int] | Prompt, answer: Sequence[int] = (), **fields) -> SequenceState:
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(tuple(prompt))
    found = SequenceState(Request("r", prompt, Sampling(max_tokens=100_000), **fields))
    found.generated += list(map(int, answer))
    return found


def guess(drafter: LookupDrafter, one: SequenceState, most: int = MOST) -> list[int]:
    (found,) = drafter.propose([Wanted(one, most)])
    return list(found)


def steps(drafter: LookupDrafter, one: SequenceState, answer: Sequence[int], most: int = MOST) -> list[int]:
    """Tokens of each step of a row that is to say `answer`."""
    counts = []
    while (done := len(one.generated)) < len(answer):
        guessed = guess(drafter, one, min(most, len(answer) - done))
        right = 0
        while right < len(guessed) and done + right < len(answer) and guessed[right] == answer[done + right]:
            right += 1
        one.generated += answer[done : done + right + 1]
        counts.append(len(one.generated) - done)
    return counts


def test_a_guess_is_what_followed_the_longest_match_and_no_longer_than_it():
    document = [*range(100, 120), 1, 2, 50, 51, 52, 53, 7, 1, 2, 60, 61, 62]
    assert guess(LookupDrafter(), sequence([*document, 9, 1, 2])) == [60, 61], (
        "the last one, two tokens agreed"
    )
    assert guess(LookupDrafter(), sequence([*document, 8, 107, 108, 109])) == [110, 111, 112]
    assert guess(LookupDrafter(), sequence([*document, *range(100, 112)])) == list(range(112, 120))
    assert guess(LookupDrafter(), sequence([*document, *range(100, 112)]), 3) == [112, 113, 114]
    assert guess(LookupDrafter(max_tokens=2), sequence([*document, *range(100, 112)])) == [112, 113]
    assert guess(LookupDrafter(min_match=3), sequence([*document, 9, 1, 2])) == []
    assert guess(LookupDrafter(), sequence([*document, 8, 119])) == [], "one token is none"
    assert guess(LookupDrafter(), sequence([3])) == []


def test_a_match_is_gone_on_with_also_where_its_words_came_again_later():
    common = [1, 2, 3, 4]
    document = [*range(100, 120), *common, *range(120, 140), *common, 9, 9, 9]
    drafter, one = LookupDrafter(), sequence([*document, 7], range(100, 118))
    assert guess(drafter, one) == [118, 119, *common, 120, 121]
    one.generated += [118, 119, *common]
    assert guess(drafter, one) == list(range(120, 128))
    assert guess(LookupDrafter(), sequence([*document, 7], common)) == [9, 9, 9, 7], (
        "with nothing before them"
    )


def test_a_text_that_repeats_itself_is_guessed_as_far_as_is_asked():
    one = sequence([1, 2, 3], [4, 5, 6, 4, 5, 6, 4, 5, 6, 4, 5, 6])
    assert guess(LookupDrafter(), one) == [4, 5, 6, 4, 5, 6, 4, 5]


@pytest.mark.parametrize("seed", range(20))
def test_every_guess_goes_on_as_its_row_did_before(seed):
    """Whatever came true of the guesses: each follows at least so many tokens that agree, somewhere in the text."""
    rng = random.Random(seed)
    least, vocabulary = rng.choice(SIZES), rng.choice([3, 12, 200])
    prompt = [rng.randrange(vocabulary) for _ in range(rng.choice([1, 4, 60, 400]))]
    drafter, one = LookupDrafter(min_match=least), sequence(prompt)
    num_guessed = 0
    for _ in range(200):
        said = [*prompt, *one.generated]
        guessed = guess(drafter, one)
        if guessed:
            num_guessed += 1
            going_on = [*said, *guessed]  # a guess may go on from itself
            ends = [end for end in range(least, len(said)) if said[end - least : end] == said[-least:]]
            assert any(going_on[end : end + len(guessed)] == guessed for end in ends)
        right, at = rng.randrange(len(guessed) + 1), rng.randrange(len(said))
        one.generated += [
            *guessed[:right],
            *said[at : at + rng.randrange(2, 12)],
            *rng.choices(range(vocabulary), k=rng.random() < 0.3),
        ]
    assert num_guessed > 20


def test_a_copy_takes_a_step_for_many_tokens_and_an_edit_is_found_again():
    rng = random.Random(0)
    document = [rng.randrange(10_000) for _ in range(2000)]
    answer = document[300:900]
    assert len(steps(LookupDrafter(), sequence(document), answer)) < len(answer) / 7
    edited = [rng.randrange(10_000) if rng.random() < 0.05 else token for token in answer]
    assert len(steps(LookupDrafter(), sequence(document), edited)) < len(edited) / 3
    other = [rng.randrange(10_000) for _ in range(600)]
    assert len(steps(LookupDrafter(), sequence(document), other)) > len(other) * 0.97, "nothing to copy"


def test_what_was_predicted_is_the_first_guess_and_found_again_after_a_difference():
    rng = random.Random(0)
    predicted = [rng.randrange(10_000) for _ in range(300)]
    answer = [*predicted[:100], 7, 8, 9, *predicted[104:]]
    one = sequence([1, 2, 3], prediction=text(*predicted))
    assert guess(LookupDrafter(), one) == predicted[:MOST]
    counts = steps(LookupDrafter(), sequence([1, 2, 3], prediction=text(*predicted)), answer)
    assert counts[0] == MOST + 1
    assert len(counts) < len(answer) / 6
    at_its_end = sequence([1, 2, 3], predicted, prediction=text(*predicted))
    assert guess(LookupDrafter(), at_its_end) == []


def test_nobody_is_told_what_is_unsayable():
    """What stands for a picture has ids that no row may say, and neither has the end of an answer."""
    picture = media("p", 4, 5, 20)
    prompt = Prompt((1, 2, 3, 4, 5, 5, 5, 5, 5, 10, 11, 12, 13), (picture,))
    assert guess(LookupDrafter(), sequence(prompt, [2, 3, 4])) == []
    assert guess(LookupDrafter(), sequence(prompt, [1, 2])) == [3, 4]
    drafter = LookupDrafter()
    for answer in ([20, 21, 22], [30, 31, 32]):
        drafter.forget(sequence([1], answer))
    assert guess(drafter, sequence([1], [20, 21])) == [22], "and not the next answer"
    assert guess(drafter, sequence([1], [21, 22])) == []


def version(name: str, effect: str) -> AdapterVersion:
    return AdapterVersion(name, 1, content_hash=name, path="", effect_hash=effect)


SPACES = (
    {},
    {"tenant": "a"},
    {"tenant": "b"},
    {"tenant": "a", "cache_salt": "s"},
    {"cache_salt": "a"},
    {"adapter": version("x", "a")},
    {"tenant": "a", "adapter": version("x", "a")},
    {"tenant": "a", "adapter": version("x", "b")},
)


def test_answers_are_remembered_for_their_tenant_salt_and_adapter_alone():
    """All say different things after the same words; each hears its own."""
    drafter, words = LookupDrafter(), list(range(1, 9))
    answers = [[*words, *range(100 * n + 100, 100 * n + 120)] for n in range(len(SPACES))]
    order = [*range(len(SPACES))] * 3
    random.Random(0).shuffle(order)
    for number in order:
        one = sequence([5, 6], **SPACES[number])
        guess(drafter, one)
        one.generated += answers[number]
        drafter.forget(one)
    for number, space in enumerate(SPACES):
        asked = sequence([9, 9], words, **space)
        assert guess(drafter, asked) == answers[number][8:16]
    renamed = {"tenant": "a", "adapter": version("renamed", "a")}
    assert guess(drafter, sequence([9, 9], words, **renamed)) == answers[6][8:16], "by what it does"
    assert guess(drafter, sequence([9, 9], words, tenant="c")) == []


@pytest.mark.parametrize("seed", range(10))
def test_no_tenant_can_make_it_say_another_ones_tokens(seed):
    """Whoever asks, whatever others have said: nothing but one's own prompt, answer, prediction and earlier answers.
    Tenants try each other's beginnings, salts and names that run together."""
    rng = random.Random(seed)
    drafter = LookupDrafter(remembered_tokens=rng.choice([2000, 1 << 18]))
    names = ["", "a", "ab", "b", "a/b"]
    shared = list(range(1, 12))  # said by everybody
    own: dict[tuple[str, str], set[int]] = {}
    num_guessed = 0
    for turn in range(300):
        tenant, salt = rng.choice(names), rng.choice(names)
        space = names.index(tenant) * len(names) + names.index(salt)
        secret = list(range(1000 * space + 1000, 1000 * space + 1040))
        sayable = own.setdefault((tenant, salt), {*shared})
        at = rng.randrange(30)
        begun = [*rng.sample(shared, 3), *shared[rng.randrange(6) :]]
        one = sequence([turn + 100_000, *begun], tenant=tenant, cache_salt=salt)
        for _ in range(4):
            guessed = guess(drafter, one)
            assert set(guessed) <= sayable | set(begun)
            num_guessed += bool(set(guessed) - set(shared))
            one.generated += secret[at : at + 3]
            sayable.update(secret[at : at + 3])
            at += 3
        if rng.random() < 0.9:
            drafter.forget(one)
        if rng.random() < 0.02:
            drafter.clear(tenant)
    assert num_guessed > 50


def test_what_a_tenant_wants_forgotten_is_forgotten_and_no_more():
    drafter = LookupDrafter()
    for space in SPACES:
        drafter.forget(sequence([5], [1, 2, 3, 4], **space))

    def known() -> list[bool]:
        return [guess(drafter, sequence([9], [1, 2], **space)) == [3, 4] for space in SPACES]

    assert all(known())
    drafter.clear("a")
    assert known() == [space.get("tenant") != "a" for space in SPACES]
    drafter.clear(None)
    assert not any(known())


def test_what_is_not_sound_is_not_learned_and_nothing_where_nothing_is_to_be():
    drafter = LookupDrafter()
    broken = sequence([5], [1, 2, 3, 4])
    broken.is_sound = False
    drafter.forget(broken)
    assert guess(drafter, sequence([9], [1, 2])) == []
    for remembered_tokens in (0, 1):
        none = LookupDrafter(remembered_tokens=remembered_tokens)
        none.forget(sequence([5], [1, 2, 3, 4]))
        assert guess(none, sequence([9], [1, 2])) == []


@pytest.mark.parametrize("remembered_tokens", [2, 300, 5000, 200_000])
def test_memory_is_bounded_whatever_is_said_and_however_many_ask(remembered_tokens):
    """By a hundred bytes a token and a few more, and what a few tables take."""
    rng = random.Random(0)
    drafter = LookupDrafter(remembered_tokens=remembered_tokens)
    for number in range(600):
        length = rng.choice([1, 1, 20, 400, 3000])
        tenant = rng.choice(["everybody", str(number)])
        drafter.forget(sequence([5], np.random.default_rng(number).integers(0, 9999, length), tenant=tenant))
        assert drafter.num_bytes < 104 * max(remembered_tokens, lookup.LEAST_TOKENS) + 20_000
    assert drafter.num_remembered <= max(remembered_tokens, lookup.SPACE_TOKENS)


def test_the_latest_answers_of_whoever_says_much_are_known():
    drafter = LookupDrafter(remembered_tokens=2000)
    for number in range(40):
        drafter.forget(sequence([5], range(1000 * number, 1000 * number + 100)))
    assert guess(drafter, sequence([9], [39_050, 39_051])) == [39_052, 39_053]
    assert guess(drafter, sequence([9], [35_050, 35_051])) == [35_052, 35_053]
    assert guess(drafter, sequence([9], [1050, 1051])) == []


def test_who_has_ended_is_let_go():
    drafter, one = LookupDrafter(remembered_tokens=0), sequence([1, 2, 3], [4, 5, 6])
    guess(drafter, one)
    assert drafter.num_bytes > 0
    drafter.forget(one)
    assert drafter.num_bytes == 0
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None


def test_a_prompt_is_indexed_once_for_all_its_answers():
    prompt = Prompt(tuple(range(500)))
    drafter = LookupDrafter()
    rows = [sequence(prompt, [7, 8]) for _ in range(3)]
    before = prompt.ngrams
    assert [guess(drafter, row) for row in rows] == [[9, 10]] * 3
    assert prompt.ngrams is before
    assert len(before) == 500, "nobody's answer is in it"
    assert guess(drafter, replace_prompt(rows[0], prompt)) == [9, 10]


def replace_prompt(one: SequenceState, prompt: Prompt) -> SequenceState:
    return SequenceState(replace(one.request, prompt=prompt), generated=[7, 8])
