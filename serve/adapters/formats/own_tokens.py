"""A tokenizer that training left beside an adapter → the tokens that it adds to its vocabulary, by text.

tokenizer.json         added_tokens, which stand at the file's beginning: no more is read of it
tokenizer_config.json  added_tokens_decoder, of transformers before 5
added_tokens.json      of slow tokenizers

Adapters are served with their base's tokenizer, so what cannot be read here harms nobody, and adds nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ADDED_FILE = "added_tokens.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", ADDED_FILE)
MOST_CHARACTERS = 2 << 20
ADDED = re.compile(r'"added_tokens"\s*:\s*')


def added_tokens(folder: Path) -> dict[str, int]:
    """Text → id; nothing where no tokenizer is."""
    fast, config, slow = (_beginning(folder / name) for name in TOKENIZER_FILES)
    found: dict[str, int] = {}
    for each in _list_in(fast):
        found |= _token(each)
    decoder = _object(config).get("added_tokens_decoder")
    for token_id, each in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(each, dict) and token_id.isdecimal():
            found |= _token({**each, "id": int(token_id)})
    for text, token_id in _object(slow).items():
        found |= _token({"content": text, "id": token_id})
    return found


def _token(told: Any) -> dict[str, int]:
    text, token_id = (told.get("content"), told.get("id")) if isinstance(told, dict) else (None, None)
    return {text: token_id} if isinstance(text, str) and type(token_id) is int else {}


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_CHARACTERS)
    except OSError:
        return ""


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _list_in(text: str) -> list[Any]:
    begun = ADDED.search(text)
    try:
        found = json.JSONDecoder().raw_decode(text, begun.end())[0] if begun else []
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
