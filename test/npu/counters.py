"""What the emulator counted in this process: copies, waits, launches, operators that ran."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set

KINDS = ("host to host", "host to device", "device to host", "device to device")


class _Traffic(ctypes.Structure):
    _fields_ = [("calls", ctypes.c_uint64 * 4), ("bytes", ctypes.c_uint64 * 4),
                ("synchronisations", ctypes.c_uint64), ("bytes_in_use", ctypes.c_uint64),
                ("launches", ctypes.c_uint64)]


class Copies(NamedTuple):
    """Copies in one direction."""

    calls: int
    bytes: int


class Traffic(NamedTuple):
    """What crossed the border of host and device since the last reset."""

    to_device: Copies
    to_host: Copies
    within_device: Copies
    synchronisations: int
    """Times that the host waited for the device."""
    launches: int
    """Times that it queued work other than copies of the host; a recorded graph is one."""


def _library(name: str, marker: str) -> Optional[ctypes.CDLL]:
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    return library if hasattr(library, marker) else None


def available() -> bool:
    """Whether the emulator (and not CANN) is what torch_npu finds."""
    return _library("libascendcl.so", "npuemu_read_traffic") is not None


def reset() -> None:
    """Start counting at zero."""
    reset_traffic()
    _operators().npuemu_reset_counts()


def reset_traffic() -> None:
    """Start counting copies and waits at zero."""
    _runtime().npuemu_reset_traffic()


def traffic() -> Traffic:
    """Copies and waits since the last reset."""
    found = _Traffic()
    _runtime().npuemu_read_traffic(ctypes.byref(found))
    copies = [Copies(int(calls), int(size)) for calls, size in zip(found.calls, found.bytes)]
    return Traffic(copies[1], copies[2], copies[3], int(found.synchronisations),
                   int(found.launches))


def operators() -> Dict[str, int]:
    """How often each ready-made operator (aclnn) ran since the last reset."""
    read = _operators().npuemu_read_counts
    read.restype = ctypes.c_char_p
    lines = read().decode().splitlines()
    return {name: int(times) for name, times in (line.rsplit(" ", 1) for line in lines)}


def take_plans() -> List[str]:
    """Ready-made operators that this thread has planned since its last call, in order, each as
    "Name type[sizes] ..." with its tensors, results among them. Nothing before the first call.
    """
    read = _operators().npuemu_take_plans
    read.restype = ctypes.c_char_p
    return list(read().decode().splitlines())


def set_overflow() -> None:
    """Set the register of overflows, as a device does that saturates (NPUEMU_SOC=Ascend910A)."""
    _operators().npuemu_set_overflow()


def emulated() -> Set[str]:
    """Names of all operators that the emulator has, without their prefix."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next(line.split()[-1] for line in maps if line.endswith("libopapi_part.so"))
    text = subprocess.run(["nm", "-D", "--defined-only", path], check=True,
                          stdout=subprocess.PIPE, universal_newlines=True).stdout
    return set(re.findall(r" aclnn(\w+)GetWorkspaceSize$", text, re.MULTILINE))


def _runtime() -> ctypes.CDLL:
    library = _library("libascendcl.so", "npuemu_read_traffic")
    assert library is not None, "the emulator is not on LD_LIBRARY_PATH"
    return library


def _operators() -> ctypes.CDLL:
    library = _library("libopapi_part.so", "npuemu_read_counts")
    assert library is not None, "the emulator is not on LD_LIBRARY_PATH"
    return library
