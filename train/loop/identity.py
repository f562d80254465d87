"""Which run a checkpoint belongs to. A recipe and a lineage in; what a continuation must share with it out.

Every key of a recipe belongs to a run's identity unless it stands in a table here, so a new key belongs to it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from serve.adapters.formats.lineage import Lineage
from serve.errors import ConfigError
from train.loop.checkpoint import Checkpoint
from train.recipe.recipe import LoRAParameters, Recipe

PLACES = frozenset(
    {
        "model",
        "trust_remote_code",
        "data",
        "hf_dataset",
        "datasets",
        "prompt_feature",
        "completion_feature",
        "chat_feature",
        "text_feature",
        "chat_template",
        "dataset_prepared_path",
        "dataset_processes",
        "adapter_path",
        "resume_adapter_file",
        "resume_from_checkpoint",
        "serve_to",
        "serve_as",
        "train",
        "config",
    }
)
"""Where things are, and how they are read: base, rows and chat template are known by hashes of their own."""
MAY_CHANGE = frozenset(
    {
        # how long
        "epochs",
        "iters",
        "early_stopping_patience",
        # how fast
        "learning_rate",
        "lr_schedule",
        "warmup_ratio",
        "loraplus_lr_ratio",
        "max_grad_norm",
        "nonfinite_policy",
        # in how much memory
        "micro_batch_tokens",
        "grad_checkpoint",
        "clear_cache_threshold",
        "feature_cache_threshold",
        # what is measured, told and kept
        "steps_per_report",
        "steps_per_eval",
        "val_batches",
        "val_set_size",
        "metric",
        "test",
        "test_batches",
        "samples",
        "save_every",
        "save_total_limit",
        "load_best_model_at_end",
        "report_to",
        "project_name",
    }
)
"""What a person may want otherwise from here on. A continuation is told of it."""


def identity_of(recipe: Recipe, lineage: Lineage, num_processes: int) -> dict[str, Any]:
    """What is saved in each checkpoint, to be compared by `check`; plain JSON."""
    keys = recipe.model_dump(mode="json", exclude=set(PLACES))
    keys["lora_parameters"] = _meaning(recipe.lora_parameters)
    _leave_out_places(keys, recipe)
    reference = {"reference": recipe.resume_adapter_file or "base"} if recipe.has_reference else {}
    return {
        **keys,
        **reference,
        "batch_size": recipe.batch_size * num_processes,
        "base_fingerprint": lineage.base_fingerprint,
        "data_hash": lineage.data_hash,
        "template_hash": lineage.template_hash,
        **_of_teacher(recipe, lineage),
    }


def _leave_out_places(keys: dict[str, Any], recipe: Recipe) -> None:
    """Of the objective's block, what says where something is; in place."""
    if recipe.block is not None:
        for name in recipe.block.places:
            del keys[recipe.objective][name]


def _of_teacher(recipe: Recipe, lineage: Lineage) -> dict[str, str]:
    if recipe.block is None or recipe.block.teacher is None:
        return {}
    return {"teacher_fingerprint": lineage.teacher_fingerprint, "teacher_hash": lineage.teacher_hash}


def _meaning(lora: LoRAParameters | None) -> dict[str, Any] | None:
    """The same for every spelling of the same adapter."""
    if lora is None:
        return None
    keys = lora.model_dump(mode="json", exclude={"alpha", "use_rslora"})
    return keys | {"scale": lora.effective_scale, "keys": keys["keys"] or "all-linear"}


def check(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> list[str]:
    """A line for each setting that changes from here on. ConfigError unless the run is the one that saved.

    What a checkpoint does not say, one of an earlier version, is not compared.
    """
    saved = checkpoint.identity
    changed = [name for name, value in identity.items() if name in saved and saved[name] != value]
    different = [
        f"  {line}"
        for name in changed
        if name not in MAY_CHANGE
        for line in _differences(name, saved[name], identity[name])
    ]
    if different:
        raise ConfigError(
            f"{checkpoint.folder} cannot be continued with this recipe:\n" + "\n".join(different) + "\n"
            "  resume_adapter_file starts a new run from its weights alone"
        )
    return [
        f"from here on {name} is {_brief(identity[name])}, it was {_brief(saved[name])}" for name in changed
    ]


def _differences(name: str, saved: Any, value: Any) -> list[str]:
    """`lora_parameters.scale: …` where two blocks differ in some of their keys, else one line for the whole."""
    if isinstance(saved, Mapping) and isinstance(value, Mapping):
        keys = [key for key in {**saved, **value} if saved.get(key) != value.get(key)]
        return [
            line for key in keys for line in _differences(f"{name}.{key}", saved.get(key), value.get(key))
        ]
    return [f"{name}: the checkpoint has {saved!r}, this run {value!r}"]


def _brief(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def facts_of(recipe: Recipe, lineage: Lineage) -> dict[str, str]:
    """What all processes of a run must have alike; paths may differ from machine to machine."""
    paths = {
        "model",
        "data",
        "datasets",
        "hf_dataset",
        "adapter_path",
        "chat_template",
        "dataset_prepared_path",
        "dataset_processes",
        "resume_adapter_file",
        "resume_from_checkpoint",
    }
    keys = recipe.model_dump(mode="json", exclude=paths)
    _leave_out_places(keys, recipe)
    return {
        **_of_teacher(recipe, lineage),
        **{f"recipe key {name}": json.dumps(value) for name, value in keys.items()},
        "the base": lineage.base_fingerprint,
        "the chat template": lineage.template_hash or "",
        "the training data": lineage.data_hash or "",
        "mlx-lathe": lineage.lathe_version or "",
        "mlx": metadata.version("mlx"),
    }
