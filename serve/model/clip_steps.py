"""Where a clip's pieces stand in time, for families whose temporal positions are so many a second.

Such a family has learned the pace of a clip from how far apart its pieces stand. mlx-vlm's rule puts them one
position apart, whatever time passes between them; here they stand where Hugging Face's get_rope_index puts them
when it is told second_per_grid_ts. What follows a clip stands behind its last moment, as in transformers up to 5.2
and in vLLM. Host data: numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serve.model.prompt import Rope

_RATES: dict[str, tuple[str, str, float]] = {
    "qwen2_5_vl": ("vision_config", "tokens_per_second", 4.0),
    "qwen3_omni_moe": ("thinker_config", "position_id_per_seconds", 25.0),
}
"""model_type → which part of config.json says how many positions a second is, under which key, and Hugging Face's
default, which it does not write."""
_ROUNDING = 1e-4
"""Of positions: times are written in decimals, and 2.9999 of a third of a second each are 1."""


def positions_per_second(config: Mapping[str, Any]) -> float | None:
    """By a model's config.json; None: a clip's pieces stand one position apart."""
    told = _RATES.get(str(config.get("model_type")))
    if told is None:
        return None
    part, key, default = told
    return float((config.get(part) or {}).get(key) or default)


def step_of(times_s: Sequence[float], frames_per_piece: int, positions_per_s: float) -> float:
    """How many positions a clip's pieces stand apart. times_s: of its frames, ascending."""
    if len(times_s) < 2:
        return 1.0
    seconds = (times_s[-1] - times_s[0]) / (len(times_s) - 1) * frames_per_piece
    return round(seconds * positions_per_s, 6)


def stepped(rope: Rope, clips: Sequence[tuple[int, int, float]]) -> Rope:
    """The same rope with clips' pieces so far apart, and what follows as much later.

    clips  (start, stop, step) of each: its placeholders [start, stop), which stand one position apart in time
    """
    positions, delta = rope.positions.copy(), rope.delta
    for start, stop, step in clips:
        clip = positions[:, start:stop]
        first, last = int(clip.min()), int(clip.max())
        clip[0] = first + np.floor((clip[0] - first) * step + _ROUNDING).astype(clip.dtype)
        later = int(clip.max()) - last
        positions[:, stop:] += later
        delta += later
    return Rope(positions, delta)
