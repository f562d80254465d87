"""`lathe bench cache`: what the server's memory is asked to do, part by part, on a random model. Lathe alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from serve.bench import precision, prefix, ragged, standin, throughput
from serve.bench.finding import Finding, Keep, collect

PARTS = ("ragged", "prefix", "precision", "throughput")


@dataclass(frozen=True)
class Setting:
    """Which parts to measure, and how."""

    parts: tuple[str, ...] = PARTS
    size: str = "29M"
    """Of the random model: one of `standin.SIZES`."""
    ragged: ragged.Setting = field(default_factory=ragged.Setting)
    prefix: prefix.Setting = field(default_factory=prefix.Setting)
    precision: precision.Setting = field(default_factory=precision.Setting)
    throughput: throughput.Setting = field(default_factory=throughput.Setting)


def run(setting: Setting, folder: Path, progress: Callable[[str], None], keep: Keep) -> list[Finding]:
    """Write the model into `folder` and measure. Raises StoppedError if a server or a request fails."""
    progress("writing a random model")
    model = folder / "model"
    standin.write_model(model, standin.default_dtype(), standin.SIZES[setting.size])
    mx.clear_cache()
    parts = {
        "ragged": lambda: ragged.run(setting.ragged, model, folder, progress),
        "prefix": lambda: prefix.run(setting.prefix, model, folder, progress),
        "precision": lambda: precision.run(setting.precision, model, progress),
        "throughput": lambda: throughput.run(setting.throughput, model, folder, progress),
    }
    return collect(parts, setting.parts, keep)
