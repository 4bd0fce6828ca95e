"""Memory: what a device and the host have, and one sentence for when it runs out."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import traceback
from typing import Any, Iterator

import torch

from utils.device import device_runtime, memory_reserved, synchronize
from utils.errors import UserError, first_line
from utils.files import first_match

GIB = float(1 << 30)
MARGIN = 0.1
"""Part of the available memory that a chosen batch leaves free: fragments of the allocator, the
kernels' workspaces and the collectives' buffers are not part of what a step shows."""

OWN_SOFTWARE = 0.1
"""Part of a device's memory that its driver and libraries may hold."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of glibc's mallopt."""

_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory",
          "error code is 207001", "error code is 207018", "cublas_status_alloc_failed")
"""207001 and 207018 are CANN's ACL_ERROR_RT_MEMORY_ALLOCATION and ACL_ERROR_RT_DEVICE_OOM."""


def in_gib(count: float) -> str:
    """Bytes as `1.5 GiB`."""
    return f"{count / GIB:.1f} GiB" if count >= 0.95 * GIB else f"{count / (1 << 20):.0f} MiB"


def host_available(space_limit: int | None = None, proc: str = "/proc",
                   cgroup: str = "/sys/fs/cgroup") -> int | None:
    """Bytes this process may still take: free memory, its control group, its address space.

    None where the system does not say (no /proc). The arguments are for tests.
    """
    free = proc_bytes(f"{proc}/meminfo", "MemAvailable")
    if free is None:
        return None
    limits = [free]
    limit = first_match(f"{cgroup}/memory.max", r"(\d+)$")  # "max" is no limit
    used = first_match(f"{cgroup}/memory.current", r"(\d+)$")
    if limit is not None and used is not None:
        reclaimable = first_match(f"{cgroup}/memory.stat", r"inactive_file (\d+)") or "0"
        limits.append(max(0, int(limit) - int(used) + int(reclaimable)))
    space = resource.getrlimit(resource.RLIMIT_AS)[0] if space_limit is None else space_limit
    size = proc_bytes(f"{proc}/self/status", "VmSize")
    if space != resource.RLIM_INFINITY and size is not None:
        limits.append(max(0, space - size))
    return min(limits)


def proc_bytes(path: str, key: str) -> int | None:
    """The bytes in a line `key: N kB` of a file below /proc; None where there is none."""
    found = first_match(path, re.escape(key) + r":\s+(\d+) kB")
    return None if found is None else int(found) << 10


def memory_info(device: torch.device) -> tuple[int, int]:
    """Bytes that this process may take on `device`, and all it has; 0 for what is not known.

    On a card those that the process holds are among the first; on the CPU they are not, and how
    much the host has is not told.
    """
    runtime = device_runtime(device)
    if runtime is None:
        return host_available() or 0, 0
    if hasattr(runtime, "mem_get_info"):
        free, total = runtime.mem_get_info(device)
        return int(free) + memory_reserved(device), int(total)
    properties = getattr(runtime, "get_device_properties", None)  # early plugins do not say
    total = getattr(properties(device), "total_memory", 0) if properties is not None else 0
    return int(total), int(total)


def held_by_others(available: int, total: int) -> int:
    """Bytes of a card that other processes hold; 0 where it is no more than its own software's.
    The arguments are what `memory_info` gives.
    """
    held = total - available
    return held if held > OWN_SOFTWARE * total else 0


def held_memory(device: torch.device) -> int:
    """Bytes that tensors have on `device` now; 0: unknown, as on the CPU."""
    return int(_ask(device, "memory_allocated") or 0)


def peak_memory(device: torch.device) -> int:
    """The most bytes since `reset_peak_memory`; 0: unknown.

    On a card those of tensors; on the CPU all that this process has had.
    """
    if device.type == "cpu":
        return proc_bytes("/proc/self/status", "VmHWM") or 0
    synchronize(device)
    return int(_ask(device, "max_memory_allocated") or 0)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count anew. Where the system refuses, the CPU's only grows."""
    if device.type == "cpu":
        # What was freed before stays with the process, and what fills it again would not count.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    _ask(device, "reset_peak_memory_stats", "reset_max_memory_allocated")


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep what it frees for its next step, where it computes on the CPU.

    The C library gives blocks of more than 32 MiB back at once, and the system clears every page
    of the next one: a seventh of a training step of 550 pixels. Where the C library has no such
    setting nothing changes.
    """
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_MMAP_MAX, 0)
            ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def release_memory(device: torch.device) -> None:
    """Give what PyTorch's allocator holds but does not need back to the device."""
    empty = getattr(device_runtime(device), "empty_cache", None)
    if empty is not None:
        empty()


def _ask(device: torch.device, *names: str) -> Any:
    """Call the first of these functions that the device's runtime has; None where it has none."""
    runtime = device_runtime(device)
    return next((getattr(runtime, name)(device) for name in names if hasattr(runtime, name)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device, or the host, had no memory left."""
    kind = getattr(torch, "OutOfMemoryError", None)
    if isinstance(error, MemoryError) or (kind is not None and isinstance(error, kind)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


@contextlib.contextmanager
def explain_out_of_memory(device: torch.device, batch_size: int = 0,
                          micro_batches: int = 0) -> Iterator[None]:
    """Turn the many kinds of "out of memory" that leave the block into a `UserError`.

    `batch_size` are the images at once, 0 where there is no batch; `micro_batches` the batches in a
    step of training, 0 where nothing is trained.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_memory(device)
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        release_memory(device)
        sentence = _sentence(device, peak, batch_size, micro_batches)
        reason = first_line(error)[:200]
    else:
        return
    raise UserError(f"{sentence} ({reason})")


def _sentence(device: torch.device, peak: int, batch_size: int, micro_batches: int) -> str:
    available, total = memory_info(device)
    others = held_by_others(available, total)
    text = f"out of memory on {device}: this process had {in_gib(peak)}, and "
    if total:
        if peak:  # it failed a little above its peak, whatever the card says is free
            available = min(available, peak + peak // 10)
        text += f"may use {in_gib(available)} of {in_gib(total)}" + (
            f", of which others hold {in_gib(others)}" if others else "")
    else:
        text += f"{in_gib(available)} is free without it"
    if not batch_size:
        return text + "; end what else is running there"
    # A line through what is left without a batch and the peak with this one, which is the least
    # that it takes: the step did not come to its end.
    fixed = held_memory(device)
    per_image = max((peak - fixed) // batch_size, 1)
    fits = min(int(available * (1 - MARGIN) - fixed) // per_image, batch_size - 1)
    text += f"; a batch of {batch_size} needs more, and " + (
        f"{fits} at most would fit. " if fits > 0 else "not one image is known to fit. ")
    # Half of them: what the rest of the step would have taken is not known.
    return text + advice(batch_size, micro_batches, fits // 2)


def advice(batch_size: int, micro_batches: int, fits: int) -> str:
    """What to type, where `fits` images fit at once; a step of training keeps its images."""
    if batch_size == 1:
        return ("Use a smaller input by --max_size" if micro_batches
                else "Use a configuration with a smaller input (max_size)")
    smaller = max(size for size in range(1, batch_size)
                  if size <= max(fits, 1) and (micro_batches == 0 or batch_size % size == 0))
    if micro_batches == 0:
        return f"Use --batch_size={smaller}"
    images = micro_batches * batch_size
    return (f"Use --batch_size={smaller} --accumulate={images // smaller}, which keeps {images} "
            "images a step")
