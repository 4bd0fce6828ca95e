"""Evaluation shared among processes: who takes which images, how detections come together."""

from __future__ import annotations

import json
from typing import Any, List, Sequence

import torch

from utils.distributed.parallel import gather_bytes
from utils.distributed.processes import Processes


def shard(indices: Sequence[int], batch_size: int, processes: Processes) -> List[int]:
    """Part of the images for one process: every W-th batch of one process's sequence of batches.

    Whole batches, so that each image passes the network in the company it has on one card: some
    kernels' last digits depend on it.
    """
    mine: List[int] = []
    for start in range(processes.rank * batch_size, len(indices),
                       processes.world_size * batch_size):
        mine.extend(indices[start:start + batch_size])
    return mine


def gather_state(state: List[Any], image_ids: Sequence[int], processes: Processes,
                 device: torch.device) -> List[Any]:
    """Bring the processes' `CocoEvaluator.state()` together, in the order of `image_ids`.

    Returns everything in the main process, nothing in the others.

    Raises:
        RuntimeError: an image was evaluated by nobody or twice.
    """
    received = gather_bytes(json.dumps(state, separators=(",", ":")).encode("ascii"), processes,
                            device)
    if not processes.is_main:
        return []
    entries = [entry for part in received for entry in json.loads(part.decode("ascii"))]
    place = {int(image_id): n for n, image_id in enumerate(image_ids)}
    if sorted(place) != sorted(entry[0] for entry in entries):
        raise RuntimeError("{} images were chosen, {} came back from {} processes".format(
            len(place), len(entries), processes.world_size))
    return sorted(entries, key=lambda entry: place[entry[0]])
