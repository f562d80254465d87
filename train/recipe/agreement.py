"""A recipe → knobs that contradict one another, or have no effect, each with the reason and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from serve.adapters.versions.names import name_problem
from serve.errors import ConfigError
from serve.remote import base_url
from train.recipe import vision
from train.recipe.objectives import OBJECTIVES, names_where, needed
from train.recipe.optimizer_config import peak_of

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe

FEATURES = ("prompt_feature", "completion_feature", "chat_feature", "text_feature")
"""Keys beside `data` that name its columns."""


def problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and reason."""
    yield from _data_problems(recipe)
    yield from _objective_problems(recipe)
    yield from _training_problems(recipe)
    yield from _keeping_problems(recipe)


def _data_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    given = [name for name in ("data", "hf_dataset", "datasets") if getattr(recipe, name)]
    if not given:
        yield "datasets", "missing; write datasets: [{path: …}], or mlx-lm's data or hf_dataset"
    for extra in given[1:]:
        yield extra, f"{given[0]} already says where the rows come from; keep one"
    if recipe.data is None:
        for name in FEATURES:
            if (
                name in recipe.model_fields_set
                and getattr(recipe, name) != type(recipe).model_fields[name].default
            ):
                yield name, f"goes with data; in {given[0] if given else 'datasets'} write it in the entry"
    if isinstance(recipe.val_set_size, float) and recipe.val_set_size >= 1:
        yield (
            "val_set_size",
            f"found {recipe.val_set_size}; expected a share below 1.0 or a whole number of rows",
        )
    yield from _row_problems(recipe)
    yield from _stream_problems(recipe)
    if not recipe.mask_prompt:
        for name in ("roles_to_train", "train_on_eos"):
            if getattr(recipe, name) != type(recipe).model_fields[name].default:
                yield name, "has no effect with mask_prompt: false, which supervises every token"


def _row_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Knobs that this objective's rows cannot use."""
    objective = recipe.objective
    for index, entry in enumerate(recipe.datasets):
        if entry.type != "auto" and entry.type not in OBJECTIVES[objective].kinds:
            reason = f"found {entry.type}; objective {objective} needs rows of {needed(objective)}"
            yield f"datasets.{index}.type", reason
    if objective == "cpt" and recipe.mask_prompt:
        yield "mask_prompt", "objective cpt supervises every token; leave it out, or write objective: sft"
    if not recipe.entry.is_supervised:
        if not recipe.mask_prompt:
            yield "mask_prompt", f"objective {objective} weighs answers, never prompts; leave it out"
        if recipe.roles_to_train != ("assistant",):
            yield "roles_to_train", f"objective {objective} weighs the assistant's answers; leave it out"
    if recipe.excess_length_strategy == "split" and objective != "cpt":
        yield "excess_length_strategy", "split makes rows of a document's pieces, which needs objective: cpt"


