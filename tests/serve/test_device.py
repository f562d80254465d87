"""On CPU-only Linux, whatever of Lathe is imported first, mlx multiplies with OpenBLAS."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import device

ROOT = Path(__file__).resolve().parent.parent.parent
ASK = "; from serve import device; print(device.blas_library())"
RUN_A_COMMAND = """
import sys, lathe
sys.argv = ["lathe", "ab", "report", "nothing", "--store", "sqlite:////nowhere/at/all.sqlite"]
try:
    lathe.main()
except SystemExit:
    pass
"""

needs_openblas = pytest.mark.skipif(
    not device.needs_openblas() or device.find_openblas() is None,
    reason="not a CPU-only Linux machine with an OpenBLAS",
)


def blas_after(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@needs_openblas
@pytest.mark.parametrize(
    "first",
    [
        "import serve",
        "import train",
        "from serve.engine import request",
        "from train.data import example",
        "import lathe",
        RUN_A_COMMAND + "0",
    ],
)
def test_matmul_goes_to_openblas_whatever_is_imported_first(first):
    assert "openblas" in blas_after(first + ASK).lower()


@needs_openblas
def test_without_lathe_it_goes_to_the_reference_blas():
    """The law above says something only as long as this one holds."""
    load_device_alone = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('device', {device.__file__!r})\n"
        "device = sys.modules['device'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(device)\n"
        "print(device.blas_library())"
    )
    assert "openblas" not in blas_after(load_device_alone).lower()


@needs_openblas
def test_openblas_runs_the_kernels_and_threads_that_were_asked_for():
    """Of the library that answers MLX in this very process; `tests/kernels.py` asks for each in turn."""
    library = ctypes.CDLL(device.blas_library())
    library.openblas_get_corename.restype = ctypes.c_char_p
    kernel = library.openblas_get_corename().decode()
    threads = library.openblas_get_num_threads()
    assert kernel == os.environ.get("OPENBLAS_CORETYPE", kernel)
    assert threads == int(os.environ.get("OPENBLAS_NUM_THREADS", threads))


@needs_openblas
def test_preparing_twice_is_harmless():
    assert device.prepare() == device.prepare() == device.find_openblas()


def test_the_description_names_backend_memory_and_dtype_policy():
    found = device.describe()
    assert found.backend in ("metal", "cuda", "cpu")
    assert found.memory_bytes > 2**28
    assert found.mlx_version
    assert ("float32" in found.dtype_policy) == (found.backend == "cpu")


def test_matmul_rate_is_measured():
    assert device.matmul_gflops(size=128, repeats=1) > 0.01
