"""What machine this is, and what MLX needs before it is imported there.

`prepare()` runs on import of `serve`. It acts on CPU-only Linux alone. This module must not import mlx at its top.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from serve import blas

TF32_EPS = 2.0**-10

# Of <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
NEVER = -1
GROWTH_BYTES = 64 << 20
MMAP_BYTES = (1 << 30, 32 << 20)
"""Larger blocks are mapped one by one. Tried in this order: a glibc before 2.35 takes no more than the last."""


@dataclass(frozen=True)
class Device:
    """The machine as `lathe doctor` prints it. Memory in bytes."""

    system: str
    machine: str
    backend: str  # metal | cuda | cpu
    chip: str
    memory_bytes: int
    gpu_memory_bytes: int | None
    mlx_version: str
    blas: str
    dtype_policy: str


def prepare() -> Path | None:
    """Give CPU-only Linux a real BLAS, a heap that keeps what is freed, and no C++ compiler runs of mx.compile.

    Returns the library that was loaded, or None where nothing had to be done or none was found.
    Safe to call again. Once libmlx has resolved its BLAS a later call cannot change it, so `serve` calls
    this before anything in Lathe imports mlx.
    """
    if not blas.is_needed():
        return None
    # mx.compile on CPU runs g++ for each fused kernel: seconds per model, and no faster afterwards.
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
    keep_freed_memory()
    return blas.load()


@cache
def keep_freed_memory() -> bool:
    """Let freed arrays' memory wait for the next ones; true where the C library can be told so (glibc).

    MLX's CPU backend has no cache of its own: it gives every array back to malloc, which gives large ones back to
    the system, and each of their pages is faulted in anew in the next layer: a tenth of a prefill's time.
    Does nothing where the environment tunes malloc itself.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_tuned = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    if is_tuned or not blas.is_needed():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # One heap: those of other threads come and go in pieces of 64 MiB. Python's own small objects are not in it.
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    mallopt(M_TOP_PAD, GROWTH_BYTES)
    return any(mallopt(M_MMAP_THRESHOLD, num_bytes) for num_bytes in MMAP_BYTES)


def give_back_freed_memory() -> None:
    """Give the system what `keep_freed_memory` has kept: for when nothing is computed for a while."""
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)


_is_set_aside = False


def set_aside() -> None:
    """Leave what there is out of collections."""
    global _is_set_aside
    gc.collect()
    gc.freeze()
    _is_set_aside = True


def give_back_all_memory(*, thaws: bool = False) -> None:
    """Give the system what nothing refers to any more, be it in cycles, and what MLX has kept of it: for when a model
    has left.

    thaws  it may be among what was set aside here, of which the rest is set aside again; where nothing was, what a
           program around this has set aside stays so
    """
    import mlx.core as mx

    if thaws and _is_set_aside:
        gc.unfreeze()
        set_aside()
    else:
        gc.collect()
    mx.clear_cache()
    give_back_freed_memory()


def backend() -> str:
    """`metal`, `cuda` or `cpu`: where MLX's default device computes."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def compute_dtype(stored: str) -> str:
    """The dtype a model stored as `stored` computes in here: float32 on CPU, as stored elsewhere.

    On CPU, bf16 and fp16 matmuls run 60 times slower than float32, and quantized ones 100 times.
    """
    return "float32" if backend() == "cpu" else stored


def product_eps(dtype: Any) -> float:
    """By how much, relatively, products of matrices of this mlx dtype are rounded here.

    MLX's CUDA backend multiplies float32 as TF32, which keeps 10 bits of it, unless MLX_ENABLE_TF32 is 0.
    """
    import mlx.core as mx

    is_tf32 = backend() == "cuda" and os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    return TF32_EPS if dtype == mx.float32 and is_tf32 else float(mx.finfo(dtype).eps)


def multiplies_in_single(dtype: Any) -> bool:
    """Whether products of this mlx dtype keep the digits of float32 here."""
    return product_eps(dtype) < TF32_EPS


def free_memory_bytes() -> int:
    """Memory that arrays may still take on the default device."""
    import mlx.core as mx
    import psutil

    if backend() == "cpu":
        return int(psutil.virtual_memory().available)
    info = mx.device_info()
    total = (
        info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
    )
    return max(int(total or psutil.virtual_memory().available) - mx.get_active_memory(), 0)


def free_host_bytes() -> int:
    """Memory that this process may still take beside the device's."""
    import psutil

    return int(psutil.virtual_memory().available)


def matmul_gflops(size: int = 1024, repeats: int = 3) -> float:
    """Measured float32 matmul rate of the default device, best of `repeats`, in GFLOP/s."""
    import mlx.core as mx

    a = mx.random.normal((size, size))
    b = mx.random.normal((size, size))
    mx.eval(a, b)
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        mx.eval(a @ b)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s / 1e9


def weights_gb_s(mib: int = 256, repeats: int = 3) -> float:
    """Measured rate at which one token's product reads float32 weights, best of `repeats`, in 10^9 bytes a second.

    That is what bounds a single stream: it reads all weights for each token.
    """
    import mlx.core as mx

    num_inputs = 4096
    weights = mx.random.normal((mib * 2**20 // 4 // num_inputs, num_inputs))
    token = mx.random.normal((1, num_inputs))
    mx.eval(weights, token, token @ weights.T)
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        mx.eval(token @ weights.T)
        best_s = min(best_s, time.perf_counter() - start_s)
    return mib * 2**20 / best_s / 1e9


def describe() -> Device:
    """Everything `lathe doctor` prints about the machine."""
    import mlx.core as mx
    import psutil

    kind = backend()
    info = mx.device_info() if kind != "cpu" else {}
    gpu_memory = info.get("memory_size") or info.get("total_memory")
    return Device(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        backend=kind,
        chip=str(info.get("device_name") or _cpu_name()),
        memory_bytes=int(psutil.virtual_memory().total),
        gpu_memory_bytes=int(gpu_memory) if gpu_memory else None,
        mlx_version=metadata.version("mlx"),
        blas=blas.answering() if kind == "cpu" else "not used",
        dtype_policy="float32, quantized weights dequantized at load" if kind == "cpu" else "as stored",
    )


def _cpu_name() -> str:
    if sys.platform == "darwin":
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
