"""What an export's folder says of chats: the template, and the tokens that end an answer. As transformers and mlx-lm
read them: chat_template.jinja, tokenizer_config.json, generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serve.adapters.manifest import Lineage
from serve.errors import ModelError
from serve.model.loading import LoadedModel
from train.loop import checkpoint

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
OTHER_TEMPLATES = ("chat_template", "chat_template_type")
"""Keys of tokenizer_config.json that would be read in place of the file, or say the opposite."""


def write_chat_files(folder: Path, lineage: Lineage, base: LoadedModel) -> None:
    """Put an adapter's own template and stop ids into a folder that holds the base's files. OSError."""
    if lineage.chat_template:
        _write(folder / TEMPLATE_FILE, lineage.chat_template)
        _edit(
            folder / TOKENIZER_FILE, lambda said: {k: v for k, v in said.items() if k not in OTHER_TEMPLATES}
        )
    new = sorted(set(lineage.stop_ids) - base.tokenizer.eos_token_ids)
    if new:
        # The trained ones first: readers that know one end token take the first.
        ends = [*new, *sorted(base.tokenizer.eos_token_ids)]
        _edit(folder / GENERATION_FILE, lambda said: {**said, "eos_token_id": ends})


def chat_notes(lineage: Lineage | None) -> Iterator[str]:
    """What an export's folder cannot say, for a person."""
    if lineage is not None and lineage.chat_template_kwargs:
        said = json.dumps(lineage.chat_template_kwargs)
        yield (
            f"the adapter was trained with chat_template_kwargs {said}, which no model folder holds: ask with them "
            f"(mlx_lm.generate --chat-template-config '{said}')"
        )


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    _write(path, json.dumps(change(said), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    checkpoint.sync(path)
