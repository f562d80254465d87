"""On CPU-only Linux, whatever of Lathe is imported first, mlx multiplies with the best BLAS there is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import blas

ROOT = Path(__file__).resolve().parent.parent.parent
ASK = "; from serve import blas; print(blas.answering())"
RUN_A_COMMAND = """
import sys, lathe
sys.argv = ["lathe", "ab", "report", "nothing", "--store", "sqlite:////nowhere/at/all.sqlite"]
try:
    lathe.main()
except SystemExit:
    pass
"""
PRODUCTS = """
import serve, hashlib, mlx.core as mx, numpy as np
from serve import blas
kept = []
for rows, inputs, outputs in ((1, 512, 1536), (3, 512, 48), (74, 512, 1024), (600, 1536, 512), (8, 20000, 8)):
    x, w = (mx.random.normal((count, inputs), key=mx.random.key(count)) for count in (rows, outputs))
    exact = np.array(x).astype(np.float64) @ np.array(w).astype(np.float64).T
    found = set()
    for number in range(12):
        kept.append(mx.zeros((17 + 5 * number,)))
        product = (x + 0) @ (w + 0).T  # at other addresses
        mx.eval(product, kept)
        assert np.abs(np.array(product) - exact).max() < 1e-5 * inputs
        found.add(hashlib.sha256(np.array(product).tobytes()).hexdigest())
    assert len(found) == 1
"""


def openblas() -> Path | None:
    return blas.first_that_opens(path for path in blas.files() if not blas.is_mkl(path))


def mkl() -> Path | None:
    return next((path for path in blas.files() if blas.is_mkl(path)), None)


needs_openblas = pytest.mark.skipif(
    not blas.is_needed() or openblas() is None, reason="not a CPU-only Linux machine with an OpenBLAS"
)
needs_mkl = pytest.mark.skipif(not blas.is_needed() or mkl() is None, reason="the extra mkl is not installed")


def told(script: str, **environment: str) -> str:
    """The last line that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
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
def test_matmul_goes_there_whatever_is_imported_first(first):
    assert Path(told(first + ASK)).resolve() == blas.find().resolve()


@needs_openblas
def test_without_lathe_it_goes_to_the_reference_blas():
    """The law above says something only as long as this one holds."""
    load_it_alone = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('blas', {blas.__file__!r})\n"
        "blas = sys.modules['blas'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(blas)\n"
        "print(blas.answering(), blas.is_answering())"
    )
    assert told(load_it_alone).endswith(" False")


@needs_openblas
def test_openblas_runs_the_kernels_and_threads_that_were_asked_for():
    """Of the library that answers MLX in this very process; `tests/kernels.py` asks for each in turn."""
    if blas.is_mkl(blas.find()):
        pytest.skip("MKL has no such names")
    library = ctypes.CDLL(blas.answering())
    library.openblas_get_corename.restype = ctypes.c_char_p
    kernel = library.openblas_get_corename().decode()
    threads = library.openblas_get_num_threads()
    assert kernel == os.environ.get("OPENBLAS_CORETYPE", kernel)
    assert threads == int(os.environ.get("OPENBLAS_NUM_THREADS", threads))


def test_mkl_comes_before_a_systems_openblas_that_before_opencvs_and_many_threads_before_one(tmp_path):
    one, many = tmp_path / "usr/local/lib/libopenblas.so.0", tmp_path / "usr/lib/libopenblasp.so.0"
    old, new = (tmp_path / f"venv/lib/libmkl_rt.so.{number}" for number in (2, 3))
    oneapi = tmp_path / "opt/intel/oneapi/mkl/latest/lib/libmkl_rt.so"
    environments = [tmp_path / "venv", tmp_path / "nowhere"]
    opencvs = blas.files(tmp_path, environments)
    assert all("opencv" in str(path) for path in opencvs)
    for path in (one, many, old, new, oneapi):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert blas.files(tmp_path, environments) == [new, oneapi, many, one, *opencvs]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="on Linux alone")
@pytest.mark.parametrize(
    ("beside", "is_needed"), [((), True), (("mlx_cpu",), True), (("mlx_cpu", "mlx_cuda_13"), False)]
)
def test_a_cuda_backend_is_known_by_its_wheels_folder(tmp_path, beside, is_needed):
    for name in ("mlx/lib", *(f"{each}-0.32.4.dist-info" for each in beside)):
        (tmp_path / name).mkdir(parents=True)
    for name in ("mlx/__init__.py", "mlx/lib/libmlx.so"):
        (tmp_path / name).touch()
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    assert told(f"{first}from serve import blas; print(blas.is_needed())") == str(is_needed)


@needs_openblas
def test_a_library_that_does_not_open_is_passed_by(tmp_path):
    broken = tmp_path / "libopenblas.so.0"
    broken.write_bytes(b"\x7fELF of another machine")
    works = openblas()
    assert blas.first_that_opens([broken, works]) == works
    assert blas.first_that_opens([broken]) is None


@needs_openblas
def test_one_may_be_chosen_and_one_that_does_not_open_is_refused_by_name():
    worst = blas.files()[-1]
    assert Path(told("import serve" + ASK, LATHE_BLAS=str(worst))).resolve() == worst.resolve()
    done = subprocess.run(
        [sys.executable, "-m", "lathe", "doctor"],
        cwd=ROOT,
        env={**os.environ, "LATHE_BLAS": "/nowhere/libblas.so"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: LATHE_BLAS: /nowhere/libblas.so cannot be loaded")


@pytest.mark.parametrize(
    ("environment", "layer"),
    [
        ({}, "TBB"),
        ({"OPENBLAS_NUM_THREADS": "1"}, "SEQUENTIAL"),
        ({"MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}, "INTEL"),
        ({"OMP_NUM_THREADS": "3"}, "INTEL"),
        ({"OMP_NUM_THREADS": "4"}, "TBB"),
        ({"OMP_NUM_THREADS": "1", "MKL_THREADING_LAYER": "GNU"}, "GNU"),
    ],
    ids=str,
)
def test_mkls_threads_are_as_many_as_any_of_the_variables_says(environment, layer, monkeypatch):
    for name in (*blas.THREADS, "MKL_THREADING_LAYER", "MKL_CBWR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    blas.prepare_mkl(num_cores=4)
    assert os.environ["MKL_THREADING_LAYER"] == layer
    assert os.environ["MKL_CBWR"] == "AUTO"
    if layer == "INTEL":
        assert os.environ["MKL_NUM_THREADS"] == next(iter(environment.values()))


@needs_mkl
def test_mkl_without_its_threads_is_passed_by(tmp_path):
    copy = tmp_path / mkl().name
    copy.symlink_to(mkl())
    ask = f"from pathlib import Path; from serve import blas; print(blas.first_that_opens([Path('{copy}')]))"
    assert told(ask, OPENBLAS_NUM_THREADS="") == "None"


@needs_mkl
@pytest.mark.parametrize("threads", ["1", "2", ""])
def test_mkl_answers_where_it_is_installed_and_says_the_same_each_time(threads):
    library = told(PRODUCTS + "print(blas.answering())", OPENBLAS_NUM_THREADS=threads, LATHE_BLAS="")
    assert Path(library).resolve() == mkl().resolve()
