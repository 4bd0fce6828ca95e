"""Evaluation shared among processes: who takes which images, how detections come together."""

from __future__ import annotations

import contextlib
import json
from typing import Any, ContextManager, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.amp import Precision
from utils.compat import unsynchronised_buffers
from utils.distributed.processes import Processes
from utils.optimizer import FlatOptimizer, poison


class Sharing:
    """How the batch of a step is divided, and what the processes agree on in every step.

    A step of B x W x N images runs as N parts, one after the other, on each of W cards.

    Args:
        processes: all of the run.
        device: that the parts lie on.
        parts: N, parts of a step on each card.
    """

    def __init__(self, processes: Processes, device: torch.device, parts: int = 1) -> None:
        self.processes = processes
        self.parts = parts
        self._zero = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._agreed: Optional[Tensor] = None
        self._handle: Any = None

    @property
    def shares(self) -> int:
        """W x N: into how many pieces a step's images are divided."""
        return self.processes.world_size * self.parts

    def begin(self, parts: Sequence[Any], stop_requested: bool) -> None:
        """Queue one all-reduce of two numbers; it runs beside the forward pass.

        Args:
            parts: this card's batches of the step, with `num_positives`.
            stop_requested: whether this process wants to stop.
        """
        if self.shares == 1:
            return
        positives = torch.stack([part.num_positives.sum() for part in parts]).sum().float()
        self._agreed = torch.stack([positives, self._one if stop_requested else self._zero])
        if self.processes.world_size > 1:
            self._handle = dist.all_reduce(self._agreed, async_op=True)

    def positives_per_share(self) -> Optional[Tensor]:
        """The whole step's positives (at least 1) / shares, 0-d; None for an undivided step.

        With losses divided by this and gradients averaged over the shares, the gradient is that of
        the undivided step.
        """
        if self._agreed is None:
            return None
        self._wait()
        return self._agreed[0].clamp(min=1) / self.shares

    def stop_agreed(self) -> bool:
        """Whether any process wanted to stop when the last step began. Waits for the device."""
        if self._agreed is None or self.processes.world_size == 1:
            return False
        self._wait()
        return bool(self._agreed[1] > 0)

    def on_any_card(self, flag: Tensor) -> Tensor:
        """`flag` (float), added up over all cards. The host does not wait."""
        if self.processes.world_size == 1:
            return flag
        total = flag.clone()
        handle = dist.all_reduce(total, async_op=True)
        handle.wait()
        return total

    def local_gradients(self, network: nn.Module, last: bool) -> ContextManager[Any]:
        """Context of one part: gradients travel between the cards with the last one only."""
        if last or not isinstance(network, nn.parallel.DistributedDataParallel):
            return _nothing()
        return network.no_sync()

    def _wait(self) -> None:
        if self._handle is not None:
            self._handle.wait()
            self._handle = None


@contextlib.contextmanager
def _nothing() -> Any:
    yield


def wrap(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """`model`, wrapped so that gradients are averaged over the processes where there are several.

    Buffers are not sent in every step: only validation and checkpoints look at the running
    statistics of batch norm, see `share_buffers`.
    """
    if processes.world_size == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device], **unsynchronised_buffers())


def shared_step(network: nn.Module, criterion: nn.Module, optimizer: FlatOptimizer,
                parts: Sequence[Any], lr: float, sharing: Sharing,
                stop_requested: bool = False,
                precision: Optional[Precision] = None) -> Dict[str, Tensor]:
    """One update from a batch that is divided among cards and into parts, one after the other.

    The update is that of the undivided batch; it is skipped on all cards where one is not finite.

    Args:
        network: from `wrap`.
        criterion: called with predictions, part and the number of positives to divide by.
        optimizer: of the network's parameters.
        parts: this card's `Batch`es of the step.
        lr: learning rate.
        sharing: how the batch is divided.
        stop_requested: see `Sharing.begin`.
        precision: of the network's forward and backward pass; by default float32.

    Returns:
        this card's losses, on the device.
    """
    precision = precision or Precision()
    sharing.begin(parts, stop_requested)
    optimizer.zero_grad()
    shown: Dict[str, Tensor] = {}
    for part in parts:
        with sharing.local_gradients(network, last=part is parts[-1]):
            with precision.forward():
                predictions = network(part.images)
            losses = criterion(precision.widen(predictions), part, sharing.positives_per_share())
            if len(parts) > 1:
                losses = {name: loss / len(parts) for name, loss in losses.items()}
            precision.backward(poison(total_of(losses)))
        for name, loss in losses.items():
            shown[name] = shown[name] + loss.detach() if name in shown else loss.detach()
    overflow = precision.take_overflow()
    if overflow is not None:
        overflow = sharing.on_any_card(overflow)
    precision.step(optimizer, lr, overflow)
    return shown


def share_buffers(model: nn.Module, processes: Processes) -> None:
    """Give every process the main one's running statistics, which are those that are saved."""
    if processes.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def told_by_main(verdict: bool, processes: Processes, device: torch.device) -> bool:
    """The main process's `verdict`, in all of them; several processes wait for the device."""
    if processes.world_size == 1:
        return verdict
    told = torch.full((1,), int(verdict), dtype=torch.int32, device=device)
    dist.broadcast(told, 0)
    return bool(told.item())


def gather_bytes(data: bytes, processes: Processes, device: torch.device,
                 chunk_bytes: int = 1 << 26) -> List[bytes]:
    """Everybody's `data`, by rank, in the main process; an empty list in the others.

    Travels as int32 tensors of at most `chunk_bytes`, a type and a size that all backends take.
    """
    if processes.world_size == 1:
        return [data]
    length = torch.zeros(processes.world_size, dtype=torch.int32, device=device)
    words = -(-len(data) // 4)
    length[processes.rank] = words
    spare = torch.zeros_like(length)
    spare[processes.rank] = 4 * words - len(data)
    dist.all_reduce(length)
    dist.all_reduce(spare)
    received: List[bytes] = []
    for sender, (total, unused) in enumerate(zip(length.tolist(), spare.tolist())):
        pieces = []
        for start in range(0, total, chunk_bytes // 4):
            count = min(chunk_bytes // 4, total - start)
            piece = torch.zeros(count, dtype=torch.int32)
            if sender == processes.rank:
                part = data[4 * start:4 * (start + count)]
                padded = bytearray(part + bytes(4 * count - len(part)))
                # A copy of PyTorch's own: memory that Python owns is given back under Python's
                # lock, and a thread of gloo that waits for it holds up the end of the process.
                piece = torch.from_numpy(np.frombuffer(padded, np.int32)).clone()
            piece = piece.to(device)
            dist.broadcast(piece, sender)
            if processes.is_main:
                pieces.append(piece.cpu().numpy().tobytes())
        if processes.is_main:
            whole = b"".join(pieces)
            received.append(whole[:len(whole) - unused])
    return received


def total_of(losses: Dict[str, Tensor]) -> Tensor:
    """Sum of the weighted losses, a 0-d tensor."""
    values: Sequence[Tensor] = list(losses.values())
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


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
        raise RuntimeError(f"{len(place)} images were chosen, {len(entries)} came back from "
                           f"{processes.world_size} processes")
    return sorted(entries, key=lambda entry: place[entry[0]])
