"""Rollouts: the same answers from the same weights and number, groups measured right, and a model that learns."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from serve.adapters.formats.manifest import read_tensors
from serve.engine.request import Request, Sampling
from serve.errors import DataError
from serve.model.loading import LoadedModel
from serve.model.prompt import Prompt
from serve.tables import show
from train.adapters.adapt import AdapterSettings, add_lora, trainable_tensors
from train.data.batches import Batch
from train.data.tokens import TokenizedExample
from train.loop.distributed import Alone, Ranks
from train.objectives.grpo import GRPO
from train.objectives.prompted import seed_of
from train.objectives.rewards import Scorer
from train.objectives.rollouts import Questions, Rollouts, group_advantages
from train.recipe.grpo import GRPOConfig
from train.recipe.recipe import Recipe, load_recipe
from train.run import run
from train.watch import runs
from train.watch.metrics import rows_of

ROOT = Path(__file__).parents[2]
TEXTS = ("hello there", "what is it", "good morning to you", "a b c", "one more")


def config_of(**knobs: object) -> GRPOConfig:
    rewards = [{"kind": "regex", "pattern": "[a-m]"}]
    return GRPOConfig.model_validate(
        {"num_generations": 4, "max_completion_length": 12, "rewards": rewards, **knobs}
    )


@pytest.fixture
def make_rollouts(model: LoadedModel) -> Callable[..., Rollouts]:
    """make_rollouts(**knobs) → rollouts on a lively random model with LoRA, two prompts a batch."""
    mx.random.seed(3)
    add_lora(model.network, AdapterSettings(rank=4, scale=2.0))
    rows = [
        TokenizedExample(
            ids := np.array(model.tokenizer.encode(text), np.int32), ids < 0, "rows", i + 1, fields={}
        )
        for i, text in enumerate(TEXTS)
    ]

    def make(*, ranks: Ranks | None = None, rows_at: Callable = _rows_at, **knobs: object) -> Rollouts:
        config = config_of(**knobs)
        scorer = Scorer(config.rewards)
        questions = Questions(rows, TEXTS)
        return Rollouts(model, questions, rows_at, config, scorer, seed=5, batch_size=8, ranks=ranks)

    return make


def _rows_at(iteration: int) -> Sequence[int]:
    return (iteration % 5, (iteration + 2) % 5)


def test_a_batch_follows_from_the_weights_and_the_number_alone(make_rollouts, model):
    rollouts = make_rollouts()
    first = rollouts.batch_at(3)
    other = rollouts.batch_at(8)  # the same prompts
    assert other.row_ids == first.row_ids
    again, elsewhere = rollouts.batch_at(3), make_rollouts().batch_at(3)
    for batch in (again, elsewhere):
        np.testing.assert_array_equal(batch.tokens, first.tokens)
        np.testing.assert_array_equal(batch.advantages, first.advantages)
    assert not np.array_equal(other.tokens, first.tokens)
    moved = {name: value + 0.3 for name, value in trainable_tensors(model.network).items()}
    model.network.module.load_weights(list(moved.items()), strict=False)
    assert not np.array_equal(rollouts.batch_at(3).tokens, first.tokens)


def test_a_batch_holds_what_the_engine_answers_and_only_answers_are_targets(make_rollouts, model):
    batch = make_rollouts().batch_at(0)
    assert batch.row_ids == (0, 0, 0, 0, 2, 2, 2, 2)
    assert len({row.tobytes() for row in batch.tokens}) > 4
    for row, row_id in enumerate(batch.row_ids):
        prompt = model.tokenizer.encode(TEXTS[row_id])
        assert batch.tokens[row, : len(prompt)].tolist() == prompt
        marked = np.flatnonzero(batch.is_target[row])
        assert marked[0] == len(prompt)
        assert np.array_equal(marked, np.arange(len(prompt), len(prompt) + len(marked)))
        assert 1 <= len(marked) <= 12
        assert not batch.tokens[row, marked[-1] + 1 :].any()
    assert batch.num_targets == batch.is_target.sum()


def test_answers_that_were_cut_off_are_masked_where_the_recipe_asks_for_it(make_rollouts, model):
    plain = make_rollouts(max_completion_length=5).batch_at(0)
    masked = make_rollouts(max_completion_length=5, mask_truncated_completions=True).batch_at(0)
    assert plain.is_masked is None
    np.testing.assert_array_equal(masked.tokens, plain.tokens)
    np.testing.assert_array_equal(masked.advantages, plain.advantages)
    ends = set(model.tokenizer.eos_token_ids)
    ended = [answer[-1] in ends for answer in batch_answers(masked)]
    assert masked.is_masked.tolist() == [not has_ended for has_ended in ended]
    assert masked.is_masked.tolist() == masked.scores["completions/clipped_ratio"].astype(bool).tolist()
    assert masked.is_masked.any()


class OneOfTwo(Alone):
    """A process of two, whose other one has the same numbers."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers), list(numbers)]


