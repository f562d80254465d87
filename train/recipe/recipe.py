"""The recipe of a training run: YAML -> Recipe, every knob once with its meaning under it.

A stock `mlx_lm.lora` file loads unchanged; where mlx-lm has no word, axolotl's is used. A key this version cannot
honour is refused by name with the reason. Paths that are read (`model`, `data`, `datasets[].path`, `chat_template`,
`resume_*`) are taken relative to the recipe file if they exist there, else to the working directory; `adapter_path`,
which is written, is relative to the working directory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from serve.model.quantization import Quantization
from serve.settings import Problems, Strict, load_yaml
from train.recipe.agreement import FEATURES, problems
from train.recipe.draft import DraftConfig
from train.recipe.foreign import ALIASES, FOREIGN
from train.recipe.grpo import GRPOConfig
from train.recipe.kinds import Kind
from train.recipe.objective import ObjectiveConfig, ObjectiveEntry
from train.recipe.objectives import OBJECTIVES
from train.recipe.optimizer_config import OptimizerConfig, Schedule, peak_of
from train.recipe.vision import ImageConfig, TrainVision

LoRAKeys = tuple[str, ...] | Literal["all-linear"]


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
    """What is adapted. `all-linear`, or nothing: every linear layer and expert stack of a block. Else names inside a
    block (`self_attn.q_proj`), their end (`q_proj`), patterns (`self_attn.*`, `re:.*_(q|v)_proj`), and `lm_head`."""
    use_rslora: bool = False
    """scale = alpha / sqrt(rank), which keeps high ranks learning (Kalajdzievski 2023); goes with `alpha`."""
    init_lora_weights: str = Field(default="default", pattern=r"^(default|pissa|pissa_niter_[1-9]\d*)$")
    """Where A and B begin. `pissa`: on the weight's largest singular values, subtracted by frozen copies; the folder
    then holds a plain update of twice the rank. `pissa_niter_16`: the same by 16 power iterations, far faster."""

    @model_validator(mode="after")
    def _one_strength(self) -> LoRAParameters:
        if self.alpha is not None and self.scale is not None:
            raise Problems([("alpha", "the same knob as scale (alpha = scale * rank); keep one")])
        if self.keys == ():
            raise Problems([("keys", "found an empty list; leave it out for every linear layer")])
        if self.use_rslora and self.alpha is None:
            said = "divides alpha by sqrt(rank), while scale is the factor itself; write alpha"
            raise Problems([("use_rslora", said)])
        return self

    @property
    def effective_scale(self) -> float:
        """The factor on B(Ax), whichever way it was written."""
        if self.scale is not None:
            return self.scale
        assert self.alpha is not None
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class DatasetSource(Strict):
    """One source of rows: a .jsonl(.gz), .json, .parquet or .csv file, a folder with train/valid/test files, or a
    hub name."""

    path: str
    """File, folder or hub name."""
    type: Literal["auto"] | Kind = "auto"
    """What a row is; `auto` looks at each row's keys for what the objective learns from: prompt and completion, then
    messages, conversations (ShareGPT's), text, instruction and output (alpaca's); or chosen and rejected; or a label.
    """
    split: str = "train"
    """Where training rows come from: a hub split (`train[:80%]`) or a file's stem in a folder."""
    valid_split: str | None = None
    """Where validation rows come from; a folder's valid file is used without being named."""
    test_split: str | None = None
    """Where test rows come from; a folder's test file is used without being named."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `datasets.load_dataset` for a hub name (`name`, `revision`, …)."""
    weight: float = Field(default=1.0, gt=0)
    """Training rows are taken this many times: 2 repeats all, 0.25 takes a fixed quarter. Of streams: this source's
    part of the rows, next to the other weights."""
    streaming: bool = False
    """Read rows as training goes, never all of them at once; for all sources or none. At its end a stream starts
    over."""
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"
    chosen_feature: str = "chosen"
    rejected_feature: str = "rejected"
    label_feature: str = "label"
    media_root: str | None = None
    """Where relative paths of pictures, clips and sounds begin. Nothing: in the folder of the rows' file."""


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


