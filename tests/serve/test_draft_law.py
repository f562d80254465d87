"""What is drawn with a draft model has the target's own distribution: χ² on the joint law of three tokens, 20,000
draws on a vocabulary of eight. Two well-known mistakes in how guesses are accepted fail it.

The law is asked of a rule, all seeds at once, and the engine is held to that rule, seed by seed. Under `-m large`
the engine itself draws the 20,000.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from drafting import Eager
from scipy.stats import chisquare

from serve.draft.model import DraftModel
from serve.engine.drafts import DraftStats
from serve.engine.engine import Engine, EngineLimits
from serve.engine.request import Sampling
from serve.engine.sampler import Sampler
from serve.model.loading import load

VOCABULARY, NUM_TOKENS, NUM_DRAWS = 8, 3, 20_000
NUM_HELD = 200
"""Answers of the engine that are held to the rule, seed by seed."""
PROMPT = (3, 5, 4, 6)
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SETTINGS = {
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.04},
}
LEAST_EXPECTED = 5
"""Draws of a cell; rarer ones are counted together."""
Law = dict[tuple[int, ...], float]


@pytest.fixture(scope="module")
def folders(make_model) -> tuple[Path, Path]:
    """A target and a draft model that is not much like it."""
    return tuple(make_model(f"of-eight-{seed}", CONFIG, seed=seed, louder={"lm_head": 2}) for seed in (1, 2))


@pytest.fixture(scope="module")
def logits_of(folders) -> Callable[[int, tuple[int, ...]], np.ndarray]:
    """logits_of(0: the target, 1: the draft model; the answer so far) → [8], by the family's own code."""
    modules = [load(str(folder)).network.module for folder in folders]
    return cache(lambda which, before: np.asarray(modules[which](mx.array([[*PROMPT, *before]]))[0, -1]))


@pytest.fixture(scope="module")
def law_of(logits_of) -> Callable[[str], Law]:
    """law_of(settings) → the probability of each answer of three tokens."""

    @cache
    def step(settings: str, before: tuple[int, ...]) -> np.ndarray:
        sampler = Sampler([Sampling(**SETTINGS[settings])])
        return np.asarray(sampler.probabilities(mx.array(logits_of(0, before))[None], [0])[0], np.float64)

    def law(settings: str) -> Law:
        return {
            answer: float(np.prod([step(settings, answer[:at])[answer[at]] for at in range(NUM_TOKENS)]))
            for answer in product(range(VOCABULARY), repeat=NUM_TOKENS)
        }

    return cache(law)


def p_value(answers: np.ndarray, law: Law) -> float:
    """Of [N, 3] answers under a law; 0 where an answer came that cannot."""
    codes = (answers * VOCABULARY ** np.arange(NUM_TOKENS - 1, -1, -1)).sum(axis=1)
    found = np.bincount(codes, minlength=VOCABULARY**NUM_TOKENS)
    expected = len(answers) * np.array(list(law.values()))  # in the order of codes
    if found[expected == 0].any():
        return 0.0
    is_rare = expected < LEAST_EXPECTED
    found, expected = (np.append(counts[~is_rare], counts[is_rare].sum()) for counts in (found, expected))
    has_any = expected > 0
    found, expected = found[has_any], expected[has_any]
    assert len(found) > 60, "a law of so few answers shows little"
    return float(chisquare(found, expected * found.sum() / expected.sum()).pvalue)


def drawn_by_engine(
    folders: tuple[Path, Path],
    settings: str,
    num_rows: int,
    num_draws: int,
    make_request,
    *,
    has_drafter: bool = True,
) -> tuple[np.ndarray, DraftStats]:
    """[N, 3]: the first tokens of answers to one prompt, a seed each; and what became of guesses."""
    target, draft = (load(str(folder)) for folder in folders)
    drafters = {"model": DraftModel(draft, target, max_bytes=8 << 20)} if has_drafter else {}
    engine = Engine(
        target,
        EngineLimits(max_rows=num_rows, max_waiting=num_draws, prefix_cache_bytes=0),
        drafters=drafters,
        drafter="model" if has_drafter else None,
        gains=Eager(NUM_TOKENS),
    )
    # A token more than is looked at, so that two of them may be guesses.
    request = make_request("of eight", max_tokens=NUM_TOKENS + 1, **SETTINGS[settings])
    request = replace(request, prompt=replace(request.prompt, token_ids=PROMPT))
    tokens: dict[str, list[int]] = {}
    for seed in range(num_draws):
        one = replace(request, id=str(seed), sampling=replace(request.sampling, seed=seed))
        engine.add(engine.check(one))
        tokens[one.id] = []
        while len(engine.scheduler.waiting) >= num_rows or (seed + 1 == num_draws and engine.has_work):
            for event in engine.step():
                tokens[event.request_id] += event.token_ids
    drafts = engine.stats().drafts.get("", DraftStats())
    return np.array(list(tokens.values()))[:, :NUM_TOKENS], drafts


