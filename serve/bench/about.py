"""What every result says of where it was measured: the machine, and the versions of what ran."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Any

from serve import device

PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "mlx-lathe")


def about() -> dict[str, Any]:
    """For the head of a JSON file."""
    return {
        "machine": asdict(device.describe()),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
