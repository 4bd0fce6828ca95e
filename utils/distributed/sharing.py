"""How the processes of a run share its work: the images of a step, and those of an evaluation."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, ContextManager, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.compat import unsynchronised_buffers
from utils.distributed.processes import Processes
from utils.errors import UserError

if TYPE_CHECKING:
    from data.batch import Batch


class Sharing:
    """How the batch of a step is divided, and what the processes agree on in every step.

    A step of B x W x N images runs as N micro-batches, one after the other, on each of W cards.
    """

    def __init__(self, processes: Processes, device: torch.device, micro_batches: int = 1) -> None:
        self.processes = processes
        self.micro_batches = micro_batches
        self._zero, self._one, self._stop = torch.tensor([0.0, 1.0, 0.0], device=device)
        # Positives of the step, how many processes want to stop, and how many have voided it.
        self._agreed = torch.zeros(3, device=device) if self.shares > 1 else None
        self._handle: Any = None

    @property
    def shares(self) -> int:
        """W x N: into how many pieces a step's images are divided."""
        return self.processes.world_size * self.micro_batches

    def request_stop(self) -> None:
        """Tell the others, from the next step on, that this process wants to stop."""
        self._stop.fill_(1)

    def begin(self, micro_batches: Sequence[Batch], void: bool = False) -> None:
        """Queue one all-reduce for this card's batches of a step, for whether there is a stop
        request to this process, and whether it has voided the step; it runs beside the forward
        pass.
        """
        if self._agreed is None:
            return
        # Added up as floats: sums of integers have 64 bits, which are slow on NPU.
        positives = torch.cat([batch.num_positives for batch in micro_batches]).float().sum()
        torch.stack([positives, self._stop, self._one if void else self._zero], out=self._agreed)
        if self.processes.world_size > 1:
            self._handle = dist.all_reduce(self._agreed, async_op=True)

    def positives_per_share(self) -> Tensor | None:
        """The whole step's positives (at least 1) / shares, 0-d; None for an undivided step.

        With losses divided by this and gradients averaged over the shares, the gradient is that of
        the undivided step.
        """
        if self._agreed is None:
            return None
        self._wait()
        return self._agreed[0].clamp(min=1) / self.shares

    def stop_agreed(self) -> bool:
        """Whether any process had a stop request when the last step began. Waits for the device."""
        return self._told_by_any(1)

    def is_void(self) -> bool:
        """Whether any process has voided the last step. Waits for the device."""
        return self._told_by_any(2)

    def _told_by_any(self, place: int) -> bool:
        if self._agreed is None or self.processes.world_size == 1:
            return False
        self._wait()
        return bool(self._agreed[place] > 0)

    def on_any_card(self, flag: Tensor) -> Tensor:
        """`flag` (float), added up over all cards. The host does not wait."""
        if self.processes.world_size == 1:
            return flag
        total = flag.clone()
        dist.all_reduce(total)
        return total

    def local_gradients(self, network: nn.Module, last: bool) -> ContextManager[Any]:
        """Context of one micro-batch: gradients travel between the cards with the last only."""
        if last or not isinstance(network, nn.parallel.DistributedDataParallel):
            return contextlib.ExitStack()  # nothing
        return network.no_sync()

    def _wait(self) -> None:
        if self._handle is not None:
            self._handle.wait()
            self._handle = None


def wrap(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """`model`, wrapped so that gradients are averaged over the processes where there are several.

    Buffers are not sent in every step: only validation and checkpoints look at the running
    statistics of batch norm, see `share_buffers`.
    """
    if processes.world_size == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device], **unsynchronised_buffers())


def share_buffers(model: nn.Module, processes: Processes) -> None:
    """Give every process the main one's running statistics, which are those that are saved."""
    if processes.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def broadcast_from_main(verdict: bool, processes: Processes, device: torch.device) -> bool:
    """The main process's `verdict`, in all of them; several processes wait for the device."""
    return gather_bytes(bytes([verdict]), processes, device)[0] == b"\1"


@contextlib.contextmanager
def failing_together(processes: Processes, device: torch.device) -> Iterator[None]:
    """A block that every process runs: a `UserError` in any of them is one in all of them, or those
    without a problem would wait for the one that has it.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    found = gather_bytes(bytes([problem is not None]), processes, device)
    if b"\1" in found:
        raise problem or UserError("another process has found a problem; its log says which")


def gather_bytes(data: bytes, processes: Processes, device: torch.device) -> list[bytes]:
    """Everybody's `data`, by rank.

    Travels as int32 tensors of the largest one's size: a type that all backends take.
    """
    if processes.world_size == 1:
        return [data]
    sizes = torch.zeros(processes.world_size, dtype=torch.int32, device=device)
    sizes[processes.rank] = len(data)
    dist.all_reduce(sizes)
    largest = -(-int(sizes.max()) // 4) * 4
    # A copy of PyTorch's own: memory that Python owns is given back under Python's lock, and a
    # thread of gloo that waits for it holds up the end of the process.
    own = torch.from_numpy(np.frombuffer(bytearray(data.ljust(largest, b"\0")), np.int32)).clone()
    own = own.to(device)
    received = [torch.zeros_like(own) for _ in range(processes.world_size)]
    dist.all_gather(received, own)
    return [part.cpu().numpy().tobytes()[:size] for part, size in zip(received, sizes.tolist())]


def shard(indices: Sequence[int], batch_size: int, processes: Processes) -> list[int]:
    """Part of the images for one process: every W-th batch of one process's sequence of batches.

    Whole batches, so that each image passes the network in the company it has on one card: some
    kernels' last digits depend on it.
    """
    return [index for n, index in enumerate(indices)
            if n // batch_size % processes.world_size == processes.rank]


def gather_state(state: list[Any], image_ids: Sequence[int], processes: Processes,
                 device: torch.device) -> list[Any]:
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
