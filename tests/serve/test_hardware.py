"""What machines say of themselves is read as they say it: texts recorded on Macs, boards, servers and GPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from serve import hardware
from serve.hardware import Gpu

M1_PRO = """machdep.cpu.brand_string: Apple M1 Pro
hw.ncpu: 10
hw.byteorder: 1234
hw.memsize: 17179869184
hw.activecpu: 10
hw.perflevel0.physicalcpu: 8
hw.perflevel0.physicalcpu_max: 8
hw.perflevel0.logicalcpu: 8
hw.perflevel0.cpusperl2: 4
hw.perflevel0.name: Performance
hw.perflevel1.physicalcpu: 2
hw.perflevel1.logicalcpu: 2
hw.perflevel1.name: Efficiency
hw.physicalcpu: 10
hw.logicalcpu: 10
hw.model: MacBookPro18,1
hw.cachesize: 3358556160 65536 4194304 0 0 0 0 0 0 0
hw.osenvironment:
hw.nperflevels: 2
hw.targettype: J316s
"""
M3_MAX = """machdep.cpu.brand_string: Apple M3 Max
hw.perflevel1.physicalcpu: 4
hw.perflevel1.name: Efficiency
hw.perflevel0.physicalcpu: 12
hw.perflevel0.name: Performance
hw.physicalcpu: 16
hw.logicalcpu: 16
hw.memsize: 137438953472
hw.nperflevels: 2
hw.targettype: J516c
"""
THREE_LEVELS = """hw.nperflevels: 3
hw.perflevel0.name: Performance
hw.perflevel0.physicalcpu: 4
hw.perflevel1.name: Performance
hw.perflevel1.physicalcpu: 4
hw.perflevel2.name: Efficiency
hw.perflevel2.physicalcpu: 2
hw.physicalcpu: 10
"""
INTEL_MAC = """machdep.cpu.brand_string: Intel(R) Core(TM) i9-9880H CPU @ 2.30GHz
hw.memsize: 34359738368
hw.physicalcpu: 8
hw.logicalcpu: 16
hw.model: MacBookPro16,1
"""
EPYC = """processor	: {0}
vendor_id	: AuthenticAMD
model name	: AMD EPYC 9554 64-Core Processor
physical id	: {1}
siblings	: 4
core id		: {2}
cpu cores	: 2
flags		: fpu vme de

"""
GRAVITON = """processor	: {0}
BogoMIPS	: 243.75
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics
CPU implementer	: 0x41
CPU part	: 0xd0c

"""
RASPBERRY = """processor	: 0
BogoMIPS	: 108.00
CPU implementer	: 0x41

processor	: 1
BogoMIPS	: 108.00
CPU implementer	: 0x41

