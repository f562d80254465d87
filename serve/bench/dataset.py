"""Requests from a JSONL file: their texts, or only their lengths. One JSON object a line; what each key means:

    prompt          the prompt's text, as vLLM's custom data sets have it
    messages        or a chat; it ends with what the user says, an answer behind that is left out
    prompt_tokens   or how long a made-up prompt is
    output_tokens   how long its answer is to be; `max_tokens` is another name for it

Other keys are the file's own and are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """One line. It has a `prompt`, or `num_prompt_tokens`."""

    prompt: str | None
    num_prompt_tokens: int | None
    num_output_tokens: int | None
    """None: as long as the command line says."""
    history: tuple[Mapping[str, str], ...] = ()
    """Messages before the prompt."""


@dataclass(frozen=True)
class Dataset:
    """A file's lines."""

    path: Path
    records: tuple[Record, ...]


def read(path: Path) -> Dataset:
    """All lines of the file. ConfigError for one that is no request, with its number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset-path: {path} cannot be read: {error}") from error
    records = [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise ConfigError(f"--dataset-path: {path} holds no line")
    return Dataset(path, tuple(records))


def _record(path: Path, number: int, line: str) -> Record:
    where = f"--dataset-path: {path}:{number}"
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: found {line.strip()[:60]!r}; expected a JSON object")
    kinds = [key for key in ("prompt", "messages", "prompt_tokens") if key in found]
    if len(kinds) != 1:
        raise ConfigError(
            f"{where}: found {', '.join(kinds) or 'none'} of prompt, messages and prompt_tokens; expected one"
        )
    names = [key for key in ("output_tokens", "max_tokens") if key in found]
    if len(names) > 1:
        raise ConfigError(
            f"{where}: output_tokens and max_tokens are names of one thing; expected one of them"
        )
    output = _count(where, names[0], found[names[0]]) if names else None
    if kinds == ["prompt_tokens"]:
        return Record(None, _count(where, "prompt_tokens", found["prompt_tokens"]), output)
    if kinds == ["messages"]:
        *history, last = _messages(where, found["messages"])
        return Record(last["content"], None, output, tuple(history))
    if not isinstance(found["prompt"], str) or not found["prompt"]:
        raise ConfigError(f"{where}: prompt is {found['prompt']!r:.60}; expected text")
    return Record(found["prompt"], None, output)


def _messages(where: str, messages: Any) -> list[dict[str, str]]:
    """Up to the user's last words."""
    is_chat = isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    )
    if is_chat and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not is_chat or not messages or messages[-1]["role"] != "user":
        raise ConfigError(f"{where}: messages: expected a chat of texts that ends with what the user says")
    return [{"role": each["role"], "content": each["content"]} for each in messages]


def _count(where: str, key: str, found: Any) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ConfigError(f"{where}: {key} is {found!r:.60}; expected a whole number of tokens, 1 or more")
    return found