def _stream_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What needs all rows at once, and so no stream."""
    streamed = [entry.streaming for entry in recipe.datasets]
    if not any(streamed):
        return
    if not all(streamed):
        yield (
            f"datasets.{streamed.index(False)}.streaming",
            "another source is streamed; stream all of them, or none",
        )
    if recipe.epochs is not None:
        yield "epochs", "a stream has no known end, so no epochs; write iters"
    if isinstance(recipe.val_set_size, float) and recipe.val_set_size:
        yield "val_set_size", "a share of a stream is not known; write a number of rows, its first ones"
    if recipe.dataset_exact_deduplication:
        yield "dataset_exact_deduplication", "needs all rows at once; a stream has them one after the other"
    if recipe.sample_packing:
        yield "sample_packing", "packs rows by all their lengths, which a stream does not know"


def _method_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    lora = recipe.lora_parameters
    if recipe.fine_tune_type == "full":
        if recipe.quantize is not None:
            yield "quantize", "packed weights cannot train; leave it out, or write fine_tune_type: lora"
        if recipe.loraplus_lr_ratio is not None:
            yield "loraplus_lr_ratio", "has no effect with fine_tune_type: full; leave it out"
    elif lora is not None and lora.init_lora_weights != "default" and recipe.fine_tune_type == "dora":
        yield "lora_parameters.init_lora_weights", "pissa goes with fine_tune_type: lora; expected default"


def _training_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from _method_problems(recipe)
    yield from vision.problems(recipe.train_vision, recipe.fine_tune_type)
    if recipe.fine_tune_type == "full" and recipe.lora_parameters is not None:
        yield "lora_parameters", "has no effect with fine_tune_type: full; leave it out"
    if recipe.init == "random" and recipe.fine_tune_type != "full":
        yield "init", "random weights want fine_tune_type: full; an adapter on them would learn nothing"
    if recipe.sample_packing and not recipe.entry.is_supervised:
        packed = names_where(lambda entry: entry.is_supervised)
        yield (
            "sample_packing",
            f"objective {recipe.objective} compares whole answers; packing is for {packed}",
        )
    if recipe.num_layers == 0:
        yield "num_layers", "found 0, which trains nothing; -1 is all blocks"
    if recipe.epochs is not None and recipe.iters is not None:
        yield "epochs", "iters already says how long the run is; keep one"
    schedule = recipe.lr_schedule
    if schedule is not None and schedule.warmup and recipe.warmup_ratio:
        yield "warmup_ratio", "lr_schedule.warmup already says how long the warmup is; keep one"
    peak = peak_of(schedule)
    if peak is not None and peak != recipe.learning_rate:
        yield (
            "learning_rate",
            f"found {recipe.learning_rate}, but lr_schedule.arguments starts at {peak}; keep one",
        )
    sgd = recipe.optimizer_config.sgd
    if sgd.nesterov and (sgd.momentum == 0 or sgd.dampening):
        yield "optimizer_config.sgd.nesterov", "needs a momentum above 0 and dampening 0"


def _objective_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    objective, block = recipe.objective, recipe.block
    entry = recipe.entry
    for name in OBJECTIVES:
        if name != objective and getattr(recipe, name, None) is not None:
            yield name, f"has no effect with objective: {objective}; write objective: {name}, or leave it out"
    if recipe.metric is not None and entry.measures:
        yield (
            "metric",
            f"compares answers with right ones, which rows of {objective} do not say; look at "
            f"{' or '.join(entry.measures)}",
        )
    if block is None and entry.config is not None:
        missing = [(name, entry.config.model_fields[name].description) for name in entry.config.required()]
        needs = "; ".join(f"{name}, {' '.join((meaning or '').split())}" for name, meaning in missing)
        yield objective, f"missing; objective {objective} needs a block {objective} with {needs}"
    if block is None:
        return
    yield from block.problems(recipe)
    if block.has_reference and recipe.fine_tune_type == "full":
        yield (
            "fine_tune_type",
            f"full changes the weights that the reference of {objective} is made of, and no second copy is kept; "
            f"expected lora or dora{block.without_reference}",
        )


def _keeping_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    best_by = recipe.metric_for_best_model
    if best_by == "exact_match" and recipe.metric is None:
        yield "metric_for_best_model", "found exact_match, but the recipe has no metric"
    if best_by not in ("loss", "exact_match") and best_by not in recipe.entry.measures:
        yield "metric_for_best_model", f"found {best_by}, which objective {recipe.objective} does not measure"
    yield from _serving_problems(recipe)
    if recipe.resume_adapter_file and recipe.resume_from_checkpoint:
        yield "resume_adapter_file", "resume_from_checkpoint restores the weights too; keep one"
    if recipe.val_batches == 0:
        for name in ("load_best_model_at_end", "early_stopping_patience", "metric", "samples"):
            if getattr(recipe, name):
                yield name, "needs validation; val_batches is 0"
    if recipe.project_name is not None and "wandb" not in (recipe.report_to or ()):
        yield (
            "project_name",
            "names a project at a reporting service; write report_to: wandb, or leave it out",
        )


def _serving_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.serve_to is None:
        if recipe.serve_as is not None:
            yield "serve_as", "names an adapter of a server; write serve_to, or leave it out"
        return
    try:
        base_url(recipe.serve_to)
    except ConfigError as error:
        yield "serve_to", str(error)
    if expected := name_problem(recipe.served_name):
        yield "serve_as", f"found {recipe.served_name!a:.80}; {expected}"
    if recipe.fine_tune_type == "full":
        yield "serve_to", "a server loads adapters, and fine_tune_type: full makes none; leave it out"
