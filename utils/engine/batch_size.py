"""--batch_size=auto: the largest batch that fits into a card's memory, agreed by all cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist

from data.augment import AugmentedSample
from data.batch import Batch, bit_values, collate, pack
from data.config import NOT_FROZEN, WHOLE_BACKBONE, Config
from data.targets import TargetMaker
from layers.anchors import make_priors
from layers.mask_iou import MaskIouNet
from layers.multibox_loss import MultiBoxLoss
from utils.amp import batch_norm_parameters, build_precision
from utils.checkpoint import load_state, rng_state, set_rng_state
from utils.device import synchronize
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing, shared_step
from utils.errors import UserError
from utils.memory import (
    MARGIN,
    MemoryNeed,
    activations,
    held_by_others,
    host_available,
    in_gib,
    memory_info,
    peak_memory,
    process_peak,
    release_memory,
    reset_peak_memory,
    round_down,
)
from utils.optimizer import FlatOptimizer, build_optimizer
from yolact import Yolact, build_yolact

SAMPLE_SIDE = 138
"""Input side at which an estimate looks at what the network's modules keep."""
UPDATE_COPIES = 2.3
"""What the optimiser makes while it works (the flat gradient and a temporary), in sizes of all
trained parameters; the gradients themselves are one more. Read off the NPU plugin's allocator."""
TARGET_BYTES = 24
"""Of each prior in a batch: class, box and what they are matched by."""
SPARE_BYTES = 24 << 20
"""What the NPU plugin's allocator gives out beyond what tensors need; it rounds up."""
FLOAT = 4


def estimate(config: Config, model: Yolact, optimizer: FlatOptimizer,
             level: str = "O0") -> MemoryNeed:
    """Memory of one card for training `model` at a precision; nothing runs on the device."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    trained = optimizer.flat.numel() * optimizer.flat.element_size()
    fixed = parameters + buffers + trained * len(optimizer.buffer_names) + SPARE_BYTES
    if level != "O0":
        fixed += trained // 2
    return MemoryNeed(fixed, _per_image(config, model, level != "O0"),
                      int(fixed + trained * UPDATE_COPIES))


def _per_image(config: Config, model: Yolact, half: bool) -> int:
    """Bytes of an image at the worst moment: when the loss is known, or later, going backward."""
    pixels, priors = config.proto_size ** 2, _num_priors(config)
    sizes = _activation_sizes(config, model, half)
    batch = 3 * config.max_size ** 2 + config.masks_to_train * pixels + TARGET_BYTES * priors
    heads = FLOAT * priors * (4 + config.num_classes + config.num_prototypes)
    if half:  # the loss takes them in float32
        batch += heads + FLOAT * pixels * config.num_prototypes
    at_loss = sum(sizes) + _loss_bytes(config, model)
    # A gradient goes into a module and another one comes out, while those of the heads wait.
    backward, held = 0.0, 0.0
    for size in sizes:
        held += size
        backward = max(backward, held + 2 * size + heads)
    return int(batch + max(at_loss, backward))


def _activation_sizes(config: Config, model: Yolact, half: bool) -> List[float]:
    """Bytes that the network's modules keep of an image, in the order in which they ran.

    A small image is run. Maps grow with the image, each as its own level of halvings does, which
    rounds up: half of 275 pixels is 138.
    """
    small = _shrunk(config)
    twin = build_yolact(small)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    if model.bn_frozen:
        twin.freeze_bn()
    image = torch.zeros(1, 3, small.max_size, small.max_size, dtype=torch.uint8)
    sizes = []
    for found in activations(twin, lambda: twin(image)):
        growth = _num_priors(config) / _num_priors(small)
        if found.side:
            growth = (_side_at(config.max_size, small.max_size, found.side) / found.side) ** 2
        sizes.append((found.half if half else found.single) * growth)
    return sizes


def _side_at(size: int, small: int, side: int) -> float:
    """Side of a map of an image of `size` pixels, where a `small` one's is `side`."""
    for zoom in (1, 2):  # the prototypes are a map of twice its level
        large_level, small_level = size, small
        while small_level >= side // zoom and small_level > 1:
            if zoom * small_level == side:
                return zoom * large_level
            large_level, small_level = (large_level + 1) // 2, (small_level + 1) // 2
    return side * size / small


