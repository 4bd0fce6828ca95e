"""Which cores of a host each rank runs on: the one place where processes are bound.

Every rank of a host gets an equal stretch of its cores, in the order of the cards. That is the
range that PyTorch's plugin for Ascend takes by itself (CPU_AFFINITY_CONF=1), it keeps a rank and
its loader on one side of the host's memory, and ranks do not push each other from core to core.
Programs and loaders inherit it. It is left out

* where a rank would have fewer than `FEWEST_CORES`: then what one rank leaves idle is worth more to
  the others;
* where CPU_AFFINITY_CONF asks the plugin for it, which gives up on a process that is bound already;
* with CPU_AFFINITY=off.
"""

from __future__ import annotations

import os
from typing import Mapping, Set

FEWEST_CORES = 4
"""Per rank: the training's thread, the plugin's queue, and two of the loader."""


def share_of_cores(cores: Set[int], part: int, parts: int) -> Set[int]:
    """The part-th of `parts` equal stretches of the cores in use; all where there are too few."""
    each = len(cores) // parts
    if each < FEWEST_CORES or part >= parts:
        return cores
    return set(sorted(cores)[part * each:(part + 1) * each])


def bound_elsewhere(environ: Mapping[str, str]) -> bool:
    """Whether the plugin is asked to bind (mode 1 or 2), or nobody is to."""
    mode = environ.get("CPU_AFFINITY_CONF", "").split(",")[0].strip()
    return mode not in ("", "0") or environ.get("CPU_AFFINITY", "").lower() == "off"


def bind(part: int, parts: int, environ: Mapping[str, str]) -> None:
    """Bind this process, and what it will start, to its share of the host's cores.

    Args:
        part: number of this rank's card.
        parts: cards that the host's cores are divided among.
        environ: with the two variables above.
    """
    if parts > 1 and not bound_elsewhere(environ) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share_of_cores(os.sched_getaffinity(0), part, parts))
