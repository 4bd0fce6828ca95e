"""When memory runs out: one sentence with what was asked for, what there is and what would fit."""

from __future__ import annotations

import contextlib
import traceback
from typing import Callable, Iterator, NamedTuple, Optional

import torch

from utils.errors import UserError
from utils.memory import (
    MARGIN,
    MemoryNeed,
    held_by_others,
    host_available,
    in_gib,
    is_out_of_memory,
    memory_info,
    peak_memory,
    process_peak,
    release_memory,
)


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
    raise UserError("{} ({})".format(sentence, first[:200]))


def _sentence(device: torch.device, peak: int, demand: Optional[Demand]) -> str:
    available, total = memory_info(device) or (host_available() or 0, 0)
    others = held_by_others(available, total)
    if total and peak:  # it failed a little above its peak, whatever the device says is free
        available = min(available, peak + peak // 10)
    text = "out of memory on {}: ".format(device)
    if total:
        text += "it has {}, {}this process may use {} and had {}".format(
            in_gib(total), "of which others hold {}, ".format(in_gib(others)) if others else "",
            in_gib(available), in_gib(peak))
    else:
        text += "this process had {}, and {} is free without it".format(
            in_gib(peak), in_gib(available))
    if demand is None:
        return text + "; end what else is running there"
    need = _corrected(demand, peak)
    fits = min(need.largest_batch(int(available * (1 - MARGIN))), demand.batch_size - 1)
    text += "; a batch of {} needs about {}, and {}. ".format(
        demand.batch_size, in_gib(need.of_batch(demand.batch_size)),
        "{} would fit".format(fits) if fits > 0 else "not one image is known to fit")
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
        return "Use --batch_size={}".format(smaller)
    return "Use --batch_size={} --accumulate={}, which keeps {} images a step".format(
        smaller, parts * batch_size // smaller, parts * batch_size)