def test_two_processes_answer_the_prompts_one_would(make_rollouts, model, assert_drawn):
    """Four rows share a batch where eight did, so a near-tie may fall otherwise: each is held to the model itself."""
    whole = make_rollouts().batch_at(3)
    for rank in (0, 1):
        part = make_rollouts(ranks=OneOfTwo(rank)).batch_at(3)
        mine = slice(4 * rank, 4 * rank + 4)
        assert part.row_ids == whole.row_ids[mine]
        assert part.num_targets == 2 * part.is_target.sum()
        answers = [batch_answers(part), batch_answers(whole)[mine]]
        if answers[0] == answers[1]:
            np.testing.assert_array_equal(part.advantages, whole.advantages[mine])
        for number, (row, *drawn) in enumerate(zip(part.row_ids, *answers, strict=True)):
            sampling = Sampling(max_tokens=12, temperature=1.0, seed=seed_of(5, 3, row, number))
            prompt = Prompt(tuple(model.tokenizer.encode(TEXTS[row])))
            for answer in drawn:
                assert_drawn(Request(f"{rank}-{number}", prompt, sampling), answer, model.network.module)


def batch_answers(batch: Batch) -> list[list[int]]:
    return [row[is_target].tolist() for row, is_target in zip(batch.tokens, batch.is_target, strict=True)]


def test_a_process_without_a_prompt_has_an_empty_batch(make_rollouts):
    rollouts = make_rollouts(ranks=OneOfTwo(1), rows_at=lambda iteration: (3,))
    batch = rollouts.batch_at(0)
    assert batch.tokens.shape[0] == 0
    assert GRPO(config_of()).prepare(batch).num_units == 0


def test_a_cold_rollout_is_the_greedy_answer_of_the_live_weights(make_rollouts, model, assert_drawn):
    tensors = {name: value + 0.05 for name, value in trainable_tensors(model.network).items()}
    model.network.module.load_weights(list(tensors.items()), strict=False)
    batch = make_rollouts(temperature=1e-4, num_generations=2).batch_at(1)
    ids = tuple(model.tokenizer.encode(TEXTS[1]))
    found = batch_answers(batch)[0]
    greedy = Request("greedy", Prompt(ids), Sampling(max_tokens=12, temperature=0.0))
    assert_drawn(greedy, found, model.network.module)
    assert len(set(found)) > 3


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale):
    torch = pytest.importorskip("torch")
    rewards = np.array([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 2])
    advantages, is_flat = group_advantages(rewards, 4, scale)
    given = torch.tensor(rewards)
    mean = given.view(-1, 4).mean(dim=1).repeat_interleave(4)
    std = given.view(-1, 4).std(dim=1).repeat_interleave(4) if scale == "group" else given.std()
    expected = given - mean
    if scale != "none":
        expected = expected / (std + 1e-4)
    np.testing.assert_allclose(advantages, expected.numpy(), rtol=1e-5, atol=1e-7)
    assert is_flat.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_a_prompt_with_no_room_for_an_answer_is_named_before_training(make_rollouts):
    with pytest.raises(
        DataError, match=r"rows:3: the prompt has 19 tokens.*set max_seq_length to at most 14"
    ):
        make_rollouts(max_completion_length=1010)