def _num_priors(config: Config) -> int:
    return config.num_anchors * sum(side * side for side in config.feature_sizes)


def _shrunk(config: Config) -> Config:
    side = min(SAMPLE_SIDE, config.max_size)
    scales = tuple(tuple(s * side / config.max_size for s in level) for level in config.pred_scales)
    return config.replace(max_size=side, pred_scales=scales, use_maskiou=False)


def _loss_bytes(config: Config, model: Yolact) -> float:
    """What the loss keeps of an image for its backward pass, and its first gradient."""
    pixels = config.proto_size ** 2 * config.masks_to_train
    size = FLOAT * _num_priors(config) * config.num_classes  # logarithms of the probabilities
    size += FLOAT * config.semantic_size ** 2 * (config.num_classes - 1)
    # Masks as they came, as numbers, their logits, weights of their pixels, and a gradient.
    size += (4 * FLOAT + 1) * pixels
    if model.maskiou_net is None:
        return size
    network = MaskIouNet(config.num_classes)
    mask = torch.zeros(1, 1, config.proto_size, config.proto_size, requires_grad=True)
    kept = sum(found.single for found in activations(network, lambda: network(mask)))
    # Uncropped soft masks and where they are cropped, and while the true IoU is computed, numbers
    # of what was found, of the true masks, and their product.
    return size + kept * config.masks_to_train + (3 * FLOAT + 2) * pixels


class Trial(NamedTuple):
    """What trial steps need to know; plain types only, since it travels to another process."""

    config: Dict[str, Any]
    slots: int
    """Ground-truth slots of the batches: the memory of the fullest image counts."""
    precision: Tuple[str, Optional[str], str]
    """--opt_level, --loss_scale, --amp_dtype."""
    extra_copies: int
    """Of all trained parameters, beside what one card holds: averages, buckets of gradients."""


