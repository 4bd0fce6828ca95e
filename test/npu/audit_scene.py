"""What the audit runs: a network, its training step and its detection, on batches made up here."""

from __future__ import annotations

import itertools
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch

from data.augment import AugmentedSample
from data.batch import Batch, PackedBatch, bit_values, collate, pack
from data.config import Config, get_config
from data.targets import TargetMaker
from helpers import recorder
from helpers.recorder import Recorder, Step, calling_frame
from layers.anchors import make_priors
from layers.detection import Detect
from layers.multibox_loss import MultiBoxLoss, cross_entropy
from npu import counters
from npu.kernels import Call, parse
from train import train_step
from utils.amp import Precision, batch_norm_parameters
from utils.device import pin_memory_supported, synchronize
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.engine.observer import StepRecords
from utils.optimizer import build_optimizer
from utils.schedule import LearningRate
from yolact import build_yolact

ROOT = Path(__file__).resolve().parents[2]
SLOTS = 104
OBJECTS = (7, 30, 0, 7, 30, 100)
"""Objects per image of the steps; the first two are there to meet every signature once."""


@dataclass
class Measured:
    """One training step, or one detection."""

    name: str
    whole: Step
    parts: Dict[str, Step] = field(default_factory=dict)
    traffic: Optional[counters.Traffic] = None
    """None without the emulator."""
    kernels: Dict[str, int] = field(default_factory=dict)
    """Ready-made operators (aclnn) that ran; empty without the emulator."""
    calls: List[Tuple[Call, str]] = field(default_factory=list)
    """The same with their tensors, in order, and where each was asked for."""


class Meter:
    """Records operators, and the emulator's counters where there are any.

    The dispatch-level record of a part (loss, network, optimiser) is a part of the whole step's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.emulated = device.type == "npu" and counters.available()
        self._whole = Recorder(self._note if self.emulated else None)
        self._part: Dict[str, Step] = {}
        self._calls: List[Tuple[Call, str]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[Measured]:
        """Measure what runs inside; the result is complete after the block."""
        self._part = {}
        synchronize(self.device)
        if self.emulated:
            counters.reset()
            counters.take_plans()
        self._calls = []
        # Nodes of the graph remember where the forward pass made them.
        remember = torch.autograd.set_detect_anomaly(self.emulated, check_nan=False)
        with remember, self._whole.step() as whole:
            measured = Measured(name, whole)
            yield measured
        measured.parts = self._part
        if self.emulated:
            measured.traffic = self._read()
            measured.kernels = counters.operators()
            measured.calls = self._calls

    def _note(self, operator: str) -> None:
        lines = counters.take_plans()
        if lines:
            place = _place(operator)
            self._calls += [(parse(line), place) for line in lines]

    def _read(self) -> counters.Traffic:
        """Counters after the queue has drained, less the wait for that."""
        synchronize(self.device)
        found = counters.traffic()
        counters.reset_traffic()
        synchronize(self.device)
        return found._replace(synchronisations=max(
            0, found.synchronisations - counters.traffic().synchronisations))

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, recorded as a part of the step it is called in."""
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with Recorder().step() as step:
                result = function(*args, **kwargs)
            self._part[name] = step
            return result

        return recorded


def _place(operator: str) -> str:
    """"layers/masks.py:24 sort", where an operator was asked for; of the backward pass, the line
    whose gradient it computes.
    """
    node = torch._C._current_autograd_node()
    if node is None:
        frame = calling_frame(__file__)
        where = "" if frame is None else f"{frame.filename}:{frame.lineno}"
    else:
        stack = "".join(node.metadata.get("traceback_", ()))
        lines = [line for line in re.findall(r'File "([^"]+)", line (\d+)', stack)
                 if "/torch/" not in line[0] and line[0] not in (__file__, recorder.__file__)]
        where = "{}:{} backward".format(*lines[-1]) if lines else node.name()
    name = operator.split(".")[1]
    return f"{where.replace(str(ROOT) + '/', '')} {name}".strip()


