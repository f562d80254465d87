"""Laws of the recipe: stock mlx-lm files run, foreign keys are translated, nothing is accepted and ignored."""

from __future__ import annotations

from pathlib import Path

import mlx_lm.lora
import pytest

from serve.errors import ConfigError
from serve.settings import dump
from train.recipe.foreign import FOREIGN
from train.recipe.objectives import OBJECTIVES
from train.recipe.recipe import HubDataset, LoRAParameters, Recipe, load_recipe

STOCK = """
# mlx_lm/examples/lora_config.yaml
model: "mlx-community/Llama-3.2-1B-Instruct"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "mlx-community/WikiSQL"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
report_to: null
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
hf_dataset: null
"""
LEAST = "model: m\ndata: d\n"
BLOCKS = {
    "grpo": "grpo: {rewards: [{kind: regex, pattern: x}]}\n",
    "draft": "draft: {teacher_model: t, teacher_adapter_path: a}\n",
}


@pytest.fixture
def recipe_of(tmp_path: Path):
    def load(text: str, *overrides: str) -> Recipe:
        file = tmp_path / "r.yaml"
        file.write_text(text)
        return load_recipe(file, overrides)

    return load


@pytest.fixture
def refusal_of(recipe_of):
    def refuse(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            recipe_of(text, *overrides)
        return str(caught.value)

    return refuse


def test_a_stock_mlx_lm_file_loads_unchanged(recipe_of):
    recipe = recipe_of(STOCK)
    assert recipe.optimizer_config.adamw.eps == 1e-6
    assert recipe.lora_parameters == LoRAParameters(
        rank=8, scale=20.0, keys=("self_attn.q_proj", "self_attn.v_proj")
    )
    assert recipe.lr_schedule.arguments == (1e-5, 1000, 1e-7)


def test_every_key_of_mlx_lm_is_known_and_has_its_default_save_the_two_we_chose(recipe_of):
    ours = recipe_of(LEAST)
    differing = {}
    for key, default in mlx_lm.lora.CONFIG_DEFAULTS.items():
        value = getattr(ours, key)
        if key == "lora_parameters":
            assert (value.rank, value.scale, value.dropout) == (8, 20.0, 0.0)
        elif key not in ("model", "data", "optimizer_config") and value != default:
            differing[key] = value
    assert differing == {"train": True, "mask_prompt": True}


def test_the_resolved_recipe_reads_back_equal(recipe_of):
    for text in (
        STOCK,
        LEAST,
        LEAST + "epochs: 2\nlora_parameters: {alpha: 16}\n",
        LEAST + "fine_tune_type: full\n",
        *(f"{LEAST}objective: {name}\nbatch_size: 8\n{BLOCKS.get(name, '')}" for name in OBJECTIVES),
    ):
        recipe = recipe_of(text)
        assert recipe_of(dump(recipe)) == recipe


def test_every_default_is_filled_in_so_that_the_resolved_recipe_says_it(recipe_of):
    assert recipe_of(LEAST).iters == 1000
    assert recipe_of(LEAST + "epochs: 1.5\n").iters is None
    assert recipe_of(LEAST).lora_parameters.scale == 20.0
    assert recipe_of(LEAST + "fine_tune_type: full\n").lora_parameters is None
    scheduled = LEAST + "lr_schedule: {name: linear_schedule, arguments: [1e-3, 0, 100]}\n"
    assert recipe_of(scheduled).learning_rate == 1e-3


def test_adafactor_obeys_learning_rate_unless_told_otherwise(recipe_of):
    assert not recipe_of(LEAST).optimizer_config.adafactor.relative_step
    text = LEAST + "optimizer_config: {adafactor: {relative_step: true}}\n"
    assert recipe_of(text).optimizer_config.adafactor.relative_step


def test_alpha_is_scale_times_rank(recipe_of):
    text = LEAST + "lora_parameters: {rank: 8, alpha: 160}\n"
    assert recipe_of(text).lora_parameters.effective_scale == 20.0


def test_axolotls_spellings_are_the_same_knobs_and_both_at_once_are_refused(recipe_of, refusal_of):
    recipe = recipe_of(LEAST + "micro_batch_size: 2\ngradient_accumulation_steps: 3\nnum_epochs: 4\n")
    assert (recipe.batch_size, recipe.grad_accumulation_steps, recipe.epochs) == (2, 3, 4)
    said = refusal_of(LEAST + "micro_batch_size: 2\nbatch_size: 2\n")
    assert ":3: micro_batch_size: the same knob as batch_size" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lora_r: 8", "write lora_parameters.rank"),
        ("lora_alpha: 8", "write lora_parameters.alpha"),
        ("target_modules: [q_proj]", "write lora_parameters.keys"),
        ("num_train_epochs: 1", "write epochs"),
        ("train_on_inputs: false", "the opposite"),
        ("max_steps: 10", "write iters, which counts batches"),
        ("learning_rte: 1", "did you mean learning_rate?"),
        ("quantize: {bits:4}", "YAML wants a space after the colon: bits: 4"),
        ("wandb: x", "write report_to: wandb"),
        ("report_to: swanlab", "SwanLab is not in this version"),
        ("report_to: wandb, mlflow", "expected 'tensorboard' or 'wandb'"),
        ("project_name: x", "write report_to: wandb"),
        ("samples: {max_tokens: 3}", "samples.prompts: missing"),
        ("samples: {rows: 2, prompts: [hello]}", "samples.rows: prompts already says"),
        ("val_batches: 0\nsamples: {rows: 2}", "samples: needs validation"),
        ("config: other.yaml", "does not include another file"),
        ("train: false", "always trains"),
        ("objective: ppo", "expected 'sft', 'cpt', 'dpo', 'orpo', 'kto', 'grpo' or 'draft'"),
        ("objective: cpt\nmask_prompt: true", "supervises every token"),
        ("objective: dpo\nmask_prompt: false", "weighs answers, never prompts"),
        ("objective: kto\nroles_to_train: [user]", "weighs the assistant's answers"),
        ("objective: kto\nmicro_batch_tokens: 512", "micro_batch_tokens: has no effect with objective: kto"),
        ("excess_length_strategy: split", "needs objective: cpt"),
        ("objective: dpo\nsample_packing: true", "objective dpo compares whole answers"),
        ("datasets: [{path: a, streaming: true}]\nsample_packing: true", "which a stream does not know"),
        ("train_on_eos: all", "expected 'turn', 'last' or 'none'"),
        ("init: random", "fine_tune_type: full"),
        ("num_layers: 0", "trains nothing"),
        ("iters: 3\nepochs: 1", "keep one"),
        ("lora_parameters: {alpha: 1, scale: 2}", "the same knob as scale"),
        ("fine_tune_type: full\nlora_parameters: {rank: 4}", "no effect with fine_tune_type: full"),
        ("fine_tune_type: full\nquantize: {bits: 4}", "packed weights cannot train"),
        ("fine_tune_type: full\nloraplus_lr_ratio: 16", "no effect with fine_tune_type: full"),
        ("lora_parameters: {use_rslora: true}", "write alpha"),
        ("lora_parameters: {init_lora_weights: olora}", "init_lora_weights"),
        (
            "fine_tune_type: dora\nlora_parameters: {init_lora_weights: pissa}",
            "pissa goes with fine_tune_type: lora",
        ),
        ("lora_parameters: {keys: []}", "empty list"),
        ("mask_prompt: false\ntrain_on_eos: last", "has no effect with mask_prompt: false"),
        ("datasets: [{path: a}]", "data already says"),
        ("val_set_size: 1.5", "expected a share below 1.0"),
        ("warmup_ratio: 0.1\nlr_schedule: {name: constant, warmup: 3}", "keep one"),
        ("learning_rate: 1e-3\nlr_schedule: {name: cosine_decay, arguments: [1e-5, 10]}", "starts at 1e-05"),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-5]}", "cosine_decay takes 2 or 3"),
        ("lr_schedule: {name: step_decay}", "step_decay needs 3 numbers"),
        ("lr_schedule: {name: cosine, arguments: [1]}", "did you mean cosine_decay?"),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-5, 9], final_ratio: 0.1}", "beside arguments"),
        ("resume_adapter_file: a\nresume_from_checkpoint: b", "keep one"),
        ("val_batches: 0\nload_best_model_at_end: true", "val_batches is 0"),
        ("optimizer_config: {sgd: {nesterov: true}}", "needs a momentum"),
        ("optimizer_config: {adamw: {lr: 1}}", "optimizer_config.adamw.lr: unknown key"),
    ],
)
def test_what_this_version_does_not_do_is_refused_by_name_with_the_reason(line, words, refusal_of):
    assert words in refusal_of(LEAST + line + "\n")