class _NotingPeak:
    """Stands in for the optimiser; notes the peak before it works, that of gradients, and after.

    The peak of a process only grows, and what was freed may stay with it. So on the CPU nothing is
    updated, or the second image would hide behind the first update, which is reckoned instead.
    """

    def __init__(self, optimizer: FlatOptimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.gradients, self.update = 0, 0

    @property
    def step_finite(self) -> torch.Tensor:
        return self.optimizer.step_finite

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        reset_peak_memory(self.device)

    def step(self, *args: Any) -> None:
        self.gradients = _peak(self.device)
        if self.device.type != "cpu":
            reset_peak_memory(self.device)
            self.optimizer.step(*args)
            self.update = _peak(self.device)


def _peak(device: torch.device) -> int:
    if device.type == "cpu":
        return process_peak() or 0
    synchronize(device)
    return peak_memory(device)


def try_steps(trial: Trial, device: torch.device) -> MemoryNeed:
    """Train on one image and on two, on random weights, and tell what that took.

    On the CPU that is the memory of the whole process.
    """
    config = Config.from_dict(trial.config)
    model = build_yolact(config)
    if config.freeze != NOT_FROZEN:
        model.freeze_backbone(None if config.freeze == WHOLE_BACKBONE else int(config.freeze))
    model = model.to(device).train()
    precision = build_precision(*trial.precision, device)
    optimizer = build_optimizer(
        config, model, last=batch_norm_parameters(model) if precision.level == "O2" else ())
    precision.prepare(model, optimizer)
    criterion = MultiBoxLoss.from_config(config, model.maskiou_net).to(device)
    row = _full_image(config, trial.slots)
    noting = _NotingPeak(optimizer, device)
    peaks: List[int] = []
    for count in (1, 2):
        batch = _on_device(collate([row] * count), device)
        shared_step(model, criterion, noting, [batch],  # type: ignore[arg-type]
                    0.0, Sharing(Processes(), device), precision=precision)
        peaks.append(noting.gradients)
    need = MemoryNeed.from_peaks(peaks[0], peaks[1], noting.update)
    trained = optimizer.flat.numel() * optimizer.flat.element_size()
    # One image or two may have their peak later than many have theirs, when the gradients of the
    # weights are there and activations few; then the second image seems small. And on the CPU what
    # the first one left behind may have served it.
    known = estimate(config, model, optimizer, precision.level).per_image
    need = need._replace(per_image=max(need.per_image, known))
    if device.type == "cpu":
        need = need._replace(update=int(need.fixed + trained * UPDATE_COPIES))
    extra = trial.extra_copies * trained
    return MemoryNeed(need.fixed + extra, need.per_image, need.update + extra)


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


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """As the training gets it: packed on the way."""
    if device.type == "cpu":
        return batch
    return pack(batch).to(device).unpack(bit_values(device))


def measure(trial: Trial, device: torch.device) -> MemoryNeed:
    """What training takes on `device`, by `try_steps`; leaves no trace in the random generators."""
    if device.type == "cpu":
        return _measure_in_child(trial)
    state = rng_state()
    need = try_steps(trial, device)
    set_rng_state(state)
    release_memory(device)
    return need


def _measure_in_child(trial: Trial) -> MemoryNeed:
    project = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([sys.executable, "-m", "utils.engine.batch_size"], cwd=project,
                          input=json.dumps(trial), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"killed, exit code {done.returncode}"]
        raise UserError("--batch_size=auto: the trial steps with one and two images failed "
                        f"({lines[-1]}); give a number")
    return MemoryNeed(*json.loads(done.stdout))


def main() -> int:
    """Make the trial steps that standard input describes; print what they took."""
    config, slots, precision, extra_copies = json.load(sys.stdin)
    need = try_steps(Trial(config, slots, tuple(precision), extra_copies), torch.device("cpu"))
    print(json.dumps(need))
    return 0


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
            shared = f" (others hold {in_gib(others)} of its {in_gib(info[1])})"
            return info[0], "free memory of {}{}".format(device, shared if others else "")
    raise UserError(f"--batch_size=auto: this system does not tell how much memory {device} has; "
                    "give a number")


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
              f"{LARGEST_STEP} images a step, beyond which the learning rate is not known to "
              "work": max(1, LARGEST_STEP // shares),
              f"the {num_images} images of the training set": num_images // shares,
              **(more_limits or {})}
    chosen = round_down(min(limits.values()))
    if fits < 1:
        raise UserError(f"--batch_size=auto: not one image fits, it takes {need.sentence(1)} and "
                        f"there is {in_gib(usable)} ({where}); choose a smaller input or another "
                        "configuration")
    reason = next(name for name, limit in limits.items() if limit == min(limits.values()))
    chosen = max(chosen, 1)
    return Choice(chosen, f"{chosen} per card, by {reason}: {need.sentence(chosen)}; "
                          f"{in_gib(usable)} of {where} may be used")


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
        raise UserError(f"--batch_size=auto: '{weights_path}' was trained with {batch} images a "
                        f"step, which {shares} cards x parts cannot share evenly; resume it on as "
                        "many cards as it had")
    return Choice(batch // shares, f"{batch // shares} per card, as in {weights_path}")


def _smallest(value: int, processes: Processes, device: torch.device) -> int:
    """The smallest of all processes' values, in all of them."""
    if processes.world_size == 1:
        return value
    values = torch.zeros(processes.world_size, dtype=torch.int32, device=device)
    values[processes.rank] = min(value, 1 << 20)
    dist.all_reduce(values)
    return min(values.tolist())


if __name__ == "__main__":
    sys.exit(main())
