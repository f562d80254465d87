"""The servers that benchmarks start: a model folder in, a ServerProcess out. All of them get the same BLAS."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from serve import device
from serve.bench.process import ServerProcess

PYTHON = (sys.executable, "-P", "-m")
"""-P: a folder named `serve` or `train` where the user stands is not imported."""
ADDRESS = ("--host", "127.0.0.1", "--port", "{port}")


def lathe(
    model: Path,
    log: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    settings: Mapping[str, object] | None = None,
) -> ServerProcess:
    """`lathe serve`. adapters: name → folder. settings: keys of the serving configuration."""
    words = [word for name, path in (adapters or {}).items() for word in ("--adapter", f"{name}={path}")]
    words += [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={value}")]
    return ServerProcess("lathe", [*PYTHON, "lathe", "serve", str(model), *words, *ADDRESS], log, _own_blas())


def mlx_lm(model: Path, log: Path) -> ServerProcess:
    """`mlx_lm.server`; its requests name `default_model`."""
    words = ["mlx_lm", "server", "--model", str(model), "--log-level", "WARNING"]
    return ServerProcess("mlx_lm.server", [*PYTHON, *words, *ADDRESS], log, _same_blas())


def mlx_vlm(model: Path, log: Path, *, cache_bytes: int = 0, position_bytes: int = 1) -> ServerProcess:
    """`mlx_vlm.server`; its requests name the folder.

    cache_bytes     what its prefix cache may hold in memory, 0 for none; nothing goes to the disk
    position_bytes  of one position's keys and values: the pool has blocks for all of `cache_bytes`, and some over
    """
    words = ["mlx_vlm.server", "--model", str(model)]
    cache = _apc(cache_bytes, position_bytes) if cache_bytes else {}
    return ServerProcess("mlx_vlm.server", [*PYTHON, *words, *ADDRESS], log, {**_same_blas(), **cache})


def _apc(cache_bytes: int, position_bytes: int, block_size: int = 16) -> dict[str, str]:
    """Its cache as its own variables set it: bytes bind, and not the pool, nor a reserve beside them."""
    return {
        "APC_ENABLED": "1",
        "APC_MEMORY_MAX_GB": repr(cache_bytes / 2**30),
        "APC_MEMORY_RESERVE_GB": "0",
        "APC_BLOCK_SIZE": str(block_size),
        "APC_NUM_BLOCKS": str(2 * cache_bytes // (block_size * position_bytes) + 1),
        "APC_DISK_ENABLED": "0",
    }


def _own_blas() -> dict[str, str]:
    """Lathe loads its BLAS itself."""
    return {"MLX_DISABLE_COMPILE": "1"} if _blas() else {}


def _same_blas() -> dict[str, str]:
    """The same, loaded for a server that does not."""
    library = _blas()
    return {"MLX_DISABLE_COMPILE": "1", "LD_PRELOAD": str(library)} if library else {}


def _blas() -> Path | None:
    return device.find_openblas() if device.needs_openblas() else None
