"""The recipe of a training run: YAML -> Recipe, every knob once with its meaning under it.

A stock `mlx_lm.lora` file loads unchanged; where mlx-lm has no word, axolotl's is used. A key this version cannot
honour is refused by name with the reason. Paths that are read (`model`, `data`, `datasets[].path`, `resume_*`)
are taken relative to the recipe file if they exist there, else to the working directory; `adapter_path`, which is
written, is relative to the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from serve.settings import Problems, Strict, load_yaml
from train.foreign import ALIASES, FOREIGN
from train.optimizer_config import OptimizerConfig, Schedule

LoRAKeys = tuple[str, ...] | Literal["all-linear"]
Features = ("prompt_feature", "completion_feature", "chat_feature", "text_feature")


class LoRAParameters(Strict):
    """What an adapter adds to a linear layer: y = Wx + scale · B(Ax)."""

    rank: int = Field(default=8, ge=1)
    """Inner size of the update; memory and adapter size grow with it."""
    alpha: float | None = Field(default=None, gt=0)
    """PEFT's strength, scale * rank. Write this or `scale`, never both."""
    scale: float | None = Field(default_factory=lambda seen: None if seen.get("alpha") else 20.0, gt=0)
    """mlx-lm's strength, the factor itself; 20 (mlx-lm's default) if neither is written."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapted layer's inputs zeroed while training."""
    keys: LoRAKeys | None = None
    """Module names inside a block (`self_attn.q_proj`); `all-linear`, or nothing, is every linear layer of it."""

    @model_validator(mode="after")
    def _one_strength(self) -> LoRAParameters:
        if self.alpha is not None and self.scale is not None:
            raise Problems([("alpha", "the same knob as scale (alpha = scale * rank); keep one")])
        if self.keys == ():
            raise Problems([("keys", "found an empty list; leave it out for every linear layer")])
        return self

    @property
    def effective_scale(self) -> float:
        """The factor on B(Ax), whichever way it was written."""
        if self.scale is not None:
            return self.scale
        assert self.alpha is not None
        return self.alpha / self.rank


class DatasetSource(Strict):
    """One source of rows: a .jsonl, .json or .parquet file, a folder with train/valid/test files, or a hub name."""

    path: str
    """File, folder or hub name."""
    type: Literal["auto", "chat", "completion", "text"] = "auto"
    """What a row is; `auto` looks at each row's keys: prompt and completion, then messages, then text."""
    split: str = "train"
    """Where training rows come from: a hub split (`train[:80%]`) or a file's stem in a folder."""
    valid_split: str | None = None
    """Where validation rows come from; a folder's valid file is used without being named."""
    test_split: str | None = None
    """Where test rows come from; a folder's test file is used without being named."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `datasets.load_dataset` for a hub name (`name`, `revision`, …)."""
    weight: float = Field(default=1.0, gt=0)
    """Training rows are taken this many times: 2 repeats all, 0.25 takes a fixed quarter."""
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"


class HubDataset(Strict):
    """mlx-lm's `hf_dataset` entry."""

    path: str
    train_split: str = "train[:80%]"
    valid_split: str = "train[-10%:]"
    test_split: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `datasets.load_dataset` (`name`, `revision`, …)."""
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"


class Metric(Strict):
    """Answers of the validation rows' last turns, generated greedily by the serving engine and compared."""

    name: Literal["exact_match"] = "exact_match"
    rows: int = Field(default=50, ge=1)
    """The first this many validation rows are answered each time."""
    max_tokens: int = Field(default=64, ge=1)
    """An answer that is longer counts as wrong."""


def _bytes(value: Any) -> Any:
    """'4GB' -> 4000000000, as mlx-lm reads sizes."""
    match = (
        re.fullmatch(r"([0-9.]+)\s*(M|G|MB|GB|)", value.strip().upper()) if isinstance(value, str) else None
    )
    if match is None:
        return value
    return int(float(match[1]) * {"M": 10**6, "G": 10**9, "": 1}[match[2][:1]])


REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "fine_tune_type": (lambda v: v == "dora", "DoRA is not in this version; expected lora or full"),
    "objective": (
        lambda v: isinstance(v, str) and v != "sft",
        "this version has no preference or reward objectives; expected sft",
    ),
    "sample_packing": (
        lambda v: v is True,
        "packing is not in this version; batches go by length, which leaves about 5 % padding; expected false",
    ),
    "train": (
        lambda v: v is False,
        "`lathe train` always trains; leave it out (`test: true` measures the test rows after training)",
    ),
    "report_to": (
        lambda v: v is not None,
        "reporting to services is not in this version; metrics go to files in adapter_path; leave it out",
    ),
    "project_name": (lambda v: v is not None, "names a project at a reporting service; leave it out"),
    "config": (
        lambda v: v is not None,
        "a recipe does not include another file; run that file, or merge the two",
    ),
}
"""Key -> (values this version does not do, the reason). The same keys' neutral values pass."""


