"""What this machine is made of: chip, cores, memory and how fast it is read, GPUs. Imports no mlx.

A Mac is asked by `sysctl` and `system_profiler`, Linux by /proc, an NVIDIA GPU by `nvidia-smi` and its driver. What
the machine does not say is None, never a guess. Each text is read by a function of its own, which knows no machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MAC_BANDWIDTH_GB_S: Mapping[str, float] = {
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": 300,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 410,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": 460,
}
"""Of unified memory, as Apple gives it; of chips sold with two GPUs, with the smaller one."""
WITH_MORE_GPU_CORES: Mapping[str, tuple[int, float]] = {
    "M3 Max": (40, 400),
    "M4 Max": (40, 546),
    "M5 Max": (40, 614),
}
"""From so many GPU cores on, the other."""
SYSCTL_KEYS = ("machdep.cpu.brand_string", "hw")
PROFILER_TYPES = ("SPHardwareDataType", "SPDisplaysDataType")
NVIDIA_FIELDS = ("name", "memory.total", "driver_version", "compute_cap")
NVIDIA_MULTIPROCESSORS, NVIDIA_MEMORY_KHZ, NVIDIA_BUS_BITS = 16, 36, 37
"""Attributes of a device, as cuda.h numbers them."""
CGROUP = Path("/sys/fs/cgroup")
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Gpu:
    """One GPU. A Mac's has the machine's memory."""

    name: str
    cores: int | None = None
    """Apple's GPU cores, or NVIDIA's multiprocessors."""
    memory_bytes: int | None = None
    bandwidth_gb_s: float | None = None
    driver: str | None = None
    capability: str | None = None
    """What it can be asked for: Metal's family, or CUDA's compute capability."""


@dataclass(frozen=True)
class Hardware:
    """A machine. Bandwidth in 10^9 bytes a second, as makers give it."""

    chip: str
    model: str | None = None
    cores: int | None = None
    """Physical ones."""
    core_kinds: tuple[tuple[str, int], ...] = ()
    """Where there are several, the fastest first."""
    threads: int | None = None
    usable_cpus: int | None = None
    """Threads that this process may keep busy, where that is fewer."""
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    """What a container may take of it."""
    bandwidth_gb_s: float | None = None
    gpus: tuple[Gpu, ...] = ()


def describe() -> Hardware:
    """This machine. Takes a second or two on a Mac."""
    if sys.platform == "darwin":
        # By their places: a PATH of cron or launchd may lack /usr/sbin.
        sysctl = _output("/usr/sbin/sysctl", *SYSCTL_KEYS)
        profiler = _output("/usr/sbin/system_profiler", "-json", "-detailLevel", "mini", *PROFILER_TYPES)
        return of_mac(sysctl, profiler)
    found = of_linux(_text("/proc/cpuinfo"), _text("/proc/meminfo"))
    if not found.chip:
        found = replace(found, chip=of_lscpu(_output("lscpu")) or platform.processor() or platform.machine())
    usable = _usable_cpus()
    listed = of_nvidia_smi(
        _output("nvidia-smi", f"--query-gpu={','.join(NVIDIA_FIELDS)}", "--format=csv,noheader,nounits")
    )
    return replace(
        found,
        usable_cpus=usable if usable != found.threads else None,
        memory_limit_bytes=limit_of(_text(CGROUP / "memory.max"), found.memory_bytes),
        gpus=with_driver(listed, _nvidia_attributes()) if listed else (),
    )


def of_mac(sysctl: str, profiler: str) -> Hardware:
    """What `sysctl machdep.cpu.brand_string hw` and `system_profiler -json` of PROFILER_TYPES print.

    Either may be empty: in a sandbox, or of a system that knows some name no more.
    """
    told = parse_sysctl(sysctl)
    report = _json(profiler)
    machine = _first(report.get("SPHardwareDataType"))
    gpus = tuple(
        Gpu(
            name=str(each.get("sppci_model") or each.get("_name") or "GPU"),
            cores=_whole(each.get("sppci_cores")),
            capability=_metal(each.get("spdisplays_mtlgpufamilysupport") or each.get("spdisplays_metal")),
        )
        for each in report.get("SPDisplaysDataType") or ()
        if isinstance(each, dict)
    )
    chip = told.get("machdep.cpu.brand_string") or str(
        machine.get("chip_type") or machine.get("cpu_type") or ""
    )
    names = [machine.get("machine_name"), machine.get("machine_model") or told.get("hw.model")]
    bandwidth = mac_bandwidth(chip, next((gpu.cores for gpu in gpus if gpu.cores), None))
    return Hardware(
        chip=chip or platform.processor(),
        model=", ".join(str(name) for name in names if name) or None,
        cores=_whole(told.get("hw.physicalcpu")),
        core_kinds=_core_kinds(told),
        threads=_whole(told.get("hw.logicalcpu")),
        memory_bytes=_whole(told.get("hw.memsize")),
        bandwidth_gb_s=bandwidth,
        gpus=gpus,
    )


def parse_sysctl(text: str) -> dict[str, str]:
    """'hw.memsize: 8589934592' lines -> values by name."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def mac_bandwidth(chip: str, gpu_cores: int | None) -> float | None:
    """Of a chip as `sysctl` calls it ('Apple M4 Max'). None for one that is not known here."""
    name = chip.removeprefix("Apple ").strip()
    from_cores, wide = WITH_MORE_GPU_CORES.get(name, (0, 0.0))
    if not from_cores:
        return MAC_BANDWIDTH_GB_S.get(name)
    if gpu_cores is None:
        return None
    return wide if gpu_cores >= from_cores else MAC_BANDWIDTH_GB_S[name]