class Scene:
    """Network, loss and optimiser of a recipe on a device."""

    def __init__(self, config: Config, batch_size: int, device: torch.device,
                 precision: Optional[Precision] = None,
                 row_losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy
                 ) -> None:
        self.config, self.batch_size, self.device = config, batch_size, device
        self.precision = precision or Precision(device=device)
        torch.manual_seed(0)
        self.network = build_yolact(config).to(device)
        self.criterion = MultiBoxLoss.from_config(config, self.network.maskiou_net,
                                                  row_losses=row_losses)
        self.detect = Detect.from_config(config)
        self.detect.compact = False  # a short cut that only the CPU takes
        kept = batch_norm_parameters(self.network) if self.precision.level == "O2" else ()
        self.optimizer = build_optimizer(config, self.network, last=kept)
        self.precision.prepare(self.network, self.optimizer)
        self.rate = LearningRate.from_config(config, batch_size)
        self.sharing = Sharing(Processes(), device)
        self.records = StepRecords()
        self.meter = Meter(device)
        self._bits = bit_values(device)
        self._targets = TargetMaker(
            make_priors(config).numpy(), config.num_classes, SLOTS, config.masks_to_train,
            config.max_size, config.proto_size, config.semantic_size, config.positive_iou,
            config.negative_iou, config.crowd_iou)

    def train(self, objects: Tuple[int, ...] = OBJECTS) -> List[Measured]:
        """One measured step for each number of objects per image."""
        self._learn()
        network = self.meter.part("network", self.network)
        criterion = self.meter.part("loss", self.criterion)
        update = self.optimizer.step
        self.optimizer.step = self.meter.part("optimiser", update)  # type: ignore[method-assign]
        steps = []
        for iteration, count in enumerate(objects):
            packed = self._packed_batch(count, iteration)
            with self.meter.measure(f"step {iteration + 1}, {count} objects per image") as measured:
                self._step(packed, iteration, network, criterion)
            steps.append(measured)
        self.optimizer.step = update  # type: ignore[method-assign]
        return steps

    def steps(self, objects: int = 7, kinds: int = 4) -> Iterator[None]:
        """Steps without end that nothing measures, each taken when it is asked for."""
        self._learn()
        batches = [self._packed_batch(objects, seed) for seed in range(kinds)]
        for iteration in itertools.count():
            self._step(batches[iteration % kinds], iteration, self.network, self.criterion)
            yield

    def _learn(self) -> None:
        self.network.train()
        if self.batch_size < 6:
            self.network.freeze_bn()

    def _step(self, packed: PackedBatch, iteration: int, network: Callable[..., Any],
              criterion: Callable[..., Any]) -> None:
        losses = train_step(network, criterion, self.optimizer, [self._to_device(packed)],
                            self.rate(iteration), self.sharing, self.precision)
        self.records.add(losses, self.optimizer.applied, self.precision.used_scale)

    @torch.no_grad()
    def find(self, times: int = 3) -> List[Measured]:
        """Measured detections of a batch, from pixels to `Detections` on the device: in float32 at
        every level, as validation and eval.py have it.
        """
        self.network.eval()
        detect = self.meter.part("detection", self.detect)
        network = self.meter.part("network", self.network)
        detections = []
        with self.precision.float32_weights(self.network):
            for number in range(times):
                images = self._pinned(self._packed_batch(7, number)).images
                with self.meter.measure(f"detection {number + 1}") as measured:
                    detect(network(images.to(self.device, non_blocking=True)))
                detections.append(measured)
        return detections

    def _to_device(self, packed: PackedBatch) -> Batch:
        return packed.to(self.device, non_blocking=True).unpack(self._bits)

    def _packed_batch(self, objects: int, seed: int) -> PackedBatch:
        rng = np.random.default_rng(seed)
        rows = [self._targets(_sample(self.config, objects, rng, image + 1), rng)
                for image in range(self.batch_size)]
        return self._pinned(pack(collate(rows)))

    def _pinned(self, packed: PackedBatch) -> PackedBatch:
        return packed.pin_memory() if pin_memory_supported(self.device) else packed


def shrunk(name: str, size: Optional[int]) -> Config:
    """A recipe, at another input side if one is given: the operators stay the same, only faster."""
    config = get_config(name)
    if size is None or size == config.max_size:
        return config
    scales = tuple(tuple(side * size / config.max_size for side in level)
                   for level in config.pred_scales)
    return get_config(name, max_size=size, pred_scales=scales)


def _sample(config: Config, objects: int, rng: np.random.Generator, image_id: int) -> Any:
    """Boxes of all sizes, each filled by its mask, over noise."""
    side = config.max_size
    corner = rng.uniform(0, 0.7, (objects, 2))
    extent = rng.uniform(0.03, 0.3, (objects, 2))
    boxes = np.concatenate([corner, corner + extent], axis=1).astype(np.float32)
    masks = np.zeros((objects, side, side), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, np.round(boxes * side).astype(int)):
        mask[y1:y2 + 1, x1:x2 + 1] = 1
    return AugmentedSample(
        image=rng.integers(0, 256, (side, side, 3), dtype=np.uint8), boxes=boxes,
        labels=rng.integers(1, config.num_classes, objects), masks=masks,
        crowd_boxes=np.zeros((0, 4), np.float32), image_id=image_id,
        mask_extents=np.tile([0, 0, side, side], (objects, 1)))
