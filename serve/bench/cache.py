"""`lathe bench cache`: what the server's memory is asked to do, part by part, on a random model. Lathe alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.bench import precision, prefix, ragged, standin, throughput
from serve.bench.about import about
from serve.bench.finding import Finding

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


def run(
    setting: Setting,
    folder: Path,
    progress: Callable[[str], None],
    keep: Callable[[list[Finding]], None],
) -> list[Finding]:
    """Write the model into `folder` and measure. Raises StoppedError if a server or a request fails.

    `keep` is given what is known so far after each part, so a run cut off has told it.
    """
    progress("writing a random model")
    model = folder / "model"
    standin.write_model(model, standin.default_dtype(), standin.SIZES[setting.size])
    mx.clear_cache()
    parts: Mapping[str, Callable[[], list[Finding]]] = {
        "ragged": lambda: ragged.run(setting.ragged, model, folder, progress),
        "prefix": lambda: prefix.run(setting.prefix, model, folder, progress),
        "precision": lambda: precision.run(setting.precision, model, progress),
        "throughput": lambda: throughput.run(setting.throughput, model, folder, progress),
    }
    findings: list[Finding] = []
    for part in setting.parts:
        findings += parts[part]()
        keep(findings)
    return findings


def as_json(setting: Setting, findings: list[Finding]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {**about(), "settings": asdict(setting), "findings": [each.as_json() for each in findings]}
