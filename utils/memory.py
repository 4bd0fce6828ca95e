"""Memory of a training: what it needs, and what a device has; see `utils.out_of_memory`.

What a step needs is a fixed part (weights, gradients, optimiser) and a part for every image
(activations, their gradients, the batch itself). Two measured peaks give both; before anything has
run, what goes through the network's modules gives an estimate.
"""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from utils.device import device_runtime, memory_reserved
from utils.errors import UserError

GIB = float(1 << 30)
MARGIN = 0.1
"""Part of the available memory that a chosen batch leaves free: fragments of the allocator, the
kernels' workspaces and the collectives' buffers are not part of what two steps show."""

OWN_SOFTWARE = 0.1
"""Part of a device's memory that its driver and libraries may hold."""

_PROC_STATUS = "/proc/self/status"
_CGROUP = "/sys/fs/cgroup"


class MemoryNeed(NamedTuple):
    """Bytes that training takes on one card."""

    fixed: int
    """While gradients are computed, whatever the batch: weights and state of the optimiser."""
    per_image: int
    """The same for every image of the batch: the image, targets, activations and theirs."""
    update: int = 0
    """While the optimiser works; activations are gone by then, gradients are there."""

    def of_batch(self, batch_size: int) -> int:
        """Bytes for a batch."""
        return max(self.fixed + batch_size * self.per_image, self.update)

    def largest_batch(self, available: int) -> int:
        """Images that fit into `available` bytes; 0 where not even one does."""
        if self.update > available:
            return 0
        return max(0, (available - self.fixed) // max(self.per_image, 1))

    def sentence(self, batch_size: int) -> str:
        """For people."""
        largest = self.of_batch(batch_size)
        update = f"; the optimiser {in_gib(self.update)}" if largest == self.update else ""
        return "{} for {} image{} ({} + {} per image{})".format(
            in_gib(largest), batch_size, "" if batch_size == 1 else "s", in_gib(self.fixed),
            in_gib(self.per_image), update)

    @staticmethod
    def from_peaks(one: int, two: int, update: int) -> MemoryNeed:
        """From the peaks of the gradients of one image, those of two, and of the update."""
        per_image = max(two - one, 1)
        return MemoryNeed(max(one - per_image, 0), per_image, update)


def in_gib(count: float) -> str:
    """Bytes as `1.5 GiB`."""
    return f"{count / GIB:.1f} GiB" if count >= 0.95 * GIB else (
        f"{count / (1 << 20):.0f} MiB")


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Activation(NamedTuple):
    """What one tensor adds to the memory of a backward pass."""

    single: int
    """Bytes, where the network computes in float32."""
    half: int
    """Bytes, where it computes in a half precision."""
    side: int
    """Height of the map that it is, or comes with; 0 where it is none."""


def activations(model: nn.Module, run: Callable[[], Any]) -> List[Activation]:
    """What the modules of `model` keep for the backward pass of `run()`, in the order of its parts.

    That is what goes into and comes out of modules, as far as it takes a gradient or is the input
    of a trained weight: between them, only in-place operations leave nothing behind. What a module
    writes in place of its input counts once. A module that keeps more than this has a method
    `kept(input, output)` that returns the fields of an `Activation`.
    """
    found: List[Activation] = []
    held: Dict[int, Tensor] = {}  # until the end, or addresses would come back

    def note(value: Any, always: bool = False) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                note(item, always)
        elif isinstance(value, dict):
            note(list(value.values()), always)
        elif (isinstance(value, Tensor) and (value.requires_grad or always)
              and value.data_ptr() not in held):
            held[value.data_ptr()] = value
            size = value.numel() * value.element_size()
            found.append(Activation(size, size // 2, value.shape[2] if value.dim() == 4 else 0))

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        own = list(module.parameters(recurse=False))
        note(inputs, any(parameter.requires_grad for parameter in own))
        note(output)
        more: Any = getattr(module, "kept", None)
        if more is not None and output.requires_grad:
            found.append(Activation(*more(inputs[0], output)))

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def round_down(batch_size: int) -> int:
    """The even number from 2 on that is not above `batch_size`; 1 and 0 stay what they are.

    Even, because kernels and a later split into parts (--accumulate) like it; a power of two would
    leave up to half of the memory unused.
    """
    return batch_size if batch_size < 2 else batch_size // 2 * 2


def host_available(space_limit: Optional[int] = None, proc: str = "/proc",
                   cgroup: str = _CGROUP) -> Optional[int]:
    """Bytes this process may still take: free memory, its control group, its address space.

    None where the system does not say (no /proc). The arguments are for tests.
    """
    free = _proc_kib(os.path.join(proc, "meminfo"), "MemAvailable")
    if free is None:
        return None
    limits = [free]
    group_limit = _whole_number(os.path.join(cgroup, "memory.max"))
    group_used = _whole_number(os.path.join(cgroup, "memory.current"))
    if group_limit is not None and group_used is not None:
        reclaimable = _reclaimable(os.path.join(cgroup, "memory.stat"))
        limits.append(max(0, group_limit - group_used + reclaimable))
    space = space_limit if space_limit is not None else address_space_limit()
    size = _proc_kib(os.path.join(proc, "self", "status"), "VmSize")
    if space is not None and size is not None:
        limits.append(max(0, space - size))
    return min(limits)


def address_space_limit() -> Optional[int]:
    """`ulimit -v` in bytes; None without one, or where the system has no such thing."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)


def process_peak() -> Optional[int]:
    """The most bytes of memory that this process has ever had; None where the system is silent."""
    return _proc_kib(_PROC_STATUS, "VmHWM")


def _proc_kib(path: str, key: str) -> Optional[int]:
    for line in _lines(path):
        match = re.match(re.escape(key) + r":\s+(\d+) kB", line)
        if match:
            return int(match.group(1)) << 10
    return None


def _whole_number(path: str) -> Optional[int]:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _reclaimable(path: str) -> int:
    found: Mapping[str, str] = dict(line.split() for line in _lines(path) if len(line.split()) == 2)
    return int(found.get("inactive_file", "0"))


def _lines(path: str) -> List[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            return stream.read().splitlines()
    except OSError:
        return []


def memory_info(device: torch.device) -> Optional[Tuple[int, int]]:
    """Bytes that this process may take on `device`, those it holds included, and all it has.

    None for the CPU, and where an early plugin does not say how much the device has.
    """
    runtime = device_runtime(device)
    if hasattr(runtime, "mem_get_info"):
        free, total = runtime.mem_get_info(device)
        return int(free) + memory_reserved(device), int(total)
    properties = getattr(runtime, "get_device_properties", None)
    total = getattr(properties(device), "total_memory", 0) if properties is not None else 0
    return (int(total), int(total)) if total else None


def held_by_others(available: int, total: int) -> int:
    """Bytes of a device that other processes hold; 0 where it is no more than its own software's.

    Args:
        available: bytes that may still be taken, as `memory_info` gives them.
        total: bytes that the device has.
    """
    held = total - available
    return held if held > OWN_SOFTWARE * total else 0


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have had on `device`, since `reset_peak_memory`; 0: unknown."""
    read = getattr(device_runtime(device), "max_memory_allocated", None)
    return int(read(device)) if read is not None else 0


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count anew."""
    runtime = device_runtime(device)
    reset = getattr(runtime, "reset_peak_memory_stats",
                    getattr(runtime, "reset_max_memory_allocated", None))
    if reset is not None:
        reset(device)


def release_memory(device: torch.device) -> None:
    """Give what PyTorch's allocator holds but does not need back to the device."""
    empty = getattr(device_runtime(device), "empty_cache", None)
    if empty is not None:
        empty()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device, or the host, had no memory left."""
    kind = getattr(torch, "OutOfMemoryError", None)
    if isinstance(error, MemoryError) or (kind is not None and isinstance(error, kind)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory",
          "error code is 207001", "error code is 207018", "cublas_status_alloc_failed")
"""207001 and 207018 are CANN's ACL_ERROR_RT_MEMORY_ALLOCATION and ACL_ERROR_RT_DEVICE_OOM."""


class Demand(NamedTuple):
    """What was running."""

    batch_size: int
    """Images at once."""
    need: Callable[[], MemoryNeed]
    """Called after the failure: memory of a batch as far as it is known beforehand."""
    parts: int = 1
    """Batches in a step of training; 0 where nothing is trained."""


@contextlib.contextmanager
def explained(device: torch.device, demand: Optional[Demand] = None) -> Iterator[None]:
    """Turn the many kinds of "out of memory" that leave the block into a `UserError`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_memory(device) or process_peak() or 0
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        release_memory(device)
        sentence = _sentence(device, peak, demand)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    else:
        return
    raise UserError(f"{sentence} ({first[:200]})")


def _sentence(device: torch.device, peak: int, demand: Optional[Demand]) -> str:
    available, total = memory_info(device) or (host_available() or 0, 0)
    others = held_by_others(available, total)
    if total and peak:  # it failed a little above its peak, whatever the device says is free
        available = min(available, peak + peak // 10)
    text = f"out of memory on {device}: "
    if total:
        text += "it has {}, {}this process may use {} and had {}".format(
            in_gib(total), f"of which others hold {in_gib(others)}, " if others else "",
            in_gib(available), in_gib(peak))
    else:
        text += f"this process had {in_gib(peak)}, and {in_gib(available)} is free without it"
    if demand is None:
        return text + "; end what else is running there"
    need = _corrected(demand, peak)
    fits = min(need.largest_batch(int(available * (1 - MARGIN))), demand.batch_size - 1)
    text += "; a batch of {} needs about {}, and {}. ".format(
        demand.batch_size, in_gib(need.of_batch(demand.batch_size)),
        f"{fits} would fit" if fits > 0 else "not one image is known to fit")
    return text + advice(demand.batch_size, demand.parts, fits)


def _corrected(demand: Demand, peak: int) -> MemoryNeed:
    """The need as known beforehand, raised where the peak that was reached shows more."""
    try:
        need = demand.need()
    except (RuntimeError, MemoryError):  # the estimate itself found no memory
        need = MemoryNeed(0, 0)
    return need._replace(per_image=max(
        need.per_image, (peak - need.fixed) // demand.batch_size, 1))


def advice(batch_size: int, parts: int, fits: int) -> str:
    """What to type, where `fits` images fit at once; a step of training keeps its images."""
    if batch_size == 1:
        return "Use a configuration with a smaller input (max_size)"
    smaller = max(size for size in range(1, batch_size)
                  if size <= max(fits, 1) and (parts == 0 or batch_size % size == 0))
    if parts == 0:
        return f"Use --batch_size={smaller}"
    return (f"Use --batch_size={smaller} --accumulate={parts * batch_size // smaller}, which keeps "
            f"{parts * batch_size} images a step")