class Recipe(Strict):
    """A run, fully said. Every default is mlx-lm's, except that `mask_prompt` is true."""

    model: str
    """Base model: a folder, or a hub name."""
    trust_remote_code: bool = False
    """Let the model's own tokenizer code run."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` makes the weights from the model folder's config.json and `seed`; with fine_tune_type full only."""
    train: bool = True
    """mlx-lm's switch; false is refused, for `lathe train` trains."""
    test: bool = False
    """After training, the loss on the test rows too."""
    test_batches: int = Field(default=500, ge=-1)
    """Batches of that test; -1 is all."""

    fine_tune_type: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank updates beside frozen weights, `full` the weights of the last `num_layers` blocks."""
    objective: Literal["sft"] = "sft"
    num_layers: int = Field(default=16, ge=-1)
    """The last this many blocks are trained; -1, or more than the model has, is all of them."""
    lora_parameters: LoRAParameters | None = Field(
        default_factory=lambda seen: LoRAParameters() if seen.get("fine_tune_type") == "lora" else None
    )

    data: str | None = None
    """mlx-lm's: a folder of {train,valid,test}.jsonl, or a hub name."""
    hf_dataset: HubDataset | tuple[HubDataset, ...] = ()
    """mlx-lm's: one entry or a list. Like `data`, instead of `datasets`."""
    datasets: tuple[DatasetSource, ...] = ()
    """Sources of rows, joined in this order."""
    prompt_feature: str = "prompt"
    """With `data`: the key of a row's prompt. The next three likewise."""
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"
    val_set_size: int | float = Field(default=0, ge=0)
    """Validation rows split off the training rows: a share below 1, or a number of rows. 0 takes none."""

    max_seq_length: int = Field(default=2048, ge=2)
    """Longest row in tokens."""
    excess_length_strategy: Literal["truncate", "drop", "raise"] = "truncate"
    """What happens to a longer row. A row left with nothing to learn from is dropped and reported in any case."""
    sample_packing: Literal[False] = False
    mask_prompt: bool = True
    """True: every assistant turn is supervised, and nothing else. False, mlx-lm's default: every token is.
    Text rows have no prompt and are supervised whole either way."""
    roles_to_train: tuple[str, ...] = Field(default=("assistant",), min_length=1)
    """Whose turns are supervised under mask_prompt."""
    train_on_eos: Literal["turn", "last", "none"] = "turn"
    """Which end-of-turn tokens are supervised under mask_prompt: each trained turn's, the last one's, none."""

    batch_size: int = Field(default=4, ge=1)
    """Rows in one forward pass."""
    grad_accumulation_steps: int = Field(default=1, ge=1)
    """Batches whose gradients make one optimizer update."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the rows; instead of `iters`."""
    iters: int | None = Field(default_factory=lambda seen: None if seen.get("epochs") else 1000, ge=1)
    """Length of the run in batches, as mlx-lm counts: `grad_accumulation_steps` of them are one update."""

    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = "adam"
    """muon: Muon on two-dimensional weights that are no embedding, AdamW on the rest."""
    optimizer_config: OptimizerConfig = OptimizerConfig()
    lr_schedule: Schedule | None = None
    """Nothing: the rate stays at learning_rate after the warmup."""
    learning_rate: float = Field(
        default_factory=lambda seen: _peak(seen.get("lr_schedule")) or 1e-5,
        gt=0,
    )
    """Peak rate."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the optimizer updates that warm up; instead of lr_schedule.warmup."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this global norm. Nothing: no clipping."""

    grad_checkpoint: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    clear_cache_threshold: Annotated[int, BeforeValidator(_bytes)] = Field(default=0, ge=0)
    """Free the allocator's cache after a step when it holds more bytes than this; `4GB` is understood."""
    seed: int = Field(default=0, ge=0)
    """Of adapter initialisation, dropout, the order of batches and the validation split."""

    steps_per_report: int = Field(default=10, ge=1)
    """Batches between loss reports."""
    steps_per_eval: int = Field(default=200, ge=1)
    """Batches between validations."""
    val_batches: int = Field(default=25, ge=-1)
    """Batches of a validation, the same rows each time; -1 is all, 0 is no validation."""
    save_every: int = Field(default=100, ge=1)
    """Batches between checkpoints."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Checkpoints kept; the best one is kept besides. Nothing: all."""
    load_best_model_at_end: bool = False
    """Publish the adapter with the lowest validation loss rather than the last one."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many validations without a lower loss."""
    metric: Metric | None = None
    """A measure of answers beside the loss, at each validation."""

    adapter_path: str = "adapters"
    """Folder the run writes."""
    resume_adapter_file: str | None = None
    """Warm start: weights from an adapter file or folder, everything else from the beginning."""
    resume_from_checkpoint: str | None = None
    """Continue a run exactly: weights, optimizer, schedule, randomness and place in the data."""

    report_to: None = None
    project_name: None = None
    config: None = None

    @field_validator(*REFUSED, mode="before")
    @classmethod
    def _not_in_this_version(cls, value: Any, info: ValidationInfo) -> Any:
        refused, reason = REFUSED[str(info.field_name)]
        if refused(value):
            raise ValueError(reason)
        return value

    @model_validator(mode="after")
    def _keys_agree(self) -> Recipe:
        problems = [*_data_problems(self), *_training_problems(self), *_keeping_problems(self)]
        if problems:
            raise Problems(problems)
        return self

    def sources(self) -> tuple[DatasetSource, ...]:
        """Where rows come from, however it was spelled."""
        if self.data is not None:
            return (DatasetSource(path=self.data, **{name: getattr(self, name) for name in Features}),)
        entries = (self.hf_dataset,) if isinstance(self.hf_dataset, HubDataset) else self.hf_dataset
        hub = [
            DatasetSource(split=entry.train_split, **entry.model_dump(exclude={"train_split"}))
            for entry in entries
        ]
        return (*hub, *self.datasets)


