"""A run that is continued is the run that was saved, or says in what it is another one."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from rich.console import Console

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_config, read_tensors
from serve.errors import ConfigError
from train.loop import checkpoint
from train.loop.checkpoint import Checkpoint
from train.loop.identity import MAY_CHANGE, PLACES, check, identity_of
from train.loop.trainer import TrainState
from train.recipe.recipe import Recipe, load_recipe
from train.run import run

BASE = {"model": "m", "data": "d", "objective": "sft"}
LINEAGE = Lineage("m", "sha256:a", "", "", "sha256:b", "", "0")
# A key → a recipe without it, and one that only it makes another. Keys that go together stand beside each other.
OTHERWISE: dict[str, tuple[dict, dict]] = {
    "init": (
        {"fine_tune_type": "full", "lora_parameters": None},
        {"fine_tune_type": "full", "lora_parameters": None, "init": "random"},
    ),
    "fine_tune_type": ({}, {"fine_tune_type": "dora"}),
    "objective": ({}, {"objective": "cpt"}),
    "dpo": ({"objective": "dpo"}, {"objective": "dpo", "dpo": {"beta": 0.3}}),
    "orpo": ({"objective": "orpo"}, {"objective": "orpo", "orpo": {"beta": 0.3}}),
    "kto": ({"objective": "kto"}, {"objective": "kto", "kto": {"desirable_weight": 1.5}}),
    "grpo": (
        {"objective": "grpo", "batch_size": 8, "grpo": {"rewards": [{"kind": "regex", "pattern": "a"}]}},
        {"objective": "grpo", "batch_size": 8, "grpo": {"rewards": [{"kind": "regex", "pattern": "b"}]}},
    ),
    "draft": (
        {"objective": "draft", "draft": {"teacher_model": "t"}},
        {"objective": "draft", "draft": {"teacher_model": "t", "temperature": 0.5}},
    ),
    "num_layers": ({}, {"num_layers": 4}),
    "lora_parameters": ({}, {"lora_parameters": {"scale": 10.0}}),
    "quantize": ({}, {"quantize": {"bits": 4}}),
    "train_vision": ({}, {"train_vision": {"projector": "lora"}}),
    "image": ({}, {"image": {"max_pixels": 10000}}),
    "on_bad_row": ({}, {"on_bad_row": "drop"}),
    "dataset_exact_deduplication": ({}, {"dataset_exact_deduplication": True}),
    "max_seq_length": ({}, {"max_seq_length": 100}),
    "excess_length_strategy": ({}, {"excess_length_strategy": "drop"}),
    "sample_packing": ({}, {"sample_packing": True}),
    "mask_prompt": ({}, {"mask_prompt": False}),
    "roles_to_train": ({}, {"roles_to_train": ["user"]}),
    "train_on_eos": ({}, {"train_on_eos": "last"}),
    "chat_template_kwargs": ({}, {"chat_template_kwargs": {"enable_thinking": False}}),
    "special_tokens_in_messages": ({}, {"special_tokens_in_messages": "control"}),
    "batch_size": ({}, {"batch_size": 8}),
    "grad_accumulation_steps": ({}, {"grad_accumulation_steps": 2}),
    "optimizer": ({}, {"optimizer": "adamw"}),
    "optimizer_config": ({}, {"optimizer_config": {"adam": {"betas": [0.9, 0.98]}}}),
    "seed": ({}, {"seed": 1}),
    "metric_for_best_model": ({"metric": {}}, {"metric": {}, "metric_for_best_model": "exact_match"}),
}


def recipe_of(keys: dict) -> Recipe:
    return Recipe.model_validate({**BASE, **keys})


def saved_by(recipe: Recipe, num_processes: int = 1) -> Checkpoint:
    identity = identity_of(recipe, LINEAGE, num_processes)
    return Checkpoint(Path("x"), {}, {}, AdapterConfig("lora", -1), TrainState(), identity, 0)


def test_every_key_of_a_recipe_belongs_to_the_identity_or_stands_in_a_table():
    keys = set(Recipe.model_fields)
    assert keys >= PLACES | MAY_CHANGE
    assert not PLACES & MAY_CHANGE
    assert keys - PLACES - MAY_CHANGE == OTHERWISE.keys()


@pytest.mark.parametrize("key", OTHERWISE)
def test_a_run_with_another_value_is_another_run(key):
    before, after = map(recipe_of, OTHERWISE[key])
    check(saved_by(before), identity_of(before, LINEAGE, 1))
    with pytest.raises(ConfigError, match=rf"\n  {key}(\.\w+)*: the checkpoint has"):
        check(saved_by(before), identity_of(after, LINEAGE, 1))


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ({"lora_parameters": {"scale": 10.0}}, {"lora_parameters": {"scale": 20.0}}, "lora_parameters.scale"),
        ({}, {"lora_parameters": {"keys": ["q_proj"]}}, "lora_parameters.keys"),
        (
            {"objective": "dpo", "dpo": {"beta": 0.1}},
            {"objective": "dpo", "dpo": {"beta": 0.2}},
            "dpo.beta: the checkpoint has 0.1, this run 0.2",
        ),
    ],
)
def test_a_block_that_differs_is_named_by_its_key(before, after, line):
    with pytest.raises(ConfigError, match=line):
        check(saved_by(recipe_of(before)), identity_of(recipe_of(after), LINEAGE, 1))


def test_the_same_adapter_spelled_otherwise_is_the_same_run():
    one = recipe_of({"lora_parameters": {"rank": 8, "scale": 2.0, "keys": "all-linear"}})
    other = recipe_of({"lora_parameters": {"rank": 8, "alpha": 16.0}})
    assert check(saved_by(one), identity_of(other, LINEAGE, 1)) == []


def test_two_processes_of_half_the_batch_are_the_same_run():
    assert not check(saved_by(recipe_of({"batch_size": 8})), identity_of(recipe_of({}), LINEAGE, 2))


def test_what_may_change_is_told():
    told = check(saved_by(recipe_of({"iters": 5})), identity_of(recipe_of({"iters": 9}), LINEAGE, 1))
    assert told == ["from here on iters is 9, it was 5"]


# The best step of a run that is continued elsewhere


@pytest.fixture
def make_recipe(tmp_path, model_folder):
    """make_recipe(name, *overrides) → a run of eight steps whose best is the fourth."""
    for split in ("train", "valid"):
        rows = "".join(f'{{"prompt": "say {n}", "completion": "{n}"}}\n' for n in range(8))
        (tmp_path / f"{split}.jsonl").write_text(rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "num_layers: -1\nbatch_size: 2\niters: 8\nlearning_rate: 1e-2\nsteps_per_eval: 2\nsave_every: 2\n"
        "lora_parameters: {rank: 2, scale: 4.0}\nload_best_model_at_end: true\n"
        # Four steps down, then four steps up at twice the rate.
        "lr_schedule: {name: step_decay, arguments: [1e-2, -2, 4]}\n"
    )

    def make(name: str, *overrides: str) -> Recipe:
        keys = (f"model={model_folder}", f"data={tmp_path}", f"adapter_path={tmp_path / name}")
        return load_recipe(path, (*keys, *overrides))

    return make


def start(recipe: Recipe, **options: object) -> tuple[object, str]:
    console = Console(file=io.StringIO(), width=200)
    return run(recipe, console=console, **options), console.file.getvalue()


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_run_continued_elsewhere_publishes_the_best_step_of_its_past(make_recipe, tmp_path, policy):
    whole, _ = start(make_recipe("whole"))
    assert whole.published_step == whole.best_step == 4
    half = tmp_path / "whole" / "checkpoints" / "step-000006"
    recipe = make_recipe("else", f"resume_from_checkpoint={half}", f"nonfinite_policy={policy}")
    other, printed = start(recipe)
    assert other.published_step == 4
    assert other.content_hash == whole.content_hash
    assert ("from here on nonfinite_policy is rollback, it was stop" in printed) == (policy == "rollback")
    assert (tmp_path / "else" / "checkpoints" / "step-000004").is_dir()


def test_a_best_step_that_was_not_kept_is_told_before_the_first_step(make_recipe, tmp_path):
    start(make_recipe("whole"))
    alone = shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-000006", tmp_path / "alone")
    result, printed = start(make_recipe("else", "steps_per_report=1"), resume=alone)
    told = printed.index("no checkpoint of step 4, the best so far, is beside")
    assert told < printed.index("iter 7/8")
    assert result.published_step == result.best_step == 8


def test_a_run_that_kept_no_best_step_can_be_asked_for_one_later(make_recipe, tmp_path):
    start(make_recipe("out", "iters=6", "save_every=6", "load_best_model_at_end=false"))
    result, printed = start(make_recipe("out"), resume=True)
    assert "no checkpoint of step 4" in printed
    assert result.published_step == 8
    last = checkpoint.load(checkpoint.find(tmp_path / "out"))
    published = read_tensors(tmp_path / "out", read_config(tmp_path / "out"))
    assert last.state.step == 8
    assert all(mx.array_equal(published[name], value).item() for name, value in last.tensors.items())