def test_problems_of_every_kind_come_at_once(refusal_of):
    said = refusal_of(
        "modle: m\nlora_r: 8\nfine_tune_type: qlora\nbatch_size: 0\nbatch_size_: 1\n", "iters=x"
    )
    for line in (
        ":1: modle",
        ":2: lora_r",
        ":3: fine_tune_type",
        ":4: batch_size",
        ":5: batch_size_",
        "--set iters=x",
    ):
        assert line in said


def test_data_features_go_with_data_only(recipe_of, refusal_of):
    (source,) = recipe_of(LEAST + "prompt_feature: q\ncompletion_feature: a\n").sources()
    assert (source.path, source.prompt_feature, source.completion_feature) == ("d", "q", "a")
    said = refusal_of("model: m\ndatasets: [{path: d}]\nchat_feature: c\n")
    assert "in datasets write it in the entry" in said


def test_hf_dataset_may_be_one_or_many(recipe_of):
    one = recipe_of("model: m\nhf_dataset: {path: a/b, prompt_feature: q}\n")
    many = recipe_of("model: m\nhf_dataset: [{path: a/b, prompt_feature: q}]\n")
    assert one.sources() == many.sources()
    assert one.hf_dataset == HubDataset(path="a/b", prompt_feature="q")
    assert one.sources()[0].split == "train[:80%]"


