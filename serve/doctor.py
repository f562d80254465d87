"""`lathe doctor`: what this machine is, how fast its matmul is and why, which packages there are, what is missing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from serve import blas, device, hardware
from serve.tables import Table, words
from serve.tables import show as show_tables

PACKAGES = (
    "mlx-lathe",
    "mlx",
    "mlx-cpu",
    "mlx-cuda-13",
    "mlx-lm",
    "mlx-vlm",
    "transformers",
    "tokenizers",
    "fastapi",
    "openai",
)
OPTIONAL = frozenset({"mlx-cpu", "mlx-cuda-13", "openai"})
FAST_SIZE, SLOW_SIZE = 1024, 384
"""Side of the square matmuls; the reference BLAS would need a second for each 1024 one."""
SLOW_BLAS_GFLOPS = 10.0

REFERENCE_SCRIPT = f"""
import sys, time
import mlx.core as mx
a = mx.random.normal(({SLOW_SIZE}, {SLOW_SIZE})); mx.eval(a, a @ a)
best = float("inf")
for _ in range(3):
    start = time.perf_counter(); mx.eval(a @ a); best = min(best, time.perf_counter() - start)
print(2 * {SLOW_SIZE}**3 / best / 1e9)
"""
"""Run without `serve`, so with whatever BLAS the mlx wheel links."""


@dataclass(frozen=True)
class Finding:
    """Something missing or wrong, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `lathe doctor` prints. Rates in GFLOP/s of float32 matmul."""

    device: device.Device
    matmul_gflops: float
    reference_gflops: float | None
    """What mlx reaches here without Lathe's set-up; None where Lathe changes nothing."""
    weights_gb_s: float
    """At which one token's product reads weights, in 10^9 bytes a second."""
    hardware: hardware.Hardware
    packages: dict[str, str | None]
    embedded_model: str | None
    findings: tuple[Finding, ...]

    @property
    def gain(self) -> float | None:
        """How many times faster matmul is for Lathe's set-up."""
        return self.matmul_gflops / self.reference_gflops if self.reference_gflops else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain, "python": sys.version.split()[0]}


def diagnose(embedded_model: Path) -> Diagnosis:
    """Measure this machine. `embedded_model` is the folder the demo uses."""
    described = device.describe()
    rate = device.matmul_gflops(FAST_SIZE)
    reference = _reference_gflops() if blas.is_needed() else None
    packages = {name: _version(name) for name in PACKAGES}
    has_model = (embedded_model / "config.json").exists() and any(embedded_model.glob("*.safetensors"))
    findings = [*_blas_findings(rate), *_kernel_findings(), *_package_findings(packages)]
    if not has_model:
        findings.append(
            Finding(
                f"no embedded model in {embedded_model}",
                "`lathe demo` needs it: run from a checkout of the project",
            )
        )
    return Diagnosis(
        device=described,
        matmul_gflops=rate,
        reference_gflops=reference,
        weights_gb_s=device.weights_gb_s(),
        hardware=hardware.describe(),
        packages=packages,
        embedded_model=str(embedded_model) if has_model else None,
        findings=tuple(findings),
    )


def _reference_gflops() -> float | None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", REFERENCE_SCRIPT], capture_output=True, text=True, check=False
    )
    return float(done.stdout) if done.returncode == 0 else None


def _blas_findings(rate: float) -> list[Finding]:
    if not blas.is_needed():
        return []
    library = blas.find()
    if library is None:
        return [
            Finding(
                "no OpenBLAS found: matmul runs on the reference BLAS, about 60 times slower",
                "install one: `apt install libopenblas0`, `dnf install openblas`, or `pip install opencv-python`",
            )
        ]
    if rate < SLOW_BLAS_GFLOPS:
        return [
            Finding(
                f"{library.name} was found, yet matmul reaches {rate:.1f} GFLOP/s",
                "something imported mlx before serve; import serve first, or set LD_PRELOAD to "
                f"{blas.preloaded(library)}",
            )
        ]
    return []


