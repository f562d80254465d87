"""The library that multiplies matrices on CPU-only Linux: found here, and loaded before mlx.

The mlx-cpu wheel links the reference BLAS, 60 times slower than others; what is loaded first with RTLD_GLOBAL
answers `cblas_sgemm` in its place. This module must not import mlx at its top, nor anything of Lathe's.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path

SYMBOL = "cblas_sgemm"
REFERENCE = "reference BLAS inside the mlx wheel"
CHOICE = "LATHE_BLAS"
"""Names a library's file, to be taken before all that are found."""
LAYER = "MKL_THREADING_LAYER"
THREADS = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


class _DlInfo(ctypes.Structure):
    """`Dl_info` of <dlfcn.h>."""

    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


@cache
def is_needed() -> bool:
    """True on Linux with MLX's CPU backend and no CUDA backend installed."""
    return sys.platform.startswith("linux") and not _has_cuda_backend()


def load() -> Path | None:
    """Let the best library there is answer for the reference BLAS; None where none was found.

    Raises OSError where LATHE_BLAS names one that does not open.
    """
    library = find()
    if library is not None:
        for path in (*_beside(library), library):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return library


def preloaded(library: Path) -> str:
    """What LD_PRELOAD is to say for a process that does not import Lathe."""
    return ":".join(str(path) for path in (*_beside(library), library))


@cache
def find() -> Path | None:
    """What LATHE_BLAS names; else the first one that opens: a 32-bit one, or half of an installation, does not."""
    chosen = os.environ.get(CHOICE)
    if chosen:
        try:
            _open(Path(chosen))
        except OSError as error:
            raise OSError(f"{CHOICE}: {chosen} cannot be loaded: {error}") from error
        return Path(chosen)
    return first_that_opens(files())


def files(root: Path = Path("/"), environments: Iterable[Path] | None = None) -> list[Path]:
    """Every BLAS with unprefixed symbols, the best first.

    Intel's MKL in a Python environment (the extra `mkl`) or of oneAPI: one token's products take a third of the time
    that they take with OpenBLAS. Then a system's OpenBLAS, the one of many threads before that of one; then
    opencv-python's own (a dependency of mlx-vlm), which is of 2021: products with adapters take twice the time of a
    system's of 2022.

    root          of the system
    environments  prefixes of Python environments; None: this one, and the user's own
    """
    if environments is None:
        environments = [Path(sysconfig.get_path("data")), Path(site.getuserbase())]
    inside = [prefix / "lib" for prefix in environments] + [root / "opt/intel/oneapi/mkl/latest/lib"]
    found = [path for folder in inside for path in sorted(folder.glob("libmkl_rt.so*"), reverse=True)[:1]]
    folders = [root / "usr/local/lib", root / "usr/lib64", root / "usr/lib"]
    if multiarch := sysconfig.get_config_var("MULTIARCH"):
        folders.insert(1, root / "usr/lib" / multiarch)
    found += [folder / name for name in ("libopenblasp.so.0", "libopenblas.so.0") for folder in folders]
    return [path for path in found if path.exists()] + _of_opencv()


def _of_opencv() -> list[Path]:
    spec = importlib.util.find_spec("cv2")
    if spec is None or spec.origin is None:
        return []
    packages = Path(spec.origin).parent.parent
    folders = [packages / name for name in ("opencv_python.libs", "opencv_python_headless.libs")]
    return [path for folder in folders for path in sorted(folder.glob("libopenblas*.so*"))]


def first_that_opens(libraries: Iterable[Path]) -> Path | None:
    """None where none of these does. Its symbols stay its own."""
    for path in libraries:
        with contextlib.suppress(OSError):
            _open(path)
            return path
    return None


def _open(library: Path) -> None:
    if is_mkl(library):
        prepare_mkl(len(os.sched_getaffinity(0)))
    for path in (*_beside(library), library):
        ctypes.CDLL(str(path))


def is_mkl(library: Path) -> bool:
    return library.name.startswith("libmkl_rt")


def _beside(library: Path) -> list[Path]:
    """What must be open before a library is. MKL ends the process at its first product where it finds no threads."""
    names = {"TBB": "libtbb.so.12", "INTEL": "libiomp5.so"} if is_mkl(library) else {}
    name = names.get(os.environ.get(LAYER, ""))
    return [library.parent / name] if name else []


def prepare_mkl(num_cores: int) -> None:
    """What MKL reads of the environment when it is loaded; what stands there stays.

    Threads of TBB, which leave the cores to others between two products (with OpenMP's a token takes half as long
    again). Where any BLAS's variable asks for fewer threads than cores, they are OpenMP's or none: TBB's are not
    counted. The same kernels in each run, whatever the addresses.
    """
    asked = next((os.environ[name] for name in THREADS if os.environ.get(name, "").isdigit()), "")
    if asked == "1":
        layer = "SEQUENTIAL"
    elif asked and int(asked) < num_cores:
        layer = "INTEL"
        os.environ.setdefault("MKL_NUM_THREADS", asked)
    else:
        layer = "TBB"
    os.environ.setdefault(LAYER, layer)
    os.environ.setdefault("MKL_CBWR", "AUTO")


def answering() -> str:
    """The file that answers `cblas_sgemm` in this process, once mlx is loaded."""
    if sys.platform == "darwin":
        return "Accelerate"
    import mlx.core as mx

    mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
    process = ctypes.CDLL(None)
    try:
        address = ctypes.cast(getattr(process, SYMBOL), ctypes.c_void_p)
    except AttributeError:
        return REFERENCE
    info = _DlInfo()
    process.dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    if not process.dladdr(address, ctypes.byref(info)) or not info.dli_fname:
        return "unknown"
    return str(info.dli_fname.decode())


def is_answering() -> bool:
    """The library that `find` finds multiplies in this process, or there is none."""
    library = find()
    return library is None or Path(answering()).resolve() == library.resolve()


def _has_cuda_backend() -> bool:
    spec = importlib.util.find_spec("mlx")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(root) / "lib" / "libmlx.so").exists() and _is_cuda_wheel(Path(root)) for root in roots)


def _is_cuda_wheel(root: Path) -> bool:
    """By the names of folders: to read what each of the packages there says of itself takes a tenth of a second."""
    return any(root.parent.glob("mlx_cuda*.dist-info"))
