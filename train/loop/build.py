"""A recipe → its optimizer, and how its steps and its loop go."""

from __future__ import annotations

import mlx.optimizers as mlx_optim

from serve import device
from serve.model.loading import LoadedModel
from serve.model.network import Network
from train.adapters.adapt import embedding_names, trains_towers
from train.loop.eyes import Eyes
from train.loop.optim import build_optimizer, schedule_of
from train.loop.step import StepSettings
from train.loop.trainer import LoopSettings
from train.recipe.recipe import Recipe


def optimizer_of(recipe: Recipe, network: Network, num_steps: int) -> mlx_optim.Optimizer:
    """The optimizer with its schedule over `num_steps` updates."""
    return build_optimizer(
        recipe.optimizer,
        recipe.optimizer_config.model_dump(exclude_unset=True),
        schedule_of(recipe, num_steps),
        learning_rate=recipe.learning_rate,
        embedding_names=embedding_names(network),
        loraplus_ratio=recipe.loraplus_lr_ratio,
    )


def eyes_of(recipe: Recipe, model: LoadedModel) -> Eyes | None:
    """The towers of a model that has any, once it is known what of it trains."""
    if model.vision is None:
        return None
    trains = trains_towers(model.network)
    return Eyes(model.network, model.vision, trains=trains, max_bytes=recipe.feature_cache_threshold)


def step_settings(recipe: Recipe) -> StepSettings:
    """How a step is computed: compiled on a GPU."""
    return StepSettings(
        max_grad_norm=recipe.max_grad_norm,
        compiled=device.backend() != "cpu",
        seed=recipe.seed,
        recompute=recipe.grad_checkpoint,
        max_positions=recipe.micro_batch_tokens,
    )


def loop_settings(recipe: Recipe, num_iterations: int) -> LoopSettings:
    """How long the run is, and how often it reports, validates and saves."""
    return LoopSettings(
        num_iterations=num_iterations,
        accumulation=recipe.grad_accumulation_steps,
        iterations_per_report=recipe.steps_per_report,
        iterations_per_eval=recipe.steps_per_eval,
        iterations_per_save=recipe.save_every,
        patience=recipe.early_stopping_patience,
        save_best=recipe.load_best_model_at_end,
        best_by=recipe.metric_for_best_model,
        greater_is_better=recipe.metric_for_best_model != "loss",
        nonfinite=recipe.nonfinite_policy,
        clear_cache_bytes=recipe.clear_cache_threshold,
    )