# Whole runs


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def recipe_of(folder: Path, model: Path, **overrides: object) -> Recipe:
    rows = [{"prompt": text, "letter": text[0]} for text in TEXTS]
    write(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(
        folder / "my.py",
        "def letters(completions, letter, **_):\n    return [len(set(c)) for c in completions]\n",
    )
    settings = {
        "model": str(model),
        "objective": "grpo",
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "prompt"}],
        "val_set_size": 1,
        "num_layers": -1,
        "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.1},
        "batch_size": 8,
        "grad_accumulation_steps": 2,
        "iters": 8,
        "learning_rate": 0.01,
        "steps_per_report": 2,
        "steps_per_eval": 4,
        "save_every": 4,
        "metric_for_best_model": "reward",
        "grpo": {
            "num_generations": 4,
            "max_completion_length": 8,
            "beta": 0.05,
            "rewards": [{"kind": "function", "name": "my.py:letters"}],
        },
        "adapter_path": str(folder / "run"),
        **overrides,
    }
    return load_recipe(write(folder / "recipe.yaml", json.dumps(settings)))


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, model_folder):
    recipe = recipe_of(tmp_path, model_folder)
    run(recipe, console=Console(quiet=True))
    expected = read_tensors(tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "rewards/letters" in metrics
    assert "frac_reward_zero_std" in metrics
    assert "scored/" not in metrics
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000002", part)
    shutil.rmtree(tmp_path / "run")
    run(recipe, resume=part, console=Console(quiet=True))
    found = read_tensors(tmp_path / "run")
    for name, value in expected.items():
        np.testing.assert_array_equal(np.array(found[name]), np.array(value), err_msg=name)
    assert any(np.abs(np.array(value)).max() > 0.01 for name, value in expected.items() if "lora_b" in name)


def test_a_run_is_told_and_listed_by_its_reward_and_not_by_minus_the_reward(tmp_path, model_folder):
    console = Console(file=io.StringIO(), width=200)
    run(recipe_of(tmp_path, model_folder, iters=8, steps_per_eval=2), console=console)
    rewards = {row["step"]: row["reward"] for row in rows_of(tmp_path / "run") if row["kind"] == "valid"}
    trained = {step: reward for step, reward in rewards.items() if step > 0}
    best = max(trained, key=lambda step: trained[step])
    assert trained[best] > 0
    listed = runs.describe(tmp_path / "run")
    assert (listed.judged_by, listed.best_value, listed.best_step) == ("reward", trained[best], best)
    for step, reward in rewards.items():
        assert f"step {step}: validation reward {reward:.4f}" in console.file.getvalue()
    show(console, *runs.tables([listed]))
    assert f"reward {trained[best]:.4f} @{best}" in console.file.getvalue()
    assert "valid loss" not in console.file.getvalue()


def test_missing_columns_end_a_dry_run(tmp_path, model_folder):
    rewards = [{"kind": "regex", "pattern": "(.)", "field": "colour"}]
    grpo = {"num_generations": 4, "rewards": rewards}
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: no column colour, which the reward regex needs; found letter"
    ):
        run(recipe_of(tmp_path, model_folder, grpo=grpo), dry_run=True, console=Console(quiet=True))


def test_a_model_learns_from_its_own_answers_what_a_pattern_rewards(tmp_path):
    """From an eighth of the held-out tickets to nearly all, without one answer shown: recipes/tickets-grpo.yaml."""
    overrides = ["iters=6", "steps_per_eval=6", "save_every=6", f"adapter_path={tmp_path / 'run'}"]
    recipe = load_recipe(ROOT / "recipes" / "tickets-grpo.yaml", overrides)
    result = run(recipe, console=Console(quiet=True))
    assert result.first_valid_loss is not None
    assert result.valid_loss is not None
    assert -0.3 < result.first_valid_loss < 0
    assert result.valid_loss < -0.9
