"""What a run keeps of its weights: checkpoints, the manifest they are published with, and the best ones.

Reads the weights where they are and puts saved ones in place; decides nothing about when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import mlx.optimizers as mlx_optim

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import write_adapter
from serve.model.network import Network
from train.adapters.adapt import Adapted, adapter_tensors, manifest_keys, set_tensors
from train.loop import checkpoint
from train.loop.checkpoint import Checkpoint
from train.loop.identity import check, identity_of
from train.loop.trainer import TrainState
from train.recipe.recipe import Recipe

METRIC_BEFORE, METRIC = "exact_match_before", "exact_match"
"""A manifest's names of what the recipe's metric measured: before the first step, and of the weights beside it."""


class Keeper:
    """Saves and restores one run's weights and optimizer. Owns no arrays.

    lineage        of the run; each manifest adds what was measured by then
    num_processes  that train together
    """

    def __init__(
        self,
        recipe: Recipe,
        network: Network,
        adapted: Adapted,
        optimizer: mlx_optim.Optimizer,
        lineage: Lineage,
        num_processes: int,
    ) -> None:
        self.folder = Path(recipe.adapter_path)
        self._recipe = recipe
        self._network = network
        self._adapted = adapted
        self._optimizer = optimizer
        self.lineage = lineage
        self._identity = identity_of(recipe, lineage, num_processes)

    def go_on_from(self, saved: Checkpoint) -> list[str]:
        """Put a checkpoint's weights and optimizer in place, and what the run may come back to into its folder.

        Returns what a person should know. ConfigError if the checkpoint is another run's.
        """
        told = check(saved, self._identity)
        restore(saved, self._network, self._optimizer)
        state, recipe = saved.state, self._recipe
        if recipe.nonfinite_policy == "rollback":
            checkpoint.bring(saved.folder, self.folder, state.step)
        if recipe.load_best_model_at_end and state.best_step is not None:
            source = (
                checkpoint.sibling(saved.folder, state.best_step)
                if state.best_step != state.step
                else saved.folder
            )
            if not checkpoint.bring(source, self.folder, state.best_step):
                told.append(
                    f"no checkpoint of step {state.best_step}, the best so far, is beside {saved.folder}: "
                    f"the best step from here on is published"
                )
                state.forget_best()
        return told

    def save(self, state: TrainState, metrics_bytes: int) -> Path:
        """Publish a checkpoint, and remove those beyond save_total_limit. Returns its folder."""
        folder = checkpoint.save(
            self.folder,
            adapter_tensors(self._network),
            self._optimizer,
            self.manifest(state),
            state,
            self._identity,
            metrics_bytes,
        )
        checkpoint.prune(self.folder, self._recipe.save_total_limit, state.best_step)
        return folder

    def roll_back(self) -> None:
        """Put the last checkpoint's weights and optimizer in place."""
        restore(checkpoint.load(checkpoint.find(self.folder)), self._network, self._optimizer)

    def put_best(self, state: TrainState, say: Callable[[str], None]) -> int:
        """Put the weights to publish in place: the last, or the best if the recipe says so. Returns their step."""
        best = state.best_step
        if not self._recipe.load_best_model_at_end or best is None or best == state.step:
            return state.step
        saved = checkpoint.load(checkpoint.folder_of(self.folder, best))
        set_tensors(self._network, saved.tensors, str(saved.folder))
        state.measures = state.best_measures
        say(f"step {best} was the best validation and is the one that is published")
        return best

    def publish(self, state: TrainState) -> str:
        """Write the run's adapter, the weights as they are. Returns its content hash."""
        config = write_adapter(self.folder, adapter_tensors(self._network), self.manifest(state))
        return config.lineage.content_hash if config.lineage else ""

    def manifest(self, state: TrainState) -> AdapterConfig:
        """The manifest of the weights as they are."""
        known = {
            "train_loss": state.train_loss,
            "valid_loss": state.valid_loss,
            "best_valid_loss": state.best_loss,
            METRIC_BEFORE: state.first_measures.get(METRIC),
            METRIC: state.measures.get(METRIC),
        }
        metrics = {name: value for name, value in known.items() if value is not None}
        lineage = dataclasses.replace(self.lineage, metrics=metrics)
        adapted, lora = self._adapted, self._recipe.lora_parameters
        if adapted.fine_tune_type == "full" or lora is None:
            return AdapterConfig("full", adapted.num_layers, lineage=lineage)
        return AdapterConfig(
            fine_tune_type=adapted.fine_tune_type,
            num_layers=adapted.num_layers,
            rank=adapted.rank,
            scale=lora.effective_scale,
            dropout=lora.dropout,
            keys=manifest_keys(self._network, adapted),
            init_lora_weights=lora.init_lora_weights,
            lineage=lineage,
        )


def restore(saved: Checkpoint, network: Network, optimizer: mlx_optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state in place. AdapterError or TrainingError if they do not fit."""
    set_tensors(network, saved.tensors, str(saved.folder))
    checkpoint.restore_optimizer(optimizer, saved.optimizer)