Revision	: d04170
Serial		: 0000
Model		: Raspberry Pi 5 Model B Rev 1.0
"""


def profiler(
    model: str, cores: str | None, metal: str = "spdisplays_metal3", machine: str = "MacBook Pro"
) -> str:
    """As `system_profiler -json -detailLevel mini SPHardwareDataType SPDisplaysDataType` prints it."""
    gpu = {
        "_name": "kHW_AppleItem",
        "spdisplays_mtlgpufamilysupport": metal,
        "spdisplays_ndrvs": [{"_name": "Color LCD"}],
        "spdisplays_vendor": "sppci_vendor_Apple",
        "sppci_bus": "spdisplays_builtin",
        "sppci_model": model,
    }
    about = {
        "_name": "hardware_overview",
        "chip_type": model,
        "machine_model": "Mac14,10",
        "machine_name": machine,
        "number_processors": "proc 12:8:4",
        "physical_memory": "16 GB",
    }
    return json.dumps(
        {
            "SPDisplaysDataType": [gpu | ({"sppci_cores": cores} if cores else {})],
            "SPHardwareDataType": [about],
        }
    )


def test_a_mac_is_read_from_its_two_reports():
    assert hardware.of_mac(M1_PRO, profiler("Apple M1 Pro", "16")) == hardware.Hardware(
        chip="Apple M1 Pro",
        model="MacBook Pro, Mac14,10",
        cores=10,
        core_kinds=(("performance", 8), ("efficiency", 2)),
        threads=10,
        memory_bytes=16 * 2**30,
        bandwidth_gb_s=200,
        gpus=(Gpu("Apple M1 Pro", cores=16, capability="Metal 3"),),
    )


@pytest.mark.parametrize(
    ("chip", "gpu_cores", "gb_s"),
    [
        ("Apple M1", 8, 68.25),
        ("Apple M3 Max", 30, 300),
        ("Apple M3 Max", 40, 400),
        ("Apple M4 Max", 32, 410),
        ("Apple M4 Max", 40, 546),
        ("Apple M3 Ultra", 80, 819),
        ("Apple M5 Max", 40, 614),
        ("Apple M4 Max", None, None),
        ("Apple M9 Giga", 400, None),
        ("Intel(R) Core(TM) i9-9880H CPU @ 2.30GHz", None, None),
    ],
)
def test_bandwidth_is_the_makers_for_the_very_chip_and_nothing_for_others(chip, gpu_cores, gb_s):
    assert hardware.mac_bandwidth(chip, gpu_cores) == gb_s


def test_every_chip_with_two_gpus_has_the_smaller_ones_bandwidth_in_the_table():
    for name, (cores, wide) in hardware.WITH_MORE_GPU_CORES.items():
        assert hardware.MAC_BANDWIDTH_GB_S[name] < wide
        assert cores > 32


def test_levels_of_cores_are_the_fastest_first_and_those_of_one_name_are_one_kind():
    assert hardware.of_mac(M3_MAX, "").core_kinds == (("performance", 12), ("efficiency", 4))
    assert hardware.of_mac(THREE_LEVELS, "").core_kinds == (("performance", 8), ("efficiency", 2))


def test_what_a_mac_does_not_say_is_none():
    intel = hardware.of_mac(INTEL_MAC, "")
    assert (intel.cores, intel.threads, intel.core_kinds, intel.gpus) == (8, 16, (), ())
    assert intel.model == "MacBookPro16,1"
    assert intel.bandwidth_gb_s is None
    for broken in ("", "{", "[]", '{"SPDisplaysDataType": null, "SPHardwareDataType": [3]}'):
        found = hardware.of_mac("sysctl: unknown oid 'hw.perflevel0.name'", broken)
        assert (found.cores, found.memory_bytes, found.gpus) == (None, None, ())


def test_a_virtual_macs_gpu_of_no_core_count_is_still_named():
    found = hardware.of_mac(M1_PRO, profiler("Apple Paravirtual device", None, "spdisplays_metal"))
    assert found.gpus == (Gpu("Apple Paravirtual device", capability="Metal"),)


def test_linux_counts_cores_over_sockets_and_threads_apart():
    threads = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]
    cpuinfo = "".join(EPYC.format(n, socket, core) for n, (socket, core) in enumerate(threads))
    found = hardware.of_linux(cpuinfo, "MemTotal:       24684096 kB\nMemFree:        17000000 kB\n")
    assert (found.chip, found.cores, found.threads) == ("AMD EPYC 9554 64-Core Processor", 4, 8)
    assert found.memory_bytes == 24684096 * 1024


def test_an_arm_machine_is_named_by_lscpu_or_by_its_board():
    graviton = hardware.of_linux("".join(GRAVITON.format(n) for n in range(4)), "")
    assert (graviton.chip, graviton.cores, graviton.threads, graviton.memory_bytes) == ("", None, 4, None)
    lscpu = "Architecture:            aarch64\nVendor ID:               ARM\nModel name:              Neoverse-N1\n"
    assert hardware.of_lscpu(lscpu) == "Neoverse-N1"
    assert hardware.of_lscpu("Architecture: aarch64\nModel name:   -\n") is None
    board = hardware.of_linux(RASPBERRY, "")
    assert (board.model, board.threads) == ("Raspberry Pi 5 Model B Rev 1.0", 2)


def test_nvidia_gpus_are_read_line_by_line_and_unknown_fields_are_none():
    text = (
        "NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0\nNVIDIA H200, 143771, 580.65.06, 9.0\n"
        "Tesla K80, [N/A], [Not Supported], [N/A]\n"
    )
    h100, h200, k80 = hardware.of_nvidia_smi(text)
    assert (h100.name, h100.memory_bytes, h100.driver, h100.capability) == (
        "NVIDIA H100 80GB HBM3", 81559 * 2**20, "580.65.06", "9.0",
    )  # fmt: skip
    assert h200.memory_bytes == 143771 * 2**20
    assert k80 == Gpu("Tesla K80")
    for failed in (
        "",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "No devices\n",
    ):
        assert hardware.of_nvidia_smi(failed) == ()


def test_a_gpus_bandwidth_is_what_its_driver_gives_twice_a_clock_over_its_bus():
    h100 = Gpu("NVIDIA H100 80GB HBM3")
    attributes = {h100.name: {16: 132, 36: 2_619_000, 37: 5120}}
    told, unknown = hardware.with_driver([h100, Gpu("another")], attributes)
    assert told.cores == 132
    assert told.bandwidth_gb_s == pytest.approx(3352.3, abs=0.1)
    assert unknown == Gpu("another")


@pytest.mark.parametrize(
    ("cpu_max", "cpus"),
    [("max 100000\n", None), ("150000 100000\n", 2), ("5000 100000", 1), ("", None), ("400000 100000", 4)],
)
def test_a_containers_share_of_cpus_is_rounded_and_never_none(cpu_max, cpus):
    assert hardware.quota_of(cpu_max) == cpus


def test_a_containers_memory_counts_where_it_is_less_than_the_machines():
    assert hardware.limit_of("max\n", 2**34) is None
    assert hardware.limit_of(f"{2**33}\n", 2**34) == 2**33
    assert hardware.limit_of("9223372036854771712\n", 2**34) is None
    assert hardware.limit_of("", 2**34) is None


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no Linux")
def test_this_machine_says_of_itself_what_psutil_finds():
    found = hardware.describe()
    assert found.chip
    assert found.threads == psutil.cpu_count()
    assert found.memory_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.01)


@pytest.mark.skipif(sys.platform != "darwin", reason="no Mac")
def test_this_mac_says_of_itself_what_psutil_finds():
    found = hardware.describe()
    assert found.chip.startswith("Apple")
    assert found.cores == psutil.cpu_count(logical=False)
    assert found.memory_bytes == psutil.virtual_memory().total
    assert found.gpus
