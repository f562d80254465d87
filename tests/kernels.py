"""The laws about floats, once for each matrix kernel that OpenBLAS has for other machines than this one.

.venv/bin/python tests/kernels.py [--kernels Haswell Zen …] [--threads 1 2] [-- files and options of pytest]

A kernel cannot be told to another machine, but most of them run on this one: what holds under all of them rests on no
machine's rounding. `tests/serve/test_device.py`, run with each, checks that the kernel is the one that was asked for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests/ holds a folder `serve` too

from serve import blas  # noqa: E402

KERNELS = ("Haswell", "Zen", "Sandybridge", "Nehalem")
THREADS = (1, 2)
CHECK = "tests/serve/test_device.py::test_openblas_runs_the_kernels_and_threads_that_were_asked_for"
SERVE = (
    "adapters",
    "api_generation",
    "bank",
    "engine",
    "engine_traffic",
    "families",
    "recurrent",
    "sampler",
    "worker",
)
TRAIN = (
    "adapt",
    "checkpoint",
    "evaluate",
    "export",
    "families",
    "handover",
    "loss",
    "methods",
    "mlx_lm",
    "objectives",
)
TRAIN += ("optim", "packing", "quantize", "rollouts", "trainer")
LAWS = [f"tests/serve/test_{name}.py" for name in SERVE] + [f"tests/train/test_{name}.py" for name in TRAIN]


def openblas() -> Path | None:
    """The one that computes here, or would without MKL."""
    return (
        blas.first_that_opens(path for path in blas.files() if not blas.is_mkl(path))
        if blas.is_needed()
        else None
    )


def run(kernel: str, threads: int, words: list[str]) -> int:
    """pytest's exit status under one kernel."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": str(threads)}
    environment[blas.CHOICE] = str(openblas())
    command = [sys.executable, "-m", "pytest", "-m", "not large", "-n", "2", "--dist", "loadfile"]
    start_s = time.monotonic()
    status = subprocess.run([*command, *words], cwd=ROOT, env=environment, check=False).returncode
    print(
        f"{'ok' if status == 0 else 'FAILED'}: {kernel}, threads: {threads}, {time.monotonic() - start_s:.0f} s"
    )
    sys.stdout.flush()
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", default=KERNELS)
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("words", nargs="*", help="what pytest runs instead of the laws")
    asked = parser.parse_args()
    if openblas() is None:
        print("no OpenBLAS computes here: there are no other kernels to choose from")
        return 2
    words = [CHECK, *(asked.words or LAWS)]
    failed = [(k, t) for k in asked.kernels for t in asked.threads if run(k, t, words)]
    print("failed under: " + ", ".join(f"{k} with {t}" for k, t in failed) if failed else "all kernels agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