def _core_kinds(told: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """Levels of performance, the fastest first; levels of one name are one kind."""
    kinds: dict[str, int] = {}
    for level in range(_whole(told.get("hw.nperflevels")) or 0):
        name = told.get(f"hw.perflevel{level}.name") or f"level {level}"
        count = _whole(told.get(f"hw.perflevel{level}.physicalcpu"))
        if count:
            kinds[name.lower()] = kinds.get(name.lower(), 0) + count
    return tuple(kinds.items())


def _metal(word: object) -> str | None:
    """'spdisplays_metal3' -> 'Metal 3'."""
    found = re.search(r"metal(\d*)", str(word or ""), re.IGNORECASE)
    return f"Metal {found[1]}".strip() if found else None


def of_linux(cpuinfo: str, meminfo: str) -> Hardware:
    """What /proc/cpuinfo and /proc/meminfo hold. The chip is empty where they do not name it (64-bit ARM)."""
    processors = [_fields(block) for block in re.split(r"\n\s*\n", cpuinfo) if "processor" in block]
    names = [each[key] for each in processors for key in ("model name", "cpu model") if each.get(key)]
    places = {(each.get("physical id"), each["core id"]) for each in processors if "core id" in each}
    board = _fields(cpuinfo)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return Hardware(
        chip=names[0] if names else "",
        model=board.get("Model"),
        cores=len(places) or None,
        threads=len(processors) or None,
        memory_bytes=int(memory[1]) * 1024 if memory else None,
    )


def of_lscpu(text: str) -> str | None:
    """The chip's name. None where it has none either ('-')."""
    name = _fields(text).get("Model name", "")
    return None if name in ("", "-") else name


def limit_of(memory_max: str, memory_bytes: int | None) -> int | None:
    """A control group's memory.max; None where it bounds nothing."""
    limit = _whole(memory_max.strip())
    return limit if limit and (memory_bytes is None or limit < memory_bytes) else None


def quota_of(cpu_max: str) -> int | None:
    """CPUs that a control group's cpu.max ('150000 100000') amounts to, at least one; None: it bounds nothing."""
    quota, _, period = cpu_max.strip().partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return max(1, round(int(quota) / int(period)))


def of_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """A line a GPU, with NVIDIA_FIELDS, memory in MiB. A field that a driver does not know is '[N/A]' or the like."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(NVIDIA_FIELDS):
            continue
        name, memory, driver, capability = (None if cell.startswith("[") else cell for cell in cells)
        mib = _whole(memory)
        gpus.append(Gpu(str(name), None, mib * 2**20 if mib else None, None, driver, capability))
    return tuple(gpus)


def with_driver(gpus: Sequence[Gpu], attributes: Mapping[str, Mapping[int, int]]) -> tuple[Gpu, ...]:
    """The same, with what the driver says: by a GPU's name, attributes of cuda.h. GPUs of one name are alike."""
    told = []
    for gpu in gpus:
        of_this = attributes.get(gpu.name, {})
        khz, bits = of_this.get(NVIDIA_MEMORY_KHZ), of_this.get(NVIDIA_BUS_BITS)
        # Two transfers a clock.
        bandwidth = 2 * khz * 1e3 * bits / 8 / 1e9 if khz and bits else None
        told.append(replace(gpu, cores=of_this.get(NVIDIA_MULTIPROCESSORS), bandwidth_gb_s=bandwidth))
    return tuple(told)


def _nvidia_attributes() -> dict[str, dict[int, int]]:
    """What the driver knows of the devices that this process may use. No context is made, so none of their memory
    is taken."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return {}
    found: dict[str, dict[int, int]] = {}
    for number in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        if cuda.cuDeviceGet(ctypes.byref(device), number) or cuda.cuDeviceGetName(name, len(name), device):
            continue
        of_this = found.setdefault(name.value.decode(errors="replace"), {})
        for attribute in (NVIDIA_MULTIPROCESSORS, NVIDIA_MEMORY_KHZ, NVIDIA_BUS_BITS):
            value = ctypes.c_int()
            if not cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                of_this[attribute] = value.value
    return found


def _usable_cpus() -> int | None:
    """Of this process, by its affinity and its control group."""
    bounds = [quota_of(_text(CGROUP / "cpu.max"))]
    if hasattr(os, "sched_getaffinity"):
        bounds.append(len(os.sched_getaffinity(0)))
    return min((bound for bound in bounds if bound is not None), default=None)


def _fields(text: str) -> dict[str, str]:
    """'name : value' lines. Of a repeated name the first."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _first(found: object) -> dict[str, Any]:
    return found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}


def _whole(text: object) -> int | None:
    """A number of things; None for whatever is none."""
    word = str(text)
    return int(word) if word.isdecimal() and word.isascii() else None


def _text(path: str | Path) -> str:
    with suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _output(*command: str) -> str:
    """What a command prints, as far as there is such a command and it knows what it was asked."""
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        ).stdout
    return ""
