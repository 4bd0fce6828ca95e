"""What a device and a host have, in bytes; which exceptions mean that it ran out."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from utils.memory import (
    held_by_others,
    host_available,
    in_gib,
    is_out_of_memory,
    peak_memory,
    reset_peak_memory,
)

MIB = 1 << 20
GIB = 1 << 30


def test_bytes_in_words():
    assert [in_gib(n) for n in (5 * MIB, GIB // 2, GIB, 2.5 * GIB)] == [
        "5 MiB", "512 MiB", "1.0 GiB", "2.5 GiB"]


def test_a_device_s_own_software_is_nobody_else():
    assert held_by_others(60 * GIB, 64 * GIB) == 0
    assert held_by_others(50 * GIB, 64 * GIB) == 14 * GIB


def test_the_peak_of_this_process_grows_with_what_it_holds():
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    if not before:
        pytest.skip("no /proc here")
    held = torch.ones(max(before, 100 * MIB) // 4)
    high = peak_memory(cpu)
    assert high > before and len(held)
    del held
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < high


FRESH_PAGES = """
import resource, sys
import torch
from utils.memory import keep_freed_memory
if len(sys.argv) > 1:
    keep_freed_memory(torch.device("cpu"))
for step in range(20):
    if step == 15:  # the first steps find out what has to be kept
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(20 << 20) for _ in range(3)]  # 80 MiB each: glibc gives them back at once
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_what_a_step_frees_is_there_for_the_next():
    plain, kept = (int(subprocess.run([sys.executable, "-c", FRESH_PAGES, *argv], cwd=str(ROOT),
                                      stdout=subprocess.PIPE, check=True).stdout)
                   for argv in ((), ("keep",)))
    assert plain >= 5 * 3 * (80 << 20) // resource.getpagesize() and kept < plain / 5


@pytest.fixture
def host(tmp_path):
    """A stand-in for /proc and the control group: 8 GiB free, no limits."""
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    group.mkdir()
    (proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    (proc / "self" / "status").write_text("VmPeak:\t 900 kB\nVmSize:\t 1048576 kB\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(str(GIB))

    def available(limit=0):
        return host_available(limit or (1 << 60), str(proc), str(group))

    return available, group


def test_the_host_has_the_least_of_its_limits(host, tmp_path):
    available, group = host
    assert available() == 8 * GIB
    assert available(limit=4 * GIB) == 3 * GIB
    (group / "memory.max").write_text(str(3 * GIB))
    assert available() == 2 * GIB
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    assert available() == 2 * GIB + GIB // 2
    assert host_available(None, str(tmp_path / "nowhere"), str(group)) is None


@pytest.mark.parametrize("error", [
    RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 32.00 GiB total"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 4 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("NPU function error: aclrtMalloc, error code is 207001"),
    MemoryError(),
])
def test_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("shape mismatch"), ValueError("out of memory"),
    RuntimeError("NPU function error, error code is 507015")])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_the_cpu_allocator_s_own_error_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
