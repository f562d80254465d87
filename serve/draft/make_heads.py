"""A folder of a drafter in, a head out: which kind it is, what it weighs, and what cannot be used, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve import device
from serve.draft.dflash import DFlash
from serve.draft.eagle import Eagle3
from serve.draft.gemma4 import Gemma4Assistant
from serve.draft.heads import Heads
from serve.draft.mtp import own_mtp, split_mtp
from serve.engine.drafts import MAX_DRAFT, Reader
from serve.errors import ModelError
from serve.model.loading import LOAD_ERRORS, LoadedModel, cast, fingerprint, read_config, resolve
from serve.model.weights import dequantize


def heads_of(path_or_repo: str, model: LoadedModel, max_tokens: int = MAX_DRAFT) -> Reader:
    """The drafter in a folder, or a hub repository, for a base. ModelError where it cannot be used, and why."""
    from mlx_vlm.utils import get_model_type

    path = resolve(path_or_repo)
    config = read_config(path)
    kind = get_model_type(config)
    if kind == SPLIT_MTP:
        return Heads(split_mtp(path, path_or_repo, config, model), max_tokens)
    make = KINDS.get(kind)
    if make is None:
        known = ", ".join(sorted((*KINDS, SPLIT_MTP)))
        raise ModelError(
            f"{path_or_repo}: a drafter of kind {kind!r} cannot be used; those that can: {known}"
        )
    return make(_module(path, path_or_repo, config, model), path_or_repo, fingerprint(path), max_tokens)


def own_heads_of(model: LoadedModel, max_tokens: int = MAX_DRAFT) -> Reader:
    """The drafter in the base's own checkpoint. ModelError where there is none that can be used."""
    return Heads(own_mtp(model), max_tokens)


def _eagle3(module: Any, name: str, fingerprint: str, max_tokens: int) -> Reader:
    return Heads(Eagle3(module, name, fingerprint), max_tokens)


def _module(path: Path, name: str, config: Mapping[str, Any], model: LoadedModel) -> Any:
    """mlx-vlm's drafter model with its weights, in the dtype that the base is computed in."""
    from mlx_vlm.utils import load_model

    if config.get("model_file"):
        raise ModelError(
            f"{name}: its config.json names code of its own, {config['model_file']!r}, which is not run"
        )
    try:
        module = load_model(path, lazy=True)
    except LOAD_ERRORS as error:
        raise ModelError(f"{name}: cannot be loaded: {error}") from error
    if device.backend() == "cpu":
        dequantize(module)
    cast(module, model.network.parameters_dtype())
    module.eval()
    mx.eval(module.parameters())
    return module


def _gemma4(module: Any, name: str, fingerprint: str, max_tokens: int) -> Reader:
    return Heads(Gemma4Assistant(module, name, fingerprint), max_tokens)


KINDS: Mapping[str, Callable[[Any, str, str, int], Reader]] = {
    "eagle3": _eagle3,
    "gemma4_assistant": _gemma4,
    "gemma4_dflash": DFlash,
    "qwen3_dflash": DFlash,
}
"""By model_type."""
SPLIT_MTP = "qwen3_5_mtp"
"""mlx-vlm's name of qwen3_next's and qwen3_5's own head in a folder of its own: weights alone."""