def _kernel_findings() -> list[Finding]:
    """MLX compiles kernels for NVIDIA GPUs as they are needed, from headers that other packages bring."""
    import mlx.core as mx

    weight, scales, biases = mx.quantize(mx.ones((64, 64)), bits=4)
    try:
        mx.eval(mx.quantized_matmul(mx.ones((16, 64)), weight, scales, biases, bits=4))
    except RuntimeError as error:
        if "Failed to compile kernel" not in str(error) and "CUDA headers" not in str(error):
            raise
        return [
            Finding(
                f"quantized models cannot run: {str(error).splitlines()[0]}",
                "`pip install 'nvidia-cuda-crt==13.*'`, as `make venv` does; MLX reads the headers of NVIDIA's "
                "Python packages where there are any, and CUDA_HOME's only where there are none",
            )
        ]
    return []


def _package_findings(packages: dict[str, str | None]) -> list[Finding]:
    return [
        Finding(f"{name} is not installed", "run `make venv`, or `pip install -e .`")
        for name, version in packages.items()
        if version is None and name not in OPTIONAL
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def show(found: Diagnosis, console: Console) -> None:
    """Print the diagnosis."""
    machine, made_of = found.device, found.hardware
    drawn = Table("what", words("found"), has_headings=False)
    rows = {
        "machine": f"{machine.system}, {machine.machine}",
        "model": made_of.model,
        "chip": machine.chip if machine.chip == made_of.chip else f"{machine.chip}, {made_of.chip}",
        "cores": _cores_line(made_of),
        "memory": _memory_line(machine.memory_bytes, made_of),
        **_gpu_lines(made_of),
        "GPU memory": _gib(machine.gpu_memory_bytes) if machine.gpu_memory_bytes else None,
        "MLX": f"{machine.mlx_version}, {machine.backend} backend",
        "BLAS": machine.blas,
        "matmul": _rate_line(found),
        "weights are read": f"at {found.weights_gb_s:.1f} GB/s by one token's product, which bounds a stream",
        "computes in": machine.dtype_policy,
        "Python": sys.version.split()[0],
        "packages": ", ".join(f"{name} {version}" for name, version in found.packages.items() if version),
        "embedded model": found.embedded_model or "missing",
    }
    for name, value in rows.items():
        if value is not None:
            drawn.add(Text(name, style="bold"), value)
    problems = [Text(f"{each.what}\n  {each.remedy}", style="yellow") for each in found.findings]
    show_tables(console, drawn, *(problems or [Text("Nothing is missing.", style="green")]))


def _cores_line(made_of: hardware.Hardware) -> str | None:
    if made_of.cores is None and made_of.threads is None:
        return None
    kinds = " and ".join(f"{count} {name}" for name, count in made_of.core_kinds)
    parts = [f"{made_of.cores}" if made_of.cores is not None else ""]
    parts[0] += f" ({kinds})" if kinds else ""
    if made_of.threads not in (None, made_of.cores):
        parts.append(f"{made_of.threads} threads")
    if made_of.usable_cpus is not None:
        parts.append(f"{made_of.usable_cpus} of them for this process")
    return ", ".join(part for part in parts if part)


def _memory_line(memory_bytes: int, made_of: hardware.Hardware) -> str:
    parts = [_gib(memory_bytes)]
    if made_of.memory_limit_bytes is not None:
        parts.append(f"{_gib(made_of.memory_limit_bytes)} of them for this container")
    if made_of.bandwidth_gb_s is not None:
        parts.append(f"{made_of.bandwidth_gb_s:g} GB/s by its maker")
    return ", ".join(parts)


def _gpu_lines(made_of: hardware.Hardware) -> dict[str, str]:
    """A row a GPU, as they are numbered."""
    rows = {}
    for number, gpu in enumerate(made_of.gpus):
        parts = [
            gpu.name,
            f"{gpu.cores} cores" if gpu.cores else "",
            _gib(gpu.memory_bytes) if gpu.memory_bytes else "",
            f"{gpu.bandwidth_gb_s:,.0f} GB/s by its maker" if gpu.bandwidth_gb_s else "",
            gpu.capability or "",
            f"driver {gpu.driver}" if gpu.driver else "",
        ]
        rows["GPU" if len(made_of.gpus) == 1 else f"GPU {number}"] = ", ".join(filter(None, parts))
    return rows


def _rate_line(found: Diagnosis) -> str:
    line = f"{found.matmul_gflops:.1f} GFLOP/s in float32 ({FAST_SIZE} x {FAST_SIZE})"
    if found.reference_gflops is None or found.gain is None:
        return line
    return f"{line}, {found.gain:.0f} times the {found.reference_gflops:.1f} GFLOP/s of mlx by itself"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
