"""--batch_size=auto: the largest batch that fits into a card's memory, agreed by all cards."""

from __future__ import annotations

import os
from typing import Mapping, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist

from training.memory import Trial, measure
from utils.checkpoint import load_state
from utils.distributed.processes import Processes
from utils.errors import UserError
from utils.memory import (
    MARGIN,
    held_by_others,
    host_available,
    in_gib,
    memory_info,
    process_peak,
    round_down,
)

LARGEST_STEP = 64
"""Images of a step that `auto` chooses at most. The learning rate grows with them, and eight cards
of eight images are the most that this recipe is known to learn with."""
WORKER_BYTES = 256 << 20
"""What a loader process takes beside what it shares, on a host whose memory trains, too."""


def available_bytes(device: torch.device, num_workers: int,
                    environ: Mapping[str, str]) -> Tuple[int, str]:
    """Bytes that one process of the training may take, and where, in words.

    Raises:
        UserError: the system does not say.
    """
    if device.type == "cpu":
        found = host_available()
        if found is not None and process_peak() is not None:
            local = environ.get("LOCAL_WORLD_SIZE") or environ.get("NPROC") or "1"
            ranks = int(local) if local.isdigit() and int(local) else 1
            return (max(0, found // ranks - num_workers * WORKER_BYTES),
                    "free memory of this host" + (" for each process" if ranks > 1 else ""))
    else:
        info = memory_info(device)
        if info is not None:
            others = held_by_others(*info)
            shared = " (others hold {} of its {})".format(in_gib(others), in_gib(info[1]))
            return info[0], "free memory of {}{}".format(device, shared if others else "")
    raise UserError("--batch_size=auto: this system does not tell how much memory {} has; give a "
                    "number".format(device))


class Choice(NamedTuple):
    """A batch size and why."""

    batch_size: int
    sentence: str


def choose_batch_size(trial: Trial, device: torch.device, processes: Processes, parts: int,
                      num_images: int, num_workers: int = 0,
                      environ: Optional[Mapping[str, str]] = None,
                      more_limits: Optional[Mapping[str, int]] = None) -> Choice:
    """Images per card for --batch_size=auto, the same on all cards.

    The largest even number that leaves a tenth of the memory free, makes steps of at most
    `LARGEST_STEP` images and leaves a step's worth of images in the dataset.

    Args:
        trial: what is trained.
        device: of this process.
        processes: all of the run.
        parts: batches of each card in a step (--accumulate).
        num_images: of the training set.
        num_workers: loader processes of this one.
        environ: where launchers say how many processes this host has.
        more_limits: images per card that something else allows, by what it is in words.

    Raises:
        UserError: not one image fits, or what a system has is not known.
    """
    need = measure(trial, device)
    available, where = available_bytes(device, num_workers, os.environ if environ is None
                                       else environ)
    usable = int(available * (1 - MARGIN))
    fits = _smallest(need.largest_batch(usable), processes, device)
    shares = processes.world_size * parts
    limits = {"what fits": fits,
              "{} images a step, beyond which the learning rate is not known to work".format(
                  LARGEST_STEP): max(1, LARGEST_STEP // shares),
              "the {} images of the training set".format(num_images): num_images // shares,
              **(more_limits or {})}
    chosen = round_down(min(limits.values()))
    if fits < 1:
        raise UserError("--batch_size=auto: not one image fits, it takes {} and there is {} ({}); "
                        "choose a smaller input or another configuration".format(
                            need.sentence(1), in_gib(usable), where))
    reason = next(name for name, limit in limits.items() if limit == min(limits.values()))
    chosen = max(chosen, 1)
    return Choice(chosen, "{} per card, by {}: {}; {} of {} may be used".format(
        chosen, reason, need.sentence(chosen), in_gib(usable), where))


def resumed_batch_size(weights_path: str, shares: int) -> Optional[Choice]:
    """Images per card of the training that is resumed; None where only its weights are left.

    Args:
        weights_path: checkpoint.
        shares: pieces that a step is divided into, cards x parts.

    Raises:
        UserError: its steps cannot be divided into as many pieces.
    """
    state = load_state(weights_path)
    if state is None:
        return None
    batch = int(state["global_batch"])
    if batch % shares:
        raise UserError("--batch_size=auto: '{}' was trained with {} images a step, which {} cards "
                        "x parts cannot share evenly; resume it on as many cards as it had".format(
                            weights_path, batch, shares))
    return Choice(batch // shares, "{} per card, as in {}".format(batch // shares, weights_path))


def _smallest(value: int, processes: Processes, device: torch.device) -> int:
    """The smallest of all processes' values, in all of them."""
    if processes.world_size == 1:
        return value
    values = torch.zeros(processes.world_size, dtype=torch.int32, device=device)
    values[processes.rank] = min(value, 1 << 20)
    dist.all_reduce(values)
    return min(values.tolist())