def _peak(schedule: Schedule | None) -> float | None:
    return schedule.arguments[0] if schedule is not None and schedule.arguments else None


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with `--set` overrides applied and paths resolved. ConfigError lists all problems."""
    recipe = load_yaml(Path(path), Recipe, overrides, aliases=ALIASES, foreign=FOREIGN)
    folder = Path(path).parent
    names = ("model", "data", "resume_adapter_file", "resume_from_checkpoint")
    resolved: dict[str, Any] = {name: _beside(folder, getattr(recipe, name)) for name in names}
    resolved["datasets"] = tuple(
        entry.model_copy(update={"path": _beside(folder, entry.path)}) for entry in recipe.datasets
    )
    return recipe.model_copy(update=resolved)


def _beside(folder: Path, value: str | None) -> str | None:
    """`value` under the recipe's folder if that exists; else unchanged: in the working directory, or on the hub."""
    if value is None or not (folder / value).exists():
        return value
    return os.path.normpath(folder / value)


# Knobs that must agree with each other.


def _data_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    given = [name for name in ("data", "hf_dataset", "datasets") if getattr(recipe, name)]
    if not given:
        yield "datasets", "missing; write datasets: [{path: …}], or mlx-lm's data or hf_dataset"
    for extra in given[1:]:
        yield extra, f"{given[0]} already says where the rows come from; keep one"
    if recipe.data is None:
        for name in Features:
            if name in recipe.model_fields_set and getattr(recipe, name) != Recipe.model_fields[name].default:
                yield name, f"goes with data; in {given[0] if given else 'datasets'} write it in the entry"
    if isinstance(recipe.val_set_size, float) and recipe.val_set_size >= 1:
        yield (
            "val_set_size",
            f"found {recipe.val_set_size}; expected a share below 1.0 or a whole number of rows",
        )
    if not recipe.mask_prompt:
        for name in ("roles_to_train", "train_on_eos"):
            if getattr(recipe, name) != Recipe.model_fields[name].default:
                yield name, "has no effect with mask_prompt: false, which supervises every token"


def _training_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.fine_tune_type == "full" and recipe.lora_parameters is not None:
        yield "lora_parameters", "has no effect with fine_tune_type: full; leave it out"
    if recipe.init == "random" and recipe.fine_tune_type != "full":
        yield "init", "random weights want fine_tune_type: full; an adapter on them would learn nothing"
    if recipe.num_layers == 0:
        yield "num_layers", "found 0, which trains nothing; -1 is all blocks"
    if recipe.epochs is not None and recipe.iters is not None:
        yield "epochs", "iters already says how long the run is; keep one"
    schedule = recipe.lr_schedule
    if schedule is not None and schedule.warmup and recipe.warmup_ratio:
        yield "warmup_ratio", "lr_schedule.warmup already says how long the warmup is; keep one"
    peak = _peak(schedule)
    if peak is not None and peak != recipe.learning_rate:
        yield (
            "learning_rate",
            f"found {recipe.learning_rate}, but lr_schedule.arguments starts at {peak}; keep one",
        )
    sgd = recipe.optimizer_config.sgd
    if sgd.nesterov and (sgd.momentum == 0 or sgd.dampening):
        yield "optimizer_config.sgd.nesterov", "needs a momentum above 0 and dampening 0"


def _keeping_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.resume_adapter_file and recipe.resume_from_checkpoint:
        yield "resume_adapter_file", "resume_from_checkpoint restores the weights too; keep one"
    if recipe.val_batches == 0:
        for name in ("load_best_model_at_end", "early_stopping_patience", "metric"):
            if getattr(recipe, name):
                yield name, "needs validation; val_batches is 0"
