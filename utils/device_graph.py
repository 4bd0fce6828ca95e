"""The work of a training step, or of finding objects, recorded once on the device and replayed with
a single launch.

CUDA's graphs, and the NPU's of the same interface. Recorded are the operators with the addresses of
their tensors: whatever changes from step to step has to be a value in memory that stays where it
is, and nothing may ask the device for a value.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any, Callable, Generic, Sequence, TypeVar

import torch
from torch import Tensor

from utils.device import describe, device_runtime, saturates, synchronize
from utils.errors import UserError, first_line
from utils.memory import is_out_of_memory

if TYPE_CHECKING:
    from data.batch import Batch

T = TypeVar("T")

CLASSES = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
WARM_UP = 3
"""Steps of a place that run as usual before one is recorded: they make what is made once."""
WARM_UP_SHARED = 11
"""The same of several processes: DistributedDataParallel measures itself in its first ten."""


def prepare_graphs(device: torch.device) -> None:
    """Make ready for `GraphedStep` and `GraphedCall`, before anything else is done on `device`.

    From now on all work goes to a stream of its own: the device's first one cannot be recorded.

    Raises:
        UserError: this device, or this PyTorch, records no graphs.
    """
    runtime, problem = device_runtime(device), ""
    if device.type not in CLASSES:
        problem = "the CPU launches nothing"
    elif (not hasattr(runtime, CLASSES[device.type])
          or "capture_error_mode" not in inspect.signature(runtime.graph.__init__).parameters):
        problem = f"this PyTorch has no graphs ({describe(device)})"
    elif saturates(device):
        problem = "a card that saturates, as the first Ascend 910, records none"
    elif device.type == "npu" and os.environ.get("TASK_QUEUE_ENABLE") == "2":
        problem = "TASK_QUEUE_ENABLE=2 allows none; 1, the launchers' own, does"
    if problem:
        raise UserError(f"--device_graph records the work of a batch on the device and replays it, "
                        f"but {problem}; leave it out")
    synchronize(device)
    runtime.set_stream(runtime.Stream(device))


def record(work: Callable[[], T], device: torch.device, pool: Any = None) -> tuple[Any, T]:
    """A graph of `work`, which has not run by then, and the result that each replay leaves.

    `work` launches the same each time, on a device that `prepare_graphs` has made ready. `pool` is
    the memory of graphs that run one after the other and leave nothing in it; None for a new one.

    Raises:
        UserError: an operator that cannot be recorded, by its name.
    """
    runtime = device_runtime(device)
    graph = getattr(runtime, CLASSES[device.type])()
    try:
        # Other threads (pinned memory, collectives) may ask the device what they want.
        with runtime.graph(graph, pool=pool, stream=runtime.current_stream(device),
                           capture_error_mode="thread_local"):
            result = work()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"--device_graph: this work cannot be recorded ({first_line(error)}); "
                        "leave it out") from error
    return graph, result


class GraphedStep:
    """`step`, recorded after some calls for each place of its batches and replayed from then on.

    `step` is called with batches, and whether it is void; `device` was made ready by
    `prepare_graphs`; `shared` says that several processes train together.
    """

    def __init__(self, step: Callable[..., None], device: torch.device, shared: bool) -> None:
        self._step, self._device = step, device
        self._warm_up = WARM_UP_SHARED if shared else WARM_UP
        self._calls: dict[int, int] = {}
        self._graphs: dict[int, Any] = {}

    def __call__(self, batches: Sequence[Batch], void: bool = False) -> None:
        """A step of batches whose memory stays; a `void` one, which is rare, runs as usual."""
        place = id(batches[0])
        self._calls[place] = self._calls.get(place, 0) + (not void)
        if void or self._calls[place] <= self._warm_up:
            self._step(batches, void)
            return
        if place not in self._graphs:
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            self._graphs[place], _ = record(lambda: self._step(batches, False), self._device, pool)
        self._graphs[place].replay()


class GraphedCall(Generic[T]):
    """`function` of a tensor, recorded after some calls for each shape and replayed from then on.

    `copied` gives a result memory of its own, since the next replay overwrites the last one's;
    `device` was made ready by `prepare_graphs`.
    """

    def __init__(self, function: Callable[[Tensor], T], copied: Callable[[T], T],
                 device: torch.device) -> None:
        self._function, self._copied, self._device = function, copied, device
        self._calls: dict[torch.Size, int] = {}
        self._places: dict[torch.Size, tuple[Tensor, Any, T]] = {}

    def __call__(self, values: Tensor) -> T:
        """The result for a tensor of the host, whose copy to the device is queued."""
        shape = values.shape
        self._calls[shape] = self._calls.get(shape, 0) + 1
        if self._calls[shape] <= WARM_UP:
            return self._function(values.to(self._device, non_blocking=True))
        if shape not in self._places:
            place = values.to(self._device)
            self._places[shape] = (place, *record(lambda: self._function(place), self._device))
        place, graph, result = self._places[shape]
        place.copy_(values, non_blocking=True)
        graph.replay()
        return self._copied(result)
