"""How long a model stays in memory after a request, as Ollama's clients say it: seconds, or a duration of Go's."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import PlainValidator

from serve.api.admin import may_change
from serve.api.state import AppState
from serve.errors import RequestError

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"([-+]?)((?:{_PART})+)")


def seconds_of(value: Any) -> float | None:
    """Seconds; inf: for good, which is what anything below 0 says. RequestError for what is no duration."""
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d+)?", value):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return math.inf if value < 0 else float(value)
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise RequestError(
            f"keep_alive: found {value!r:.100}; expected seconds, or a duration like 10m, 1h30m or -1s",
            "keep_alive",
        )
    total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, found[2]))
    return math.inf if found[1] == "-" and total else total


KeepAlive = Annotated[float | None, PlainValidator(seconds_of, json_schema_input_type=float | str | None)]


def keep(state: AppState, base: str, seconds: float | None) -> None:
    """Let a base leave so long after its last request. Of whoever may not change the server it is a hint, which asks
    nothing of the answer; so it is where the only model stays in any case."""
    if seconds is not None and may_change(state) and state.bases.pool.is_started:
        state.bases.pool.keep(base, seconds)
