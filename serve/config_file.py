"""A YAML file, or a model's path, and words of the command line → ServeConfig, its paths resolved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.config import (
    ELSEWHERE,
    SQLITE_PREFIX,
    AdapterConfig,
    ModelConfig,
    ModelSettings,
    ServeConfig,
    checked,
)
from serve.drafter_config import HeadsDrafter, ModelDrafter
from serve.embed.config import EmbeddingModelConfig
from serve.settings import load_yaml


def load_config(path: str | Path, overrides: Sequence[str] = (), **changes: Any) -> ServeConfig:
    """Read a serving YAML, or make a configuration around a model.

    path       a file ending in .yaml or .yml, else a model folder or hub name
    overrides  `key=value`, as --set gives them
    changes    fields from the command line (host=, port=, adapters=[{name, path}], …); None leaves a field
               alone, adapters are added to the file's
    Relative paths in the file resolve against the file's folder. Raises ConfigError that lists all problems.
    """
    if str(path).endswith((".yaml", ".yml")):
        config = load_yaml(Path(path), ServeConfig, overrides, foreign=ELSEWHERE)
        config = _resolve_paths(config, Path(path).absolute().parent)
    else:
        written = [*overrides, f"model={_quoted(str(path))}"]
        config = load_yaml("\n", ServeConfig, written, foreign=ELSEWHERE)
    changed = {key: value for key, value in changes.items() if value is not None}
    if not changed:
        return config
    added = tuple(AdapterConfig.model_validate(adapter) for adapter in changed.pop("adapters", ()))
    models = tuple(ModelConfig.model_validate(model) for model in changed.pop("models", ()))
    embedding = tuple(
        EmbeddingModelConfig.model_validate(each) for each in changed.pop("embedding_models", ())
    )
    merged = {
        **dict(config),
        **changed,
        "adapters": (*config.adapters, *added),
        "models": (*config.models, *models),
        "embedding_models": (*config.embedding_models, *embedding),
    }
    return checked(merged)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _resolve_paths(config: ServeConfig, folder: Path) -> ServeConfig:
    """Paths that the file wrote, relative to it. What it left out (a hub name, the default store) stays."""
    changes = _resolved(config, folder)
    changes["models"] = tuple(block.model_copy(update=_resolved(block, folder)) for block in config.models)
    changes["embedding_models"] = tuple(
        each.model_copy(update={"model": _model_under(folder, each.model)})
        for each in config.embedding_models
    )
    if "store" in config.model_fields_set and config.store.startswith(SQLITE_PREFIX):
        changes["store"] = SQLITE_PREFIX + str(_under(folder, Path(config.store[len(SQLITE_PREFIX) :])))
    return config.model_copy(update=changes)


def _resolved(settings: ModelSettings, folder: Path) -> dict[str, Any]:
    """The same of one model's; what it does not write is not there."""
    changes: dict[str, Any] = {"model": _model_under(folder, settings.model)}
    if settings.adapters:
        changes["adapters"] = tuple(
            adapter.model_copy(update={"path": _under(folder, adapter.path)}) for adapter in settings.adapters
        )
    for key, value in settings:
        if isinstance(value, Path):
            changes[key] = _under(folder, value)
        elif isinstance(value, tuple) and value and all(isinstance(each, Path) for each in value):
            changes[key] = tuple(_under(folder, each) for each in value)
    if isinstance(settings.drafter, ModelDrafter | HeadsDrafter):
        changes["drafter"] = _drafter_under(folder, settings.drafter)
    return changes


def _under(folder: Path, path: Path) -> Path:
    return (folder / path.expanduser()).resolve()


def _model_under(folder: Path, model: str) -> str:
    """A model's folder, relative to the file's; a hub name stays."""
    path = Path(model).expanduser()
    return str(_under(folder, path)) if model.startswith((".", "~")) or (folder / path).is_dir() else model


def _drafter_under(folder: Path, drafter: ModelDrafter | HeadsDrafter) -> ModelDrafter | HeadsDrafter:
    changes: dict[str, Any] = {}
    if drafter.model is not None:
        changes["model"] = _model_under(folder, drafter.model)
    if isinstance(drafter, ModelDrafter) and drafter.adapters:
        changes["adapters"] = {name: _under(folder, path) for name, path in drafter.adapters.items()}
    return drafter.model_copy(update=changes)