class Samples(Strict):
    """Prompts that the serving engine answers with the weights as they are. Training is not changed by it."""

    prompts: tuple[str | tuple[dict[str, Any], ...], ...] = ()
    """Texts, or conversations as lists of messages. A text is a user's turn; without a chat template, and under
    objective cpt, it is what the model goes on from."""
    rows: int | None = Field(default=None, ge=1)
    """Instead of `prompts`: the first this many validation rows, up to their last answer."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    seed: int = Field(default=0, ge=0)
    """Of the draws at a temperature above 0: the same at each validation."""

    @model_validator(mode="after")
    def _one_source(self) -> Samples:
        if self.prompts and self.rows is not None:
            raise Problems([("rows", "prompts already says what is answered; keep one")])
        if not self.prompts and self.rows is None:
            raise Problems([("prompts", "missing; write prompts: [texts or messages], or rows: a number")])
        return self


def _services(value: Any) -> Any:
    """'tensorboard, wandb' -> its parts, as mlx-lm reads it."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return value
    names = tuple(name.strip().lower() for name in names if name.strip())
    if "swanlab" in names:
        raise ValueError("SwanLab is not in this version; expected wandb, tensorboard or nothing")
    return names


def _bytes(value: Any) -> Any:
    """'4GB' -> 4000000000, as mlx-lm reads sizes."""
    match = (
        re.fullmatch(r"([0-9.]+)\s*(M|G|MB|GB|)", value.strip().upper()) if isinstance(value, str) else None
    )
    if match is None:
        return value
    return int(float(match[1]) * {"M": 10**6, "G": 10**9, "": 1}[match[2][:1]])


def _nothing(value: Any) -> Any:
    """`train_vision: false` is neither part."""
    return {} if value is False else value


REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "train": (
        lambda v: v is False,
        "`lathe train` always trains; leave it out (`test: true` measures the test rows after training)",
    ),
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

    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    """`lora` trains low-rank updates beside frozen weights, `dora` also the length of each output's weights, `full`
    the weights of the last `num_layers` blocks themselves."""
    objective: str = "sft"
    """What is learned."""
    num_layers: int = Field(default=16, ge=-1)
    """The last this many blocks are trained; -1, or more than the model has, is all of them."""
    lora_parameters: LoRAParameters | None = Field(
        default_factory=lambda seen: LoRAParameters() if seen.get("fine_tune_type") != "full" else None
    )
    train_vision: Annotated[TrainVision, BeforeValidator(_nothing)] = TrainVision()
    """What trains of the tower and projector of a model that sees; false, or nothing, is neither."""
    quantize: Quantization | None = None
    """Pack a full-precision base as it is loaded (QLoRA). Nothing: the base as it is stored."""

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
    """Validation rows split off the training rows: a share below 1, or a number of rows. 0 takes none. Rows with the
    same content stay together; of a stream, its first rows."""
    on_bad_row: Literal["raise", "drop"] = "raise"
    """A row that cannot be used: `raise` ends with file, line and reason, `drop` leaves it out, counted and named. Of
    a stream, `raise` is for the first window's rows; later ones are left out, for the run is under way."""
    dataset_exact_deduplication: bool = False
    """Leave out training rows whose content stood before, or stands in the validation rows too. Both are counted and
    told in any case."""
    dataset_prepared_path: str | None = None
    """Folder that keeps tokenized rows for the next run with the same rows, tokenizer and knobs. Nothing:
    ~/.cache/lathe, for data that took longer than a second to tokenize."""
    dataset_processes: int | None = Field(default=None, ge=1)
    """Processes that tokenize. Nothing: as many as there are cores, where that is faster than one."""

    image: ImageConfig = ImageConfig()
    """How pictures and clips are made ready."""
    feature_cache_threshold: Annotated[int, BeforeValidator(_bytes)] = Field(default=10**9, ge=0)
    """Bytes of what a frozen tower makes of pictures that are kept from epoch to epoch; `4GB` is understood."""

    max_seq_length: int = Field(default=2048, ge=2)
    """Longest row in tokens."""
    excess_length_strategy: Literal["truncate", "drop", "raise", "split"] = Field(
        default_factory=lambda seen: "split" if seen.get("objective") == "cpt" else "truncate"
    )
    """What happens to a longer row. `split`, for objective cpt and its default, makes rows of all its pieces. A
    picture is never cut: a row that would lose a part of one is dropped and reported.
    A row left with nothing to learn from is dropped and reported in any case; so is a longer prompt of grpo."""
    sample_packing: bool = False
    """True: a row holds several documents that do not see each other, and a batch up to batch_size * max_seq_length
    tokens of them. Batches hold alike many tokens, so batch_size 1 or 2 does what 8 does without packing, at the
    memory of the average batch instead of the longest rows'. Validation is not packed."""
    mask_prompt: bool = Field(default_factory=lambda seen: seen.get("objective") != "cpt")
    """True: every assistant turn is supervised, and nothing else. False, mlx-lm's default: every token is.
    Text rows have no prompt and are supervised whole either way, as are all rows under objective cpt."""
    roles_to_train: tuple[str, ...] = Field(default=("assistant",), min_length=1)
    """Whose turns are supervised under mask_prompt."""
    train_on_eos: Literal["turn", "last", "none"] = "turn"
    """Which end-of-turn tokens are supervised under mask_prompt: each trained turn's, the last one's, none."""
    chat_template: str | None = None
    """A file with a Jinja chat template, in place of the tokenizer's own. It is kept in the adapter's manifest, goes
    into exports, and serving renders this adapter's chats with it. Nothing: that of the adapter in
    `resume_adapter_file`, where it has one."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables that the chat template reads (`enable_thinking: false`). Kept with the adapter: serving sets them
    too, where a request does not say otherwise. What is not written here is as in `resume_adapter_file`."""
    special_tokens_in_messages: Literal["words", "control"] = "words"
    """What the text of a special token is inside a message: `words`, its characters, as in serving; `control`, the
    token. Text rows are not messages: there it is always the token. Serve with the same."""

    batch_size: int = Field(default=4, ge=1)
    """Rows of a batch."""
    micro_batch_tokens: int = Field(default_factory=lambda seen: _micro_batch(seen.get("objective")), ge=0)
    """A batch of more positions, padding included, runs in parts of whole rows (or pairs), one after the other: the
    same sums, at the memory of one part; 2,048 if not written. 0: batches run whole, as all of kto do, whose KL
    term is the batch's."""
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
        default_factory=lambda seen: peak_of(seen.get("lr_schedule")) or 1e-5,
        gt=0,
    )
    """Peak rate."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: B learns at this many times learning_rate and its schedule; 16 is usual. Nothing: at the same rate."""
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
    """Publish the best adapter rather than the last one."""
    metric_for_best_model: str = "loss"
    """What makes a validation the best: the lowest `loss`, or the highest of the others: `exact_match`, which is
    `metric`'s, or a measure of the objective."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many validations that are not the best so far."""
    nonfinite_policy: Literal["stop", "skip", "rollback"] = "stop"
    """After a step whose loss or gradient is not a finite number (it never touches the weights): end the run, go on
    with the next batches, or go on with them from the last checkpoint's weights and optimizer."""
    metric: Metric | None = None
    """A measure of answers beside the loss, at each validation."""

    adapter_path: str = "adapters"
    """Folder the run writes."""
    serve_to: str | None = None
    """Address of a running server that is told of every checkpoint and of the adapter at the end, to load them in
    place. It reads them where they are, so it runs on this machine or sees its folders. Training neither waits for it
    nor ends with it."""
    serve_as: str | None = None
    """What that server calls the adapter; the name of adapter_path's folder, if left out."""
    resume_adapter_file: str | None = None
    """Warm start: weights from an adapter file or folder, everything else from the beginning. A folder's chat
    template, its variables and stop ids go on to hold; a person is told where the recipe has others."""
    resume_from_checkpoint: str | None = None
    """Continue a run exactly: weights, optimizer, schedule, randomness and place in the data."""

    samples: Samples | None = None
    """Answers shown at each validation, for a person to read."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...] | None, BeforeValidator(_services)] = (
        None
    )
    """Where curves go besides metrics.jsonl: `wandb`. TensorBoard files are written in any case."""
    project_name: str | None = None
    """The project at the reporting service; nothing is `lathe`."""
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
        if found := [*problems(self)]:
            raise Problems(found)
        return self

    @property
    def entry(self) -> ObjectiveEntry:
        """What there is to know of the chosen objective."""
        return OBJECTIVES[self.objective]

    @property
    def has_reference(self) -> bool:
        """True where the objective measures against the model that the run starts from."""
        return self.block is not None and self.block.has_reference

    @property
    def answering(self) -> GRPOConfig | DraftConfig | None:
        """How prompts are answered, where the run learns from answers of its own or a teacher's."""
        return self.block if isinstance(self.block, GRPOConfig | DraftConfig) else None

    @property
    def prompting_model(self) -> str:
        """Whose tokenizer and chat template make the prompts: the teacher's, where there is one."""
        teacher = self.block.teacher if self.block is not None else None
        return teacher[0] if teacher is not None else self.model

    @property
    def block(self) -> ObjectiveConfig | None:
        """The knobs of the chosen objective, where it has any."""
        block: ObjectiveConfig | None = getattr(self, self.objective, None)
        return block

    @property
    def served_name(self) -> str:
        """What a server calls the adapter."""
        return self.serve_as or Path(self.adapter_path).resolve().name

    def sources(self) -> tuple[DatasetSource, ...]:
        """Where rows come from, however it was spelled."""
        if self.data is not None:
            return (DatasetSource(path=self.data, **{name: getattr(self, name) for name in FEATURES}),)
        entries = (self.hf_dataset,) if isinstance(self.hf_dataset, HubDataset) else self.hf_dataset
        hub = [
            DatasetSource(split=entry.train_split, **entry.model_dump(exclude={"train_split"}))
            for entry in entries
        ]
        return (*hub, *self.datasets)