@pytest.mark.large
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("settings", SETTINGS)
def test_three_tokens_of_the_engine_have_the_targets_joint_law_with_and_without_a_draft_model(
    settings, num_rows, folders, law_of, make_request
):
    asked = folders, settings, num_rows, NUM_DRAWS, make_request
    with_drafts, drafts = drawn_by_engine(*asked)
    assert p_value(with_drafts, law_of(settings)) > 1e-3
    assert drafts.num_drafted > NUM_DRAWS
    without, _ = drawn_by_engine(*asked, has_drafter=False)
    assert p_value(without, law_of(settings)) > 1e-3
    assert (with_drafts == without).all(axis=1).mean() > 0.999


# How a guess is accepted: ours, and two mistakes. All seeds at once, over the models' own logits.

Rule = Callable[[mx.array, mx.array, int, "Drawing"], mx.array]
"""(the target's logits [N, 8], guesses [N], the token's number, how to draw) → tokens [N]."""


class Drawing:
    """Draws one token for every seed."""

    def __init__(self, settings: str) -> None:
        self._samplers = {
            stream: Sampler([Sampling(**SETTINGS[settings], seed=seed + stream) for seed in range(NUM_DRAWS)])
            for stream in (0, NUM_DRAWS, 2 * NUM_DRAWS)
        }

    def of(self, logits: mx.array, number: int, stream: int = 0) -> mx.array:
        """[N]: the row's own draw of that number, or another one beside it."""
        return self._samplers[stream * NUM_DRAWS].tokens(logits, [number] * NUM_DRAWS)


def ours(logits: mx.array, guess: mx.array, number: int, drawing: Drawing) -> mx.array:
    """The target's own draw, whatever was guessed."""
    return drawing.of(logits, number)


def accepts_the_argmax(logits: mx.array, guess: mx.array, number: int, drawing: Drawing) -> mx.array:
    """A mistake: a guess that is the target's likeliest token stands."""
    return mx.where(guess == mx.argmax(logits, axis=-1), guess, drawing.of(logits, number))


def accepts_an_equal_sample(logits: mx.array, guess: mx.array, number: int, drawing: Drawing) -> mx.array:
    """A mistake: a guess that equals a draw of its own stands; else another is drawn."""
    return mx.where(guess == drawing.of(logits, number, 1), guess, drawing.of(logits, number, 2))


@pytest.fixture(scope="module")
def drawn_by_rule(logits_of) -> Callable[[str, Rule], np.ndarray]:
    """drawn_by_rule(settings, rule) → [N, 3], each token but the first behind a guess of the draft model."""

    def draw(settings: str, rule: Rule) -> np.ndarray:
        drawing = Drawing(settings)
        answers = np.zeros((NUM_DRAWS, 0), dtype=np.int64)
        for number in range(NUM_TOKENS):
            befores, which_of = np.unique(answers, axis=0, return_inverse=True)
            of_target, of_draft = (
                mx.array(np.stack([logits_of(model, tuple(each)) for each in befores.tolist()])[which_of])
                for model in (0, 1)
            )
            guess = drawing.of(of_draft, number)
            tokens = rule(of_target, guess, number, drawing) if number else drawing.of(of_target, 0)
            answers = np.column_stack([answers, np.asarray(tokens)])
        return answers

    return draw


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_law_tells_two_mistakes_from_what_is_right(settings, law_of, drawn_by_rule):
    assert p_value(drawn_by_rule(settings, ours), law_of(settings)) > 1e-3
    for mistake in (accepts_the_argmax, accepts_an_equal_sample):
        assert p_value(drawn_by_rule(settings, mistake), law_of(settings)) < 1e-9, mistake.__doc__


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_engine_draws_by_the_rule_that_is_right(settings, num_rows, folders, drawn_by_rule, make_request):
    by_engine, drafts = drawn_by_engine(folders, settings, num_rows, NUM_HELD, make_request)
    assert (by_engine == drawn_by_rule(settings, ours)[:NUM_HELD]).all(axis=1).mean() > 0.99
    assert 0.1 * drafts.num_drafted < drafts.num_accepted < 0.9 * drafts.num_drafted
    assert drafts.num_drafted > NUM_HELD
