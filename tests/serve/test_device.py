"""On CPU-only Linux, whatever of Lathe is imported first, mlx multiplies with OpenBLAS."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
import weakref
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


FAULTS = """
import sys, threading
{first}
import mlx.core as mx, resource

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def forward():
    x = mx.zeros((2500, 4000))
    mx.eval([mx.softmax(x + i, axis=-1) for i in range(5)])

def measure():
    forward()
    before = pages()
    forward()
    print(pages() - before)

thread = threading.Thread(target=measure)
thread.start()
thread.join()
{last}
"""
A_PAGE = os.sysconf("SC_PAGE_SIZE")


def faults(first: str, last: str = "") -> list[int]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    script = FAULTS.format(first=first, last=last)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return [int(line) for line in done.stdout.splitlines()]


@needs_openblas
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left as it is")
def test_a_forward_reuses_the_memory_of_the_one_before_it_and_an_idle_process_gives_it_back():
    resident = "print(psutil.Process().memory_info().rss)"
    tidy = f"import psutil\n{resident}\ndevice.give_back_freed_memory()\n{resident}"
    kept, held, left = faults("import serve; from serve import device", tidy)
    [stock] = faults("")
    assert kept * A_PAGE < 40_000_000 < stock * A_PAGE, (
        "bytes that a second forward faults in: one array, and all"
    )
    assert held - left > 150_000_000


@needs_openblas
def test_an_environment_that_tunes_malloc_is_left_alone():
    script = "from serve import device; print(device.keep_freed_memory())"
    for name, value in (("MALLOC_TRIM_THRESHOLD_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, name: value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "False\n"


@needs_openblas
def test_a_systems_openblas_comes_before_opencvs_and_many_threads_before_one(tmp_path):
    one, many = tmp_path / "usr/local/lib/libopenblas.so.0", tmp_path / "usr/lib/libopenblasp.so.0"
    opencvs = device.openblas_files(tmp_path)
    assert all("opencv" in str(path) for path in opencvs)
    for path in (one, many):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert device.openblas_files(tmp_path) == [many, one, *opencvs]


@needs_openblas
def test_a_library_that_does_not_open_is_passed_by(tmp_path):
    broken = tmp_path / "libopenblas.so.0"
    broken.write_bytes(b"\x7fELF of another machine")
    works = device.find_openblas()
    assert device.first_that_opens([broken, works]) == works
    assert device.first_that_opens([broken]) is None


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


@pytest.mark.parametrize(
    ("backend", "setting", "is_single"),
    [
        ("cpu", None, True),
        ("metal", None, True),
        ("cuda", None, False),
        ("cuda", "1", False),
        ("cuda", "0", True),
    ],
)
def test_products_of_float32_have_its_digits_but_for_tf32(backend, setting, is_single, monkeypatch):
    import mlx.core as mx

    monkeypatch.setattr(device, "backend", lambda: backend)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if setting is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", setting)
    assert device.multiplies_in_single(mx.float32) is is_single
    assert device.product_eps(mx.float32) == (2.0**-23 if is_single else 2.0**-10)
    assert not device.multiplies_in_single(mx.bfloat16)


def test_what_was_set_aside_here_is_looked_through_as_a_model_leaves_and_set_aside_again(monkeypatch):
    class Model:
        """In a cycle, as models are."""

        def __init__(self) -> None:
            self.own = self

    monkeypatch.setattr(device, "_is_set_aside", False)
    model = Model()
    left = weakref.ref(model)
    gc.freeze()
    before = gc.get_freeze_count()
    del model
    device.give_back_all_memory(thaws=True)
    assert gc.get_freeze_count() >= before - 1, "a program's own"
    assert left() is not None
    device.set_aside()
    device.give_back_all_memory(thaws=True)
    assert left() is None
    assert gc.get_freeze_count() > before / 2
