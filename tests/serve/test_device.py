"""What machine this is: memory that is kept and given back, and what is measured of it."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from serve import blas, device

ROOT = Path(__file__).resolve().parent.parent.parent
needs_blas = pytest.mark.skipif(
    not blas.is_needed() or blas.find() is None, reason="not a CPU-only Linux machine with a BLAS"
)

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


@needs_blas
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left as it is")
def test_a_forward_reuses_the_memory_of_the_one_before_it_and_an_idle_process_gives_it_back():
    resident = "print(psutil.Process().memory_info().rss)"
    tidy = f"import psutil\n{resident}\ndevice.give_back_freed_memory()\n{resident}"
    kept, held, left = faults("import serve; from serve import device", tidy)
    [stock] = faults("")
    assert kept * A_PAGE < 60_000_000 < stock * A_PAGE, (
        "bytes that a second forward faults in: one array of 40 MB, give or take a page, and all"
    )
    assert held - left > 150_000_000


@needs_blas
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


@needs_blas
def test_preparing_twice_is_harmless():
    assert device.prepare() == device.prepare() == blas.find()


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
    assert gc.get_freeze_count() > before / 2, "a program's own"
    assert left() is not None
    device.set_aside()
    device.give_back_all_memory(thaws=True)
    assert left() is None
    assert gc.get_freeze_count() > before / 2
