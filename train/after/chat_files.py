"""What an export's folder says of chats: the template, and the tokens that end an answer. As transformers and mlx-lm
read them: chat_template.jinja, tokenizer_config.json, generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from serve.adapters.formats.lineage import Lineage
from serve.errors import ModelError
from serve.model.loading import LoadedModel
from serve.synced import sync

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
OTHER_TEMPLATES = ("chat_template", "chat_template_type")
"""Keys of tokenizer_config.json that would be read beside the file, or in its place; processors read the first of
their own files, before any other."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
OLD_TEMPLATE_FILE = "chat_template.json"
"""Of processors; mlx-vlm reads it rather than the newer file."""


def write_chat_files(folder: Path, lineage: Lineage, base: LoadedModel) -> None:
    """Put what an adapter's manifest says of chats into a folder that holds the base's files. OSError, ModelError."""
    source = _template(lineage, base.tokenizer)
    if source is not None:
        _write(folder / TEMPLATE_FILE, source)
        for name in (TOKENIZER_FILE, *PROCESSOR_FILES):
            if name == TOKENIZER_FILE or (folder / name).exists():
                _edit(folder / name, lambda said: {k: v for k, v in said.items() if k not in OTHER_TEMPLATES})
        (folder / OLD_TEMPLATE_FILE).unlink(missing_ok=True)
    new = sorted(set(lineage.stop_ids) - base.tokenizer.eos_token_ids)
    if new:
        # The trained ones first: readers that know one end token take the first.
        ends = [*new, *sorted(base.tokenizer.eos_token_ids)]
        _edit(folder / GENERATION_FILE, lambda said: {**said, "eos_token_id": ends})


def chat_notes(lineage: Lineage | None, base: LoadedModel) -> Iterator[str]:
    """What an export's folder cannot say, for a person."""
    if lineage is not None and lineage.chat_template_kwargs and _template(lineage, base.tokenizer) is None:
        said = json.dumps(lineage.chat_template_kwargs)
        yield (
            f"the adapter was trained with chat_template_kwargs {said}, which this base's template, no single Jinja "
            f"text, cannot hold: ask with them (mlx_lm.generate --chat-template-config '{said}')"
        )


def with_variables(source: str, variables: Mapping[str, Any]) -> str:
    """A Jinja template that sets these variables itself, whatever it is called with."""
    # With trim_blocks, which every reader of chat templates sets, a block's newline is no part of the prompt.
    return "".join(f"{{% set {name} = {_literal(value)} %}}\n" for name, value in variables.items()) + source


def _template(lineage: Lineage, tokenizer: Any) -> str | None:
    """What the folder's template is to be; None: as the base's files have it."""
    own = lineage.chat_template
    if not lineage.chat_template_kwargs:
        return own or None
    is_text = tokenizer._chat_template is None and isinstance(tokenizer.chat_template, str)
    source = own or (tokenizer.chat_template if is_text else None)
    return with_variables(source, lineage.chat_template_kwargs) if source else None


def _literal(value: Any) -> str:
    """A JSON value in Jinja's spelling."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    _write(path, json.dumps(change(said), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    sync(path)
