"""--batch_size=auto: the largest batch that fits into a card's memory, agreed by all cards.

A step takes a fixed part (weights, gradients, optimiser) and a part for every image (activations,
their gradients, the batch itself). Two trial steps of different batch sizes show both.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, Callable, Dict, Mapping, NamedTuple

import torch
from torch import Tensor

from data.batch import collate, pack
from data.coco import CocoDataset
from data.config import Config
from data.loader import TrainDataset, prefetch
from layers.anchors import make_priors
from layers.fused_ops import CROSS_ENTROPY_ROWS
from utils.amp import build_precision
from utils.checkpoint import load_state, rng_state, set_rng_state
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing, gather_bytes
from utils.engine.learner import Learner, assemble_learner, freeze_stages
from utils.errors import UserError, counted, first_line
from utils.memory import (
    MARGIN,
    held_by_others,
    in_gib,
    is_out_of_memory,
    memory_info,
    peak_memory,
    release_memory,
    reset_peak_memory,
)
from utils.parsing import whole_number
from yolact import build_yolact

TRIAL_SIZES = (1, 2, 4, 8)
"""Images of the trial steps; the last two that fit count. With few the peak comes when activations
are few and the gradients of the weights are there, so that one image more seems to take less than
it does."""
LARGEST_STEP = 64
"""Images of a step that `auto` chooses at most. The learning rate grows with them, and eight cards
of eight images are the most that this recipe is known to learn with."""
WORKER_BYTES = 256 << 20
"""What a loader process takes beside what it shares, on a host whose memory trains, too."""

TrainStep = Callable[..., Dict[str, Tensor]]
"""`train.train_step`; given by the caller, since it stands above this module."""


def automatic_batch(args: argparse.Namespace, config: Config, dataset: CocoDataset,
                    processes: Processes, device: torch.device, step: TrainStep,
                    resumed: str | None) -> int:
    """Images per card for --batch_size=auto; a resumed training keeps what it had."""
    shares = processes.world_size * args.accumulate
    chosen = None if resumed is None else resumed_batch_size(resumed, shares)
    sentence = f"{chosen} per card, as in {resumed}"
    if chosen is None:
        largest = config.at_largest_side()
        row = TrainDataset.from_config(dataset, largest, lambda recipe: make_priors(recipe).numpy()
                                       )[0, 0, largest.max_size]
        if isinstance(row, UserError):
            raise row

        def build() -> Learner:
            model = build_yolact(largest)
            freeze_stages(model, largest)
            precision = build_precision(args.opt_level, args.loss_scale, args.amp_dtype, device)
            return assemble_learner(largest, model, precision, Processes(), device)

        need = measure(build, row, step, device, processes)
        limits = {f"{LARGEST_STEP} images a step, beyond which the learning rate is not known to "
                  "work": max(1, LARGEST_STEP // shares),
                  f"the {len(dataset)} images of the training set": len(dataset) // shares}
        if args.fused_loss:
            limits["what the fused loss takes"] = CROSS_ENTROPY_ROWS // len(make_priors(largest))
        available = available_bytes(device, args.num_workers, os.environ)
        chosen, sentence = choose_batch_size(need, available, processes, device, limits)
    if processes.is_main:
        print(f"Batch size auto : {sentence}", flush=True)
    return chosen


class MemoryNeed(NamedTuple):
    """Bytes that a step takes on one card."""

    fixed: int
    """Whatever the batch: weights, their gradients and the state of the optimiser."""
    per_image: int
    """The same for every image of the batch: the image, targets, activations and theirs."""

    def largest_batch(self, available: int) -> int:
        """Images that fit into `available` bytes; 0 where not even one does."""
        return max(0, (available - self.fixed) // self.per_image)

    def sentence(self, batch_size: int) -> str:
        return (f"{in_gib(self.fixed + batch_size * self.per_image)} for "
                f"{counted(batch_size, 'image')} ({in_gib(self.fixed)} + "
                f"{in_gib(self.per_image)} per image)")

    @staticmethod
    def from_peaks(peaks: Mapping[int, int]) -> MemoryNeed:
        """The line through the peaks of the two largest batches; through 0 if there is but one."""
        (fewer, low), (more, high) = ([(0, 0)] * (len(peaks) == 1) + sorted(peaks.items()))[-2:]
        per_image = max((high - low) // (more - fewer), 1)
        return MemoryNeed(max(high - more * per_image, 0), per_image)


def measure(build: Callable[[], Learner], row: dict[str, Any], step: TrainStep,
            device: torch.device, processes: Processes) -> MemoryNeed:
    """What training takes on `device`; leaves no trace in the random generators.

    `build` makes a network with all that trains it, for one process; its weights do not matter.
    One `row` of a batch is enough: all take as much, their shapes do not depend on the image.

    Raises:
        UserError: not even a step of one image fits.
    """
    state = rng_state()
    try:
        return _try_steps(build(), row, step, device, buckets=processes.world_size > 1)
    finally:
        set_rng_state(state)
        release_memory(device)


def _try_steps(learner: Learner, row: dict[str, Any], step: TrainStep, device: torch.device,
               buckets: bool) -> MemoryNeed:
    sharing = Sharing(Processes(), device)
    peaks: dict[int, int] = {}
    try:
        for size in TRIAL_SIZES:
            # The CPU's memory is that of all programs: twice as many images have to fit for sure.
            if device.type == "cpu" and 2 * peaks.get(size // 2, 0) > memory_info(device)[0]:
                break
            batch, = prefetch([pack(collate([row] * size))], device)
            learner.optimizer.zero_grad()
            reset_peak_memory(device)
            step(learner.network, learner.criterion, learner.optimizer, [batch], 0.0, sharing,
                 learner.precision)
            peaks[size] = peak_memory(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not peaks:
            raise UserError("--batch_size=auto: not even a step of one image fits "
                            f"({first_line(error)}); choose a smaller input (--max_size) or "
                            "another configuration") from None
    need = MemoryNeed.from_peaks(peaks)
    # Several processes send gradients in buckets, which hold all of them once more.
    copies = learner.optimizer.flat.numel() * learner.optimizer.flat.element_size() * buckets
    return need._replace(fixed=need.fixed + copies)


def available_bytes(device: torch.device, num_workers: int,
                    environ: Mapping[str, str]) -> tuple[int, str]:
    """Bytes that one process of the training may take, and where, in words.

    Raises:
        UserError: the system does not say.
    """
    available, total = memory_info(device)
    if not available or (device.type == "cpu" and not peak_memory(device)):
        raise UserError(f"--batch_size=auto: this system does not tell how much memory {device} "
                        "has; give a number")
    if device.type == "cpu":
        local = environ.get("LOCAL_WORLD_SIZE") or environ.get("NPROC") or "1"
        ranks = whole_number(local) or 1
        return (max(0, available // ranks - num_workers * WORKER_BYTES),
                "free memory of this host" + (" for each process" if ranks > 1 else ""))
    others = held_by_others(available, total)
    shared = f" (others hold {in_gib(others)} of its {in_gib(total)})" if others else ""
    return available, f"free memory of {device}{shared}"


def choose_batch_size(need: MemoryNeed, available: tuple[int, str], processes: Processes,
                      device: torch.device, limits: Mapping[str, int]) -> tuple[int, str]:
    """Images per card for --batch_size=auto, the same on all cards, and why.

    The largest even number that leaves a tenth of the memory free and is within all limits. Even,
    because kernels and a later --accumulate like it; a power of two would leave up to half of the
    memory unused.

    `available` comes from `available_bytes`; `limits` are images per card that something else
    allows, by what it is in words.

    Raises:
        UserError: not one image fits.
    """
    usable = int(available[0] * (1 - MARGIN))
    fits = min(map(int, gather_bytes(b"%d" % need.largest_batch(usable), processes, device)))
    if fits < 1:
        raise UserError(f"--batch_size=auto: not one image fits, it takes {need.sentence(1)} and "
                        f"there is {in_gib(usable)} ({available[1]}); choose a smaller input "
                        "(--max_size) or another configuration")
    limits = {"what fits": fits, **limits}
    reason = min(limits, key=lambda name: limits[name])
    chosen = limits[reason]
    chosen = max(chosen if chosen < 2 else chosen // 2 * 2, 1)
    return chosen, (f"{chosen} per card, by {reason}: {need.sentence(chosen)}; {in_gib(usable)} of "
                    f"{available[1]} may be used")


def resumed_batch_size(weights_path: str, shares: int) -> int | None:
    """Images per card of the training that is resumed; None where only its weights are left.

    Raises:
        UserError: its steps cannot be divided into `shares` pieces, cards x micro-batches.
    """
    state = load_state(weights_path)
    if state is None:
        return None
    batch = int(state["global_batch"])
    if batch % shares:
        raise UserError(f"--batch_size=auto: '{weights_path}' was trained with {batch} images a "
                        f"step, which {shares} cards x micro-batches cannot share evenly; resume "
                        "it on as many cards as it had")
    return batch // shares