def _micro_batch(objective: str | None) -> int:
    entry = OBJECTIVES.get(objective or "")
    return 0 if entry is not None and entry.splits_by is None else 2048


def _default_block(objective: str) -> Callable[[dict[str, Any]], ObjectiveConfig | None]:
    """What makes a block that was not written: the chosen objective's, where no knob of it lacks a default."""
    config = OBJECTIVES[objective].config

    def make(seen: dict[str, Any]) -> ObjectiveConfig | None:
        return config() if config and not config.required() and seen.get("objective") == objective else None

    return make


def _with_objectives(base: type[Recipe]) -> type[Recipe]:
    """The recipe with what the registry says: the objectives' names, their blocks, and what they measure."""
    measures = dict.fromkeys(name for entry in OBJECTIVES.values() for name in entry.measures)
    choices = {"objective": tuple(OBJECTIVES), "metric_for_best_model": ("loss", "exact_match", *measures)}
    meanings = {name: base.model_fields[name].description or "" for name in choices}
    meanings["objective"] += f" {'; '.join(f'{name}: {entry.learns}' for name, entry in OBJECTIVES.items())}."
    fields: dict[str, Any] = {
        name: (Literal[values], Field(default=base.model_fields[name].default, description=meanings[name]))
        for name, values in choices.items()
    }
    for name, entry in OBJECTIVES.items():
        if entry.config is not None:
            meaning = f"The knobs of objective {name}; only the chosen objective's block may be written."
            fields[name] = (
                entry.config | None,
                Field(default_factory=_default_block(name), description=meaning),
            )
    made: type[Recipe] = create_model(
        base.__name__, __base__=base, __module__=__name__, __doc__=base.__doc__, **fields
    )
    return made


if not TYPE_CHECKING:  # whose Recipe has `block` for all of them
    Recipe = _with_objectives(Recipe)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with `--set` overrides applied and paths resolved. ConfigError lists all problems."""
    recipe = load_yaml(Path(path), Recipe, overrides, aliases=ALIASES, foreign=FOREIGN)
    folder = Path(path).parent
    names = ("model", "data", "chat_template", "resume_adapter_file", "resume_from_checkpoint")
    resolved: dict[str, Any] = {name: _beside(folder, getattr(recipe, name)) for name in names}
    resolved["datasets"] = tuple(
        entry.model_copy(
            update={"path": _beside(folder, entry.path), "media_root": _beside(folder, entry.media_root)}
        )
        for entry in recipe.datasets
    )
    if recipe.block is not None:
        resolved[recipe.objective] = recipe.block.beside(lambda place: _beside(folder, place) or place)
    return recipe.model_copy(update=resolved)


def _beside(folder: Path, value: str | None) -> str | None:
    """`value` under the recipe's folder if that exists; else unchanged: in the working directory, or on the hub."""
    if value is None or not (folder / value).exists():
        return value
    return os.path.normpath(folder / value)