def test_no_data_is_a_problem(refusal_of):
    assert "datasets: missing" in refusal_of("model: m\n")


def test_sizes_in_words_are_bytes(recipe_of, refusal_of):
    assert recipe_of(LEAST + "clear_cache_threshold: 4GB\n").clear_cache_threshold == 4 * 10**9
    assert recipe_of(LEAST + "clear_cache_threshold: 1.5M\n").clear_cache_threshold == 1_500_000
    assert "clear_cache_threshold: found 'lots'" in refusal_of(LEAST + "clear_cache_threshold: lots\n")


def test_paths_are_found_beside_the_recipe_first_then_left_to_the_working_directory(tmp_path: Path):
    folder = tmp_path / "recipes"
    (tmp_path / "data" / "tickets").mkdir(parents=True)
    folder.mkdir()
    file = folder / "r.yaml"
    file.write_text("model: ../data/absent\ndatasets: [{path: ../data/tickets}, {path: data/elsewhere}]\n")
    recipe = load_recipe(file)
    assert recipe.model == "../data/absent"
    assert [entry.path for entry in recipe.datasets] == [str(tmp_path / "data" / "tickets"), "data/elsewhere"]
    assert recipe.adapter_path == "adapters"


def test_every_translation_names_a_key_that_exists():
    for theirs in FOREIGN:
        assert theirs not in Recipe.model_fields, f"{theirs} is ours already"
    for advice in FOREIGN.values():
        if advice.startswith("write "):
            key = advice.removeprefix("write ").split(":")[0].split(",")[0].split(" ")[0].split(".")[0]
            assert key in Recipe.model_fields, advice


def test_every_knob_says_what_it_means_or_is_named_as_mlx_lm_names_it():
    silent = {name for name, field in Recipe.model_fields.items() if not field.description}
    assert silent <= {
        *("objective", "lora_parameters", "completion_feature", "chat_feature", "text_feature"),
        *("optimizer_config", "report_to", "project_name", "config"),
    }
