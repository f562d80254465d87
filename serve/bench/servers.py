"""The servers that benchmarks start: a model folder in, a ServerProcess out. All of them get the same BLAS."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve import blas
from serve.bench.process import ServerProcess

PYTHON = (sys.executable, "-P", "-m")
"""-P: a folder named `serve` or `train` where the user stands is not imported."""
ADDRESS = ("--host", "127.0.0.1", "--port", "{port}")


def lathe(
    model: Path | str,
    log: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    settings: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
) -> ServerProcess:
    """`lathe serve`. adapters: name → folder. settings: keys of the serving configuration; overrides: more of them,
    as KEY=VALUE."""
    words = [word for name, path in (adapters or {}).items() for word in ("--adapter", f"{name}={path}")]
    words += [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={value}")]
    words += [word for each in overrides for word in ("--set", each)]
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


@dataclass(frozen=True)
class Peer:
    """Another project's server that is compared where it is installed: what starts it, and what its requests name.

    Its words may hold {model}, the folder, and {port}. It is ready once /health answers 200.
    """

    label: str
    words: tuple[str, ...]
    served_name: str


VLLM_MLX = Peer(
    "vllm-mlx",
    (
        "serve",
        "{model}",
        "--served-model-name",
        "standin",
        "--continuous-batching",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ),
    "standin",
)


def peer(asked: Peer, executable: str, model: Path, log: Path) -> ServerProcess:
    """A peer's server. Its home is the log's folder: what it keeps there between runs would tell two runs apart."""
    words = [executable, *(word.replace("{model}", str(model.absolute())) for word in asked.words)]
    return ServerProcess(asked.label, words, log, {**_same_blas(), "HOME": str(log.parent.absolute())})


def find_vllm_mlx() -> str | None:
    """Its executable, beside this Python or on PATH; None where it is not installed."""
    return shutil.which("vllm-mlx", path=str(Path(sys.executable).parent)) or shutil.which("vllm-mlx")


def bare_environment() -> dict[str, str]:
    """What a process of our own is told that runs mlx-lm without a server."""
    return _own_blas()


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
    return {"MLX_DISABLE_COMPILE": "1", "LD_PRELOAD": blas.preloaded(library)} if library else {}


def _blas() -> Path | None:
    return blas.find() if blas.is_needed() else None
