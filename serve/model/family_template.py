"""The chat template of a model with eyes or ears, which may lie elsewhere than with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve.errors import ModelError

PALIGEMMA = (
    "{% for m in messages %}"
    "{% if m.content is string %}{{ (bos_token if loop.first else '') + m.content }}"
    "{% else %}{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}"
    "{% endfor %}"
)
"""How it was trained: picture, beginning, words, a new line, answer; its processor puts the beginning behind a
picture. Its folders hold none."""
_FAMILIES = {"paligemma": PALIGEMMA}


def template_beside(folder: Path, config: dict[str, Any], has_own: bool) -> str | None:
    """The template that goes before the tokenizer's own, as mlx-vlm and transformers have it; None: there is none.

    has_own  whether the tokenizer has one. ModelError for a file that cannot be read.
    """
    whole = folder / "chat_template.json"
    if whole.exists():
        found = _read(whole).get("chat_template")
        if isinstance(found, str):
            return found
    if has_own:
        return None
    beside = folder / "processor_config.json"
    found = _read(beside).get("chat_template") if beside.exists() else None
    return found if isinstance(found, str) else _FAMILIES.get(str(config.get("model_type")))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
