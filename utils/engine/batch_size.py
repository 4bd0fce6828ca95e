"""--batch_size=auto: the largest batch that fits into a card's memory, agreed by all cards.

A step takes a fixed part (weights, gradients, optimiser) and a part for every image (activations,
their gradients, the batch itself). Two trial steps of different batch sizes show both.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.augment import AugmentedSample
from data.batch import collate, pack
from data.config import NOT_FROZEN, WHOLE_BACKBONE, Config
from data.loader import prefetch
from data.targets import TargetMaker
from layers.anchors import make_priors
from layers.multibox_loss import MultiBoxLoss
from utils.amp import batch_norm_parameters, build_precision
from utils.checkpoint import load_state, rng_state, set_rng_state
from utils.device import synchronize
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.errors import UserError
from utils.memory import (
    MARGIN,
    held_by_others,
    host_available,
    in_gib,
    is_out_of_memory,
    memory_info,
    peak_memory,
    process_peak,
    release_memory,
    reset_peak_memory,
)
from utils.optimizer import build_optimizer
from yolact import build_yolact

TRIAL_SIZES = ((4, 8), (2, 4), (1, 2))
"""Images of the two trial steps; the first pair that fits counts. With fewer the peak comes when
activations are few and the gradients of the weights are there, so that one image more seems to take
less than it does."""
LARGEST_STEP = 64
"""Images of a step that `auto` chooses at most. The learning rate grows with them, and eight cards
of eight images are the most that this recipe is known to learn with."""
WORKER_BYTES = 256 << 20
"""What a loader process takes beside what it shares, on a host whose memory trains, too."""

TrainStep = Callable[..., Dict[str, Tensor]]
"""`train.train_step`; given by the caller, since it stands above this module."""

Peaks = Tuple[int, int]
"""Most bytes of a step: until its gradients are there, and with the update."""


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
        return max(0, (available - self.fixed) // self.per_image)

    def sentence(self, batch_size: int) -> str:
        """For people."""
        largest = self.of_batch(batch_size)
        update = f"; the optimiser {in_gib(self.update)}" if largest == self.update else ""
        return (f"{in_gib(largest)} for {batch_size} image{'' if batch_size == 1 else 's'} "
                f"({in_gib(self.fixed)} + {in_gib(self.per_image)} per image{update})")

    @staticmethod
    def from_peaks(sizes: Sequence[int], peaks: Sequence[Peaks]) -> MemoryNeed:
        """The line through two trial steps."""
        (fewer, update), (more, _) = peaks
        per_image = max((more - fewer) // (sizes[1] - sizes[0]), 1)
        return MemoryNeed(max(fewer - sizes[0] * per_image, 0), per_image, update)


class Trial(NamedTuple):
    """What trial steps need to know; it travels to another process."""

    config: Config
    slots: int
    """Ground-truth slots of the batches: the memory of the fullest image counts."""
    precision: Tuple[str, Optional[str], str]
    """--opt_level, --loss_scale, --amp_dtype."""
    extra_copies: int
    """Of all trained parameters, beside what one card holds: averages, buckets of gradients."""


def measure(trial: Trial, device: torch.device, step: TrainStep) -> MemoryNeed:
    """What training takes on `device`; leaves no trace in the random generators."""
    state = rng_state()
    # On the CPU all but a computer's memory may go, and with it other programs.
    pairs = TRIAL_SIZES[1:] if device.type == "cpu" else TRIAL_SIZES
    try:
        for sizes in pairs[:-1]:
            with contextlib.suppress(MemoryError):
                return MemoryNeed.from_peaks(sizes, _peaks(trial, device, step, sizes))
            release_memory(device)
        return MemoryNeed.from_peaks(pairs[-1], _peaks(trial, device, step, pairs[-1]))
    finally:
        set_rng_state(state)
        release_memory(device)


def _peaks(trial: Trial, device: torch.device, step: TrainStep,
           sizes: Sequence[int]) -> List[Peaks]:
    """`try_steps`, on the CPU in processes: a process's peak only grows, so each step has its own.

    Raises:
        MemoryError: the device or the host had too little.
    """
    try:
        if device.type != "cpu":
            return try_steps(trial, device, step, sizes)
        peaks = []
        for size in sizes:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                peaks += executor.submit(try_steps, trial, device, step, (size,)).result()
        return peaks
    except RuntimeError as error:
        if not is_out_of_memory(error) and not isinstance(error, BrokenProcessPool):
            raise
        reason = str(error)
    raise MemoryError(f"steps of {' and '.join(map(str, sizes))} images were tried: {reason}")


def try_steps(trial: Trial, device: torch.device, step: TrainStep,
              sizes: Sequence[int]) -> List[Peaks]:
    """Train on so many images at a time, on random weights, and tell what that took."""
    config = trial.config
    model = build_yolact(config)
    if config.freeze != NOT_FROZEN:
        model.freeze_backbone(None if config.freeze == WHOLE_BACKBONE else int(config.freeze))
    model = model.to(device).train()
    precision = build_precision(*trial.precision, device)
    optimizer = build_optimizer(
        config, model, last=batch_norm_parameters(model) if precision.level == "O2" else ())
    precision.prepare(model, optimizer)
    criterion = MultiBoxLoss.from_config(config, model.maskiou_net).to(device)
    row, sharing = _full_image(config, trial.slots), Sharing(Processes(), device)
    extra = trial.extra_copies * optimizer.flat.numel() * optimizer.flat.element_size()
    update, gradients = optimizer.step, []

    def note_then_update(*args: Any) -> None:
        gradients.append(_peak(device) + extra)
        update(*args)

    optimizer.step = note_then_update  # type: ignore[method-assign, assignment]
    peaks = []
    try:
        for size in sizes:
            batch, = prefetch([pack(collate([row] * size))], device)
            optimizer.zero_grad()
            reset_peak_memory(device)
            step(model, criterion, optimizer, [batch], 0.0, sharing, precision)
            peaks.append((gradients[-1], _peak(device) + extra))
    finally:
        del optimizer.step  # a circle of references would keep all this in the card's memory
    return peaks


def _peak(device: torch.device) -> int:
    if device.type == "cpu":
        return process_peak() or 0
    synchronize(device)
    return peak_memory(device)


def _full_image(config: Config, slots: int) -> Dict[str, Any]:
    """Row of a batch with an object in every slot."""
    side = config.max_size
    sample = AugmentedSample(
        image=np.zeros((side, side, 3), np.uint8),
        boxes=np.tile(np.array([[0.1, 0.1, 0.9, 0.9]], np.float32), (slots, 1)),
        labels=np.ones(slots, np.int64), masks=np.ones((slots, side, side), np.uint8),
        crowd_boxes=np.zeros((0, 4), np.float32), image_id=0)
    targets = TargetMaker(
        make_priors(config).numpy(), config.num_classes, slots, config.masks_to_train, side,
        config.proto_size, config.semantic_size, config.positive_iou, config.negative_iou,
        config.crowd_iou)
    return targets(sample, np.random.default_rng(0))


def available_bytes(device: torch.device, num_workers: int,
                    environ: Mapping[str, str]) -> Tuple[int, str]:
    """Bytes that one process of the training may take, and where, in words.

    Raises:
        UserError: the system does not say.
    """
    found = host_available() if device.type == "cpu" else None
    if found is not None and process_peak() is not None:
        local = environ.get("LOCAL_WORLD_SIZE") or environ.get("NPROC") or "1"
        ranks = int(local) if local.isdigit() and int(local) else 1
        return (max(0, found // ranks - num_workers * WORKER_BYTES),
                "free memory of this host" + (" for each process" if ranks > 1 else ""))
    info = memory_info(device)
    if info is not None:
        others = held_by_others(*info)
        shared = f" (others hold {in_gib(others)} of its {in_gib(info[1])})" if others else ""
        return info[0], f"free memory of {device}{shared}"
    raise UserError(f"--batch_size=auto: this system does not tell how much memory {device} has; "
                    "give a number")


class Choice(NamedTuple):
    """A batch size and why."""

    batch_size: int
    sentence: str


def choose_batch_size(trial: Trial, device: torch.device, processes: Processes,
                      micro_batches: int, num_images: int, step: TrainStep, num_workers: int = 0,
                      more_limits: Optional[Mapping[str, int]] = None) -> Choice:
    """Images per card for --batch_size=auto, the same on all cards.

    The largest even number that leaves a tenth of the memory free, makes steps of at most
    `LARGEST_STEP` images and leaves a step's worth of images in the dataset. Even, because kernels
    and a later --accumulate like it; a power of two would leave up to half of the memory unused.

    Args:
        trial: what is trained.
        device: of this process.
        processes: all of the run.
        micro_batches: of each card in a step (--accumulate).
        num_images: of the training set.
        step: `train.train_step`.
        num_workers: loader processes of this one.
        more_limits: images per card that something else allows, by what it is in words.

    Raises:
        UserError: not one image fits, or what a system has is not known.
    """
    need = measure(trial, device, step)
    available, where = available_bytes(device, num_workers, os.environ)
    usable = int(available * (1 - MARGIN))
    fits = _smallest(need.largest_batch(usable), processes, device)
    if fits < 1:
        raise UserError(f"--batch_size=auto: not one image fits, it takes {need.sentence(1)} and "
                        f"there is {in_gib(usable)} ({where}); choose a smaller input (--max_size) "
                        "or another configuration")
    shares = processes.world_size * micro_batches
    limits = {"what fits": fits,
              f"{LARGEST_STEP} images a step, beyond which the learning rate is not known to "
              "work": max(1, LARGEST_STEP // shares),
              f"the {num_images} images of the training set": num_images // shares,
              **(more_limits or {})}
    reason = min(limits, key=lambda name: limits[name])
    chosen = limits[reason]
    chosen = max(chosen if chosen < 2 else chosen // 2 * 2, 1)
    return Choice(chosen, f"{chosen} per card, by {reason}: {need.sentence(chosen)}; "
                          f"{in_gib(usable)} of {where} may be used")


def resumed_batch_size(weights_path: str, shares: int) -> Optional[Choice]:
    """Images per card of the training that is resumed; None where only its weights are left.

    Args:
        weights_path: checkpoint.
        shares: pieces that a step is divided into, cards x micro-batches.

    Raises:
        UserError: its steps cannot be divided into as many pieces.
    """
    state = load_state(weights_path)
    if state is None:
        return None
    batch = int(state["global_batch"])
    if batch % shares:
        raise UserError(f"--batch_size=auto: '{weights_path}' was trained with {batch} images a "
                        f"step, which {shares} cards x micro-batches cannot share evenly; resume "
                        "it on as many cards as it had")
    return Choice(batch // shares, f"{batch // shares} per card, as in {weights_path}")


def _smallest(value: int, processes: Processes, device: torch.device) -> int:
    """The smallest of all processes' values, in all of them."""
    if processes.world_size == 1:
        return value
    values = torch.zeros(processes.world_size, dtype=torch.int32, device=device)
    values[processes.rank] = min(value, 1 << 20)
    dist.all_reduce(values)
    return min(values.tolist())
