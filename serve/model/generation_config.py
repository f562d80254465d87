"""A model folder's generation_config.json → how it is sampled where nobody says otherwise, as vLLM reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from serve.errors import ConfigError

FILE = "generation_config.json"


@dataclass(frozen=True)
class SamplingDefaults:
    """Values of requests that name none; None: nobody names one."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """-1 and 0 keep the whole vocabulary."""
    min_p: float | None = None
    repetition_penalty: float | None = None

    def over(self, others: SamplingDefaults) -> SamplingDefaults:
        """These, and of the others what is not said here."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        return SamplingDefaults(**{**vars(others), **own})


def _is_right(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return {
        "temperature": 0 <= value < float("inf"),
        "top_p": 0 < value <= 1,
        "top_k": isinstance(value, int) and value >= -1,
        "min_p": 0 <= value <= 1,
        "repetition_penalty": 0 < value < float("inf"),
    }[name]


def read_defaults(folder: Path) -> SamplingDefaults:
    """What the folder's file says of sampling; nothing where there is none. `do_sample` is not asked, as in vLLM.

    ConfigError names a value that cannot be one.
    """
    path = folder / FILE
    if not path.is_file():
        return SamplingDefaults()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; mend it, or set generation_config: none"
        ) from None
    names = [field.name for field in fields(SamplingDefaults)]
    values = {name: found[name] for name in names if isinstance(found, dict) and found.get(name) is not None}
    wrong = [f"{name} is {value!r}" for name, value in values.items() if not _is_right(name, value)]
    if wrong:
        raise ConfigError(
            f"{path}: {', '.join(wrong)}, by which nothing can be drawn; mend it, or set generation_config: none"
        )
    return SamplingDefaults(**values)
