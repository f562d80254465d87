"""A drafter learns its teacher's tokens: the loss, the answers, the count of right guesses, and whole runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

import lathe
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_config, read_tensors, write_adapter
from serve.engine.request import Request, Sampling
from serve.engine.sampler import Sampler
from serve.errors import ConfigError, DataError, NotFoundError
from serve.model.loading import LoadedModel, load
from serve.model.network import Network
from serve.model.prompt import Prompt
from serve.model.vocabulary import difference
from train.adapters.on_base import load_adapted
from train.data.splits import Split
from train.data.tickets import FreshTickets, base_row
from train.data.tokens import TokenizedExample, TokenizeReport
from train.foresee import estimate, preflight
from train.loop import loss as loss_file
from train.objectives import kept_answers
from train.objectives.acceptance import NUM_GUESSES, WAYS, Acceptance, measures_of, rounds_of
from train.objectives.build import build_objective
from train.objectives.draft import Draft
from train.objectives.prompted import seed_of
from train.objectives.taught import HELD_OUT, TaughtBatches
from train.objectives.teacher import Teacher, sampling_of
from train.recipe.draft import DraftConfig
from train.recipe.recipe import Recipe, load_recipe
from train.run import run
from train.watch.metrics import rows_of

ROOT = Path(lathe.__file__).parent
TEXTS = ("hello there", "what is it", "good morning to you", "a b c", "one more", "and another one")
SMALL = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def config_of(**knobs: object) -> DraftConfig:
    return DraftConfig.model_validate({"teacher_model": "t", "max_completion_length": 12, **knobs})


@pytest.fixture(scope="session")
def small_folder(make_model) -> Path:
    """A lively random drafter, half as wide and half as deep as the lively model, with its tokenizer."""
    return make_model("small", SMALL, seed=5)


@pytest.fixture
def drafter(small_folder: Path) -> LoadedModel:
    return load(str(small_folder))


@pytest.fixture(scope="session")
def prompts(model_folder: Path) -> list[TokenizedExample]:
    tokenizer = load(str(model_folder)).tokenizer
    ids = [np.array(tokenizer.encode(text), np.int32) for text in TEXTS]
    return [TokenizedExample(each, each < 0, "rows", i + 1, fields={}) for i, each in enumerate(ids)]


def split_of(rows: Sequence[TokenizedExample]) -> Split:
    return Split("valid", [], rows, TokenizeReport(0, 0, 0, 0, 0))


@pytest.fixture
def make_batches(model_folder, drafter, prompts, tmp_path) -> Callable[..., TaughtBatches]:
    """make_batches(adapter=None, model=the small drafter, batch_size=4, **knobs) → of the lively model's answers, two
    prompts after the other, in windows of three."""

    def make(
        *,
        adapter: Path | None = None,
        model: LoadedModel = drafter,
        batch_size: int = 4,
        kept_in: Path | None = None,
        **knobs: object,
    ) -> TaughtBatches:
        config = config_of(teacher_model=str(model_folder), **knobs)
        folder = str(kept_in or tmp_path / "kept")
        teacher = Teacher(str(model_folder), str(adapter) if adapter else None, kept_in=folder)
        size = batch_size // config.num_generations
        return TaughtBatches(
            model,
            Draft(config, teacher),
            prompts,
            lambda iteration: [(iteration * size + i) % len(TEXTS) for i in range(size)],
            -(-len(TEXTS) // size),
            seed=5,
            batch_size=batch_size,
        )

    return make


def answers_of(batch) -> list[list[int]]:
    return [row[marked].tolist() for row, marked in zip(batch.tokens, batch.is_target, strict=True)]


# The loss


def by_hand(logits: np.ndarray, taught: np.ndarray, token_id: int, config: DraftConfig) -> float:
    """Of one target, in double precision: logits [V] of the drafter, [V] of the teacher."""
    scale = config.temperature or 1.0
    q, p = (np.exp(each.astype(np.float64) / scale) for each in (logits, taught))
    q, p = q / q.sum(), p / p.sum()
    entropy = -np.log(q[token_id])
    divergence = sum(p[v] * np.log(p[v] / q[v]) for v in range(len(p)))
    return config.kd_ce_alpha * entropy + config.kd_alpha * divergence


def logits_of(network: Network, tokens: np.ndarray) -> np.ndarray:
    return np.array(network.logits(network.hidden(mx.array(tokens))).astype(mx.float32))


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 0.0, "kd_ce_alpha": 2.0},
        {"kd_alpha": 1.0, "kd_ce_alpha": 0.0, "temperature": 2.0},
        {"kd_alpha": 0.9, "kd_ce_alpha": 0.1},
    ],
)
def test_the_loss_is_the_one_by_hand_and_its_gradient_the_derived_one(
    knobs, is_chunked, model, drafter, make_batch, monkeypatch
):
    if is_chunked:
        monkeypatch.setattr(loss_file, "CHUNK_LOGITS", 1)
        monkeypatch.setattr(loss_file, "MIN_CHUNK_ROWS", 3)
    config = config_of(**knobs)
    teacher = Teacher("t", None)
    teacher.__dict__["model"] = model  # as it is once it was loaded
    objective, batch = Draft(config, teacher), make_batch([9, 17, 12])
    taught, own = (logits_of(each, batch.tokens) for each in (model.network, drafter.network))
    places = [(row, column) for row, column in np.argwhere(batch.is_target) if column]
    wanted = sum(
        by_hand(own[row, column - 1], taught[row, column - 1], batch.tokens[row, column], config)
        for row, column in places
    )
    prepared = objective.prepare(batch)
    inputs = prepared.arrays(prepared.num_units)
    assert prepared.num_units == len(places) > 9
    drafter.network.module.train()
    drafter.network.module.unfreeze()

    def loss() -> mx.array:
        return objective.loss(drafter.network, inputs)[0]

    value, gradients = nn.value_and_grad(drafter.network.module, loss)()
    assert float(value) == pytest.approx(wanted / len(places), rel=1e-4)
    rows, columns = np.array(places).T
    at = mx.array(rows * batch.tokens.shape[1] + columns - 1)
    ids, scale = mx.array(batch.tokens[rows, columns]), config.temperature or 1.0

    def plainly() -> mx.array:
        logits = drafter.network.logits(drafter.network.hidden(mx.array(batch.tokens)))
        logq = nn.log_softmax(logits.reshape(-1, 259)[at] / scale)
        logp = nn.log_softmax(mx.array(taught).reshape(-1, 259)[at] / scale)
        entropy = -mx.take_along_axis(logq, ids[:, None], axis=1).mean()
        return config.kd_ce_alpha * entropy + config.kd_alpha * (mx.exp(logp) * (logp - logq)).sum(1).mean()

    expected = dict(tree_flatten(nn.value_and_grad(drafter.network.module, plainly)()[1]))
    largest = max(float(mx.abs(each).max()) for each in expected.values())
    assert largest > 1e-3
    for name, gradient in tree_flatten(gradients):
        assert float(mx.abs(gradient - expected[name]).max()) < 1e-4 * largest, name


def test_of_unequal_widths_the_logits_that_stand_for_no_token_do_not_count(make_model, model, make_batch):
    """Models of one tokenizer are padded to different vocabularies."""
    wide = load(str(make_model("wider", {**SMALL, "vocab_size": 320}, seed=5)))
    teacher = Teacher("t", None)
    teacher.__dict__["model"] = model
    config = config_of(kd_alpha=1.0, kd_ce_alpha=0.0)
    objective, batch = Draft(config, teacher), make_batch([9])
    prepared = objective.prepare(batch)
    found = objective.loss(wide.network, prepared.arrays(1))[0]
    own, taught = (logits_of(each, batch.tokens)[0] for each in (wide.network, model.network))
    columns = np.flatnonzero(batch.is_target[0])
    wanted = sum(by_hand(own[c - 1, :259], taught[c - 1], 0, config) for c in columns)
    assert float(found) == pytest.approx(wanted, rel=1e-4)


# The answers


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_answers_are_what_the_teacher_says_with_its_adapter(
    has_adapter, knobs, make_batches, make_adapter, model_folder, prompts, assert_drawn
):
    adapter = make_adapter(3) if has_adapter else None
    batch = make_batches(adapter=adapter, **knobs).batch_at(0)
    module = (
        load_adapted(adapter, read_config(adapter), str(model_folder)) if adapter else load(str(model_folder))
    ).network.module
    for row, (row_id, answer) in enumerate(zip(batch.row_ids, answers_of(batch), strict=True)):
        seed = seed_of(5, 0, row_id, 0)
        assert batch.seeds[row] == seed
        asked = prompts[row_id].token_ids
        assert batch.tokens[row, : len(asked)].tolist() == asked.tolist()
        request = Request("x", Prompt(tuple(asked.tolist())), sampling_of(config_of(**knobs), seed, 12))
        assert_drawn(request, answer, module)
    assert len({tuple(answer) for answer in answers_of(batch)}) == 4


def test_answers_come_once_or_anew_in_every_window_and_stand_together(make_batches):
    once, anew = make_batches(), make_batches(refresh_every=3)
    first = [answers_of(once.batch_at(i)) for i in range(6)]
    assert first[0] == answers_of(once.batch_at(3)), "an epoch later"
    windows = [answers_of(anew.batch_at(i)) for i in range(6)]
    assert windows[0] == first[0], "the first window draws what once draws"
    assert all(one != other for one, other in zip(windows[3], windows[0], strict=True))
    assert [answers_of(anew.batch_at(i)) for i in range(6)] == windows
    several = make_batches(num_generations=2).batch_at(1)
    assert several.row_ids == (2, 2, 3, 3)
    answers = answers_of(several)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("knobs", [{}, {"refresh_every": 2}, {"num_generations": 2}])
def test_a_batch_follows_from_its_number_alone_whoever_asks_first_and_with_a_cache_or_without(
    knobs, make_batches, tmp_path
):
    whole = make_batches(kept_in=tmp_path / "a", batch_size=2, **knobs)
    expected = {i: whole.batch_at(i) for i in range(9)}
    for number, i in enumerate((7, 4, 1)):
        for kept_in in (tmp_path / "a", tmp_path / f"b{number}"):
            later = make_batches(kept_in=kept_in, batch_size=2, **knobs).batch_at(i)
            np.testing.assert_array_equal(later.tokens, expected[i].tokens)
            np.testing.assert_array_equal(later.seeds, expected[i].seeds)
            assert later.row_ids == expected[i].row_ids


def test_what_is_kept_is_not_asked_again_and_what_is_damaged_or_of_other_words_is(prompts, tmp_path):
    kept = kept_answers.KeptAnswers(str(tmp_path))
    ids = [prompt.token_ids for prompt in prompts[:3]]
    made: list[int] = []

    def make() -> kept_answers.Answers:
        made.append(1)
        return [np.arange(n, dtype=np.int32) for n in (3, 0, 2)]

    def asked(who: Sequence[object] = ("a", 1.0), prompts: Sequence[np.ndarray] = ids) -> list[list[int]]:
        return [each.tolist() for each in kept.get(who, prompts, make)]

    expected = [[0, 1, 2], [], [0, 1]]
    assert [asked(), asked()] == [expected, expected]
    assert len(made) == 1
    for others in ((["b", 1.0], ids), (["a", 0.5], ids), (["a", 1.0], ids[::-1]), (["a", 1.0], [ids[0]] * 3)):
        before = len(made)
        asked(*others)
        assert len(made) == before + 1
    (file,) = [path for path in tmp_path.iterdir() if path.stem == kept_answers.key_of(["a", 1.0], ids)]
    content = file.read_bytes()
    for damaged in (content[:-3], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        before = len(made)
        assert asked() == expected
        assert len(made) == before + 1
    before = len(made)
    assert asked() == expected
    assert len(made) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"max_completion_length": 5},
        {"seed": 1},
        {"stop": (7,)},
        {"adapter": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_answers_are_kept_under_all_that_decides_them(changed, model_folder, make_adapter, prompts, tmp_path):
    """Whatever is changed, another file is written, and another answer may stand in it."""
    adapters = [str(make_adapter(seed)) for seed in (3, 4)]

    def ask(*, seed: int = 0, stop: tuple[int, ...] = (), adapter: int = 0, **knobs: object) -> None:
        teacher = Teacher(str(model_folder), adapters[adapter], kept_in=str(tmp_path))
        teacher.answers([prompts[0].token_ids], [seed], config_of(**knobs), stop)

    ask()
    ask()
    assert len(list(tmp_path.iterdir())) == 1
    ask(**changed)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_prompt_with_no_room_for_an_answer_is_named_with_the_model_that_has_none(make_batches, make_model):
    short = load(str(make_model("short", {**SMALL, "max_position_embeddings": 24}, seed=5)))
    with pytest.raises(
        DataError, match=r"rows:3: the prompt has 19 tokens.*short's context of 24; set max_seq"
    ):
        make_batches(model=short)


# Right guesses


@pytest.mark.parametrize("length", range(1, 8))
def test_rounds_are_counted_as_steps_of_serving_go(length):
    """Every pattern of right and wrong, token by token: a wrong guess is replaced, and the round ends."""
    for pattern in itertools.product([False, True], repeat=length):
        rounds, accepted, left = 0, 0, 0
        for is_right in pattern[1:]:  # the first token comes with the prompt
            if left == 0:
                rounds, left = rounds + 1, NUM_GUESSES + 1
            left -= 1
            is_guessed = left > 0  # behind NUM_GUESSES right ones the teacher's own token stands
            accepted += is_guessed and is_right
            if is_guessed and not is_right:
                left = 0
        assert rounds_of(pattern) == (rounds, accepted), pattern


def served_by_hand(
    module: nn.Module, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling, way: str
) -> tuple[int, int, int]:
    """(right guesses of single tokens, rounds, accepted) of one answer, the drafter running on its own guesses."""

    def guess(before: Sequence[int]) -> int:
        logits = module(mx.array([before]))[:, -1].astype(mx.float32)
        chosen = sampling if way == "coupled" else dataclasses.replace(sampling, temperature=0.0)
        return int(Sampler([chosen]).tokens(logits, [len(before) - len(prompt)]).item())

    right = sum(guess([*prompt, *answer[:at]]) == answer[at] for at in range(1, len(answer)))
    at, rounds, accepted = 1, 0, 0
    while at < len(answer):
        rounds += 1
        drafted: list[int] = []
        while len(drafted) < min(NUM_GUESSES, len(answer) - at):
            drafted.append(guess([*prompt, *answer[:at], *drafted]))
        for one in drafted:
            at += 1
            if one != answer[at - 1]:
                break
            accepted += 1
        else:
            at += 1
    return right, rounds, accepted


@pytest.mark.parametrize(
    "knobs", [{"temperature": 0.5}, {"temperature": 0.3, "top_p": 0.9}, {"temperature": 0.0}]
)
def test_acceptance_is_what_drafting_token_by_token_counts(
    knobs, make_batches, make_adapter, model_folder, prompts
):
    """The drafter is the teacher a little moved, so that it is often right and often wrong."""
    moved = make_adapter(9, size=0.03)
    drafter = load_adapted(moved, read_config(moved), str(model_folder))
    batches = make_batches(model=drafter, max_completion_length=20, **knobs)
    found = batches.evaluation(split_of(prompts), 4, -1)
    (drawn,) = batches._held_out.values()
    counts = {way: np.zeros(3, int) for way in WAYS}
    num_tokens = 0
    for batch in drawn:
        for row_id, answer in zip(batch.row_ids, answers_of(batch), strict=True):
            sampling = sampling_of(config_of(**knobs), seed_of(5, HELD_OUT, row_id))
            asked = prompts[row_id].token_ids.tolist()
            num_tokens += len(answer) - 1
            for way in WAYS:
                counts[way] += served_by_hand(drafter.network.module, asked, answer, sampling, way)
    expected = {}
    for way, (right, rounds, accepted) in counts.items():
        expected[f"acceptance/{way}"] = right / num_tokens
        expected[f"accepted_of_4/{way}"] = accepted / rounds
    assert found.measures == pytest.approx(expected)
    assert 0.2 < expected["acceptance/coupled"] < 0.95
    assert expected["accepted_of_4/coupled"] > 0.3
    assert (expected["acceptance/coupled"] == expected["acceptance/greedy"]) == (knobs["temperature"] == 0)


def test_who_drafts_for_itself_with_the_same_random_numbers_is_always_right(make_batches, model, prompts):
    batches = make_batches(model=model, max_completion_length=20)
    found = batches.evaluation(split_of(prompts), 4, -1).measures
    assert found["acceptance/coupled"] == 1.0
    assert found["accepted_of_4/coupled"] > 3
    assert found["acceptance/greedy"] < 0.8, "a draw at temperature 1 is not the likeliest token"


def test_an_evaluation_in_parts_is_the_whole_one_and_leaves_the_drafter_as_it_was(
    make_batches, prompts, drafter
):
    drafter.network.module.train()
    whole = make_batches(max_completion_length=20)
    parts = make_batches(max_completion_length=20)
    parts._max_positions = 40
    one, other = (each.evaluation(split_of(prompts), 4, -1) for each in (whole, parts))
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert other.measures == pytest.approx(one.measures, abs=0.02)  # a near-tie may fall otherwise
    assert drafter.network.module.training


def test_answers_of_one_token_leave_nothing_to_guess():
    acceptance = Acceptance()
    acceptance.add(dict.fromkeys(WAYS, np.array([True])))
    assert set(measures_of(acceptance.as_sums()).values()) == {0.0}


def test_the_embedded_drafter_guesses_most_of_what_the_embedded_model_answers(tmp_path):
    """Chats that neither has seen, at temperature 1; the drafter is a twentieth of its target."""
    target, own = (load(str(ROOT / "data" / name)) for name in ("tickets", "tickets-draft"))
    sizes = [sum(v.size for _, v in tree_flatten(m.network.module.parameters())) for m in (target, own)]
    assert sizes[0] > 20 * sizes[1]
    assert difference(target.tokenizer, own.tokenizer) == ""
    fresh = FreshTickets(random.Random("drafted"), set())
    rows = [{"messages": base_row(fresh)["messages"]} for _ in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "model": own.name,
            "objective": "draft",
            "draft": {"teacher_model": target.name, "max_completion_length": 48},
            "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
            "dataset_prepared_path": str(tmp_path / "kept"),
        }
    )
    flight = preflight.prepare(recipe)
    batches = flight.answered(own, build_objective(recipe, own.network))
    found = batches.evaluation(flight.train, 24, -1).measures
    assert found["acceptance/coupled"] > 0.65, "0.8 of many"
    assert found["accepted_of_4/greedy"] > 1.5, "2.2 of many"


# Recipes and refusals


def recipe_of(folder: Path, model: Path, teacher: Path, **overrides: object) -> Recipe:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]}
        for text in TEXTS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"teacher_model": str(teacher), "max_completion_length": 8, **overrides.pop("draft", {})}
    settings = {
        "model": str(model),
        "objective": "draft",
        "draft": block,
        "datasets": [{"path": str(folder / "rows.jsonl")}],
        "val_set_size": 2,
        "num_layers": -1,
        "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.1},
        "batch_size": 2,
        "grad_accumulation_steps": 2,
        "iters": 8,
        "learning_rate": 0.01,
        "steps_per_report": 2,
        "steps_per_eval": 4,
        "save_every": 4,
        "dataset_prepared_path": str(folder / "kept"),
        "adapter_path": str(folder / "run"),
        **overrides,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return load_recipe(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"draft": {"teacher": "x"}}, "draft.teacher: unknown key; did you mean teacher_model"),
        ({"draft": {"temperature": -1}}, "draft.temperature: found -1"),
        ({"draft": {"temperature": 0, "top_p": 0.5}}, "draft.top_p: has no effect with temperature: 0"),
        ({"draft": {"kd_ce_alpha": 0}}, "draft.kd_ce_alpha: found 0 beside kd_alpha: 0"),
        ({"draft": {"refresh_every": 0}}, "draft.refresh_every: found 0"),
        ({"draft": {"num_generations": 4}}, "batch_size: found 2; it counts answers, 4 to a prompt"),
        ({"datasets": [{"path": "x", "streaming": True}]}, "draft comes back to its prompts"),
        ({"sample_packing": True}, "packing is for sft and cpt"),
        ({"metric": {}}, "look at acceptance/coupled or acceptance/greedy"),
        ({"metric_for_best_model": "reward"}, "found reward, which objective draft does not measure"),
        ({"teacher_model_name_or_path": "x"}, "write draft.teacher_model"),
        ({"objective": "sft"}, "draft: has no effect with objective: sft"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused_by_name(keys, words, tmp_path, small_folder, model_folder):
    with pytest.raises(ConfigError) as caught:
        recipe_of(tmp_path, small_folder, model_folder, **keys)
    assert words in str(caught.value)


def test_a_draft_without_a_teacher_is_told_what_is_missing(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: d\nobjective: draft\n")
    with pytest.raises(
        ConfigError, match="objective draft needs a block draft with teacher_model, Who is drafted"
    ):
        load_recipe(path)


def test_an_adapter_that_is_not_there_is_named_by_its_key(tmp_path, small_folder, model_folder):
    recipe = recipe_of(tmp_path, small_folder, model_folder, draft={"teacher_adapter_path": "runs/nothing"})
    with pytest.raises(NotFoundError, match=r"draft\.teacher_adapter_path: no adapter .*runs/nothing"):
        run(recipe, dry_run=True, console=Console(quiet=True))


def with_vocabulary(folder: Path, out: Path, change: Callable[[dict[str, int]], None]) -> Path:
    """A copy of a model whose tokenizer has another vocabulary."""
    shutil.copytree(folder, out)
    file = out / "tokenizer.json"
    said = json.loads(file.read_text())
    change(said["model"]["vocab"])
    file.write_text(json.dumps(said))
    return out


def swap(vocabulary: dict[str, int]) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


OTHER_VOCABULARIES: dict[str, tuple[Callable[[dict[str, int]], None], str]] = {
    "swapped": (swap, r"2 tokens have other ids \('(a' is (\d+) and (?!\2)\d+|b' is (\d+) and (?!\3)\d+)\)"),
    "more": (lambda v: v.update(zzz=259), r"1 tokens are only in the second \('zzz'\)"),
    "fewer": (lambda v: v.pop("q"), r"1 tokens are only in the first \('q'\)"),
}


@pytest.mark.parametrize("name", OTHER_VOCABULARIES)
def test_a_teacher_of_another_tokenizer_is_refused_before_anything_is_trained_with_what_differs(
    name, tmp_path, small_folder, model_folder
):
    change, words = OTHER_VOCABULARIES[name]
    teacher = with_vocabulary(model_folder, tmp_path / "teacher", change)
    with pytest.raises(
        ConfigError, match=rf"draft.teacher_model: .*small cannot draft for .*teacher.*{words}"
    ):
        run(recipe_of(tmp_path, small_folder, teacher), dry_run=True, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_drafter_with_fewer_logits_than_tokens_is_refused(tmp_path, make_model, model_folder):
    narrow = make_model("narrow", {**SMALL, "vocab_size": 200})
    with pytest.raises(
        ConfigError, match=r"narrow has 200 logits.* up to id 258; expected a vocab_size of at least 259"
    ):
        run(recipe_of(tmp_path, narrow, model_folder), dry_run=True, console=Console(quiet=True))


def test_prompts_are_the_teachers_by_its_adapters_template_and_so_are_ends(
    tmp_path, small_folder, model_folder, make_adapter
):
    adapter = tmp_path / "adapter"
    source = make_adapter(3)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    lineage = {
        "base_model": "b",
        "base_fingerprint": load(str(model_folder)).fingerprint,
        "template_hash": "",
    }
    lineage |= {"recipe_hash": "", "data_hash": "", "created": "", "lathe_version": "0"}
    config = dataclasses.replace(
        read_config(source), lineage=Lineage(**lineage, chat_template=template, stop_ids=(77,))
    )
    assert isinstance(config, AdapterConfig)
    write_adapter(adapter, read_tensors(source), config)
    plain = preflight.prepare(recipe_of(tmp_path, small_folder, model_folder))
    block = {"teacher_adapter_path": str(adapter)}
    taught = preflight.prepare(recipe_of(tmp_path, small_folder, model_folder, draft=block))
    tokenizer = plain.template.tokenizer
    texts = [tokenizer.decode(flight.train.rows[0].token_ids.tolist()) for flight in (plain, taught)]
    assert texts[0].startswith("<|im_start|>user\n")
    assert texts[1].startswith("[user]")
    assert all("no" not in text.split("user")[1][-4:] for text in texts)
    assert 77 in taught.stop_ids
    assert 77 not in plain.stop_ids


def test_the_teachers_weights_stand_in_the_estimate(tmp_path, small_folder, model_folder):
    recipe = recipe_of(tmp_path, small_folder, model_folder)
    flight = preflight.prepare(recipe)
    workload = estimate.workload_of(flight)
    found = estimate.estimate(recipe, workload)
    held = sum(each.nbytes for _, each in tree_flatten(load(str(model_folder)).network.module.parameters()))
    assert found.teacher_bytes == held
    assert any("the teacher's weights" in line for line in estimate.lines(found, workload))
    reads = recipe.model_copy(update={"draft": recipe.block.model_copy(update={"kd_alpha": 1.0})})
    assert estimate.estimate(reads, workload).logits_bytes == 2 * found.logits_bytes


# Whole runs


@pytest.mark.parametrize(
    "block", [{}, {"refresh_every": 3, "num_generations": 2, "kd_alpha": 0.5}], ids=["once", "anew"]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    block, tmp_path, small_folder, model_folder, make_adapter
):
    draft = {"teacher_adapter_path": str(make_adapter(3)), **block}
    recipe = recipe_of(tmp_path, small_folder, model_folder, draft=draft)
    run(recipe, console=Console(quiet=True))
    expected = read_tensors(tmp_path / "run")
    lineage = read_config(tmp_path / "run").lineage
    assert lineage.teacher_fingerprint == load(str(model_folder)).fingerprint
    assert lineage.teacher_hash.startswith("sha256:")
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000002", part)
    for is_kept in (True, False):
        shutil.rmtree(tmp_path / "run")
        if not is_kept:
            shutil.rmtree(tmp_path / "kept")
        run(recipe, resume=part, console=Console(quiet=True))
        found = read_tensors(tmp_path / "run")
        for name, value in expected.items():
            np.testing.assert_array_equal(np.array(found[name]), np.array(value), err_msg=name)
    assert any(np.abs(np.array(value)).max() > 0.01 for name, value in expected.items() if "lora_b" in name)
    shutil.rmtree(tmp_path / "run")
    other = draft | {"teacher_adapter_path": str(make_adapter(4))}
    with pytest.raises(ConfigError, match="teacher_hash: the checkpoint has"):
        run(
            recipe_of(tmp_path, small_folder, model_folder, draft=other),
            resume=part,
            console=Console(quiet=True),
        )


def test_a_run_goes_on_with_the_same_teacher_elsewhere(tmp_path, small_folder, model_folder):
    recipe = recipe_of(tmp_path, small_folder, model_folder, iters=4)
    run(recipe, console=Console(quiet=True))
    elsewhere = tmp_path / "moved"
    shutil.copytree(model_folder, elsewhere)
    later = recipe_of(tmp_path, small_folder, elsewhere, iters=8)
    assert run(later, resume=True, console=Console(quiet=True)).iterations == 8


def test_a_drafter_is_trained_shown_and_exported_by_the_commands(
    tmp_path, make_model, small_folder, model_folder, capsys
):
    """From a config alone: what it learns of one prompt's few answers is guessed again."""
    recipe_of(
        tmp_path,
        small_folder,
        model_folder,
        draft={"temperature": 0, "max_completion_length": 16},
        init="random",
        fine_tune_type="full",
        lora_parameters=None,
        iters=60,
        batch_size=6,
        val_set_size=0,
        datasets=[{"path": str(tmp_path), "split": "rows", "valid_split": "rows"}],
        grad_accumulation_steps=1,
        learning_rate=0.02,
        steps_per_eval=30,
        metric_for_best_model="accepted_of_4/greedy",
        save_every=60,
    )
    with pytest.raises(SystemExit) as ended:
        lathe.main(["train", str(tmp_path / "recipe.yaml")])
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "step 0: validation acceptance/coupled 0." in shown
    assert "the teacher's weights" in shown
    valid = [row for row in rows_of(tmp_path / "run") if row["kind"] == "valid"]
    assert valid[-1]["acceptance/greedy"] > 0.8 > 0.2 > valid[0]["acceptance/greedy"]
    assert valid[-1]["accepted_of_4/greedy"] > 2.5
    assert valid[-1]["loss"] < valid[0]["loss"] / 2
    with pytest.raises(SystemExit) as ended:
        lathe.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert ended.value.code in (0, None)
    exported = load(str(tmp_path / "out"))
    assert exported.network.vocab_size == 259
    trained = read_tensors(tmp_path / "run")
    there = dict(tree_flatten(exported.network.module.parameters()))
    assert trained.keys() <= there.keys()
    for name, value in trained.items():
        np.testing.assert_allclose(np.array(there[name]), np.array(value), rtol=1e-2, atol=1e-3)
