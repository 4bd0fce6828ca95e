"""Recorder of what a training step asks of the device: operators, signatures, host reads.

    recorder = Recorder()
    for batch in batches:
        with recorder.step():
            step(batch)
    recorder.steps[3].new_signatures, recorder.steps[3].syncs

An accelerator compiles or tunes a kernel for each new (operator, shapes, dtypes), and stands still
whenever the host reads a value. Needs torch 2.x (`available()`); on a CPU, reads that no operator
shows (`tolist`, `numpy`, `cpu`) are caught at the tensor's methods.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple
from unittest import mock

import torch

try:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten
except ImportError:  # torch 1.x
    TorchDispatchMode = object

SKIP_REASON = f"torch {torch.__version__} has no TorchDispatchMode to record operators with"

READS_A_VALUE = ("_local_scalar_dense", "is_nonzero", "equal", "allclose", "item")
SHAPE_FROM_VALUES = ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
                     "unique_consecutive", "unique_dim_consecutive", "bincount",
                     "repeat_interleave")
HOST_METHODS = ("tolist", "numpy", "cpu", "__array__")

Signature = Tuple[str, Tuple[Tuple[Tuple[int, ...], torch.dtype], ...]]


def available() -> bool:
    """Whether this torch can record operators."""
    return TorchDispatchMode is not object


class Step:
    """What one step did.

    Attributes:
        operators: number of calls by operator name, e.g. "aten.add.Tensor".
        views: the part of `operators` that only makes views and launches no kernel.
        signatures: (operator, ((shape, dtype) of each tensor argument ...)) met in the step.
        new_signatures: those that no earlier step of the recorder had met.
        syncs: "operator at file:line" for each time the host waited for a value or a shape.
        async_copies: the same for copies to the host that do not wait (non_blocking).
    """

    def __init__(self) -> None:
        self.operators: Dict[str, int] = Counter()
        self.views: Dict[str, int] = Counter()
        self.signatures: Set[Signature] = set()
        self.new_signatures: Set[Signature] = set()
        self.syncs: List[str] = []
        self.async_copies: List[str] = []

    @property
    def total(self) -> int:
        """All operator calls."""
        return sum(self.operators.values())

    @property
    def kernels(self) -> int:
        """Operator calls that are not mere views."""
        return self.total - sum(self.views.values())


class Recorder:
    """Records steps one after the other; see the module's example.

    `after` is called after each operator, with its name, in the thread that it was called in.
    """

    def __init__(self, after: Optional[Callable[[str], None]] = None) -> None:
        self.steps: List[Step] = []
        self._after = after
        self._known: Set[Signature] = set()

    @contextlib.contextmanager
    def step(self) -> Iterator[Step]:
        """Record everything that runs inside the context as the next step."""
        step = Step()
        with _Mode(step, self._after), _watch_host_methods(step):
            yield step
        step.new_signatures = step.signatures - self._known
        self._known |= step.signatures
        self.steps.append(step)


class _Mode(TorchDispatchMode):
    def __init__(self, step: Step, after: Optional[Callable[[str], None]]) -> None:
        super().__init__()
        self._step = step
        self._after = after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        name, step = str(func), self._step
        step.operators[name] += 1
        if _is_view(func):
            step.views[name] += 1
        step.signatures.add((name, tuple((tuple(t.shape), t.dtype) for t in tensors)))
        if _reads_value(func, args):
            step.syncs.append(_where(name))
        elif _copies_to_host(func, args, kwargs, tensors):
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
            (step.syncs if waits else step.async_copies).append(_where(name))
        result = func(*args, **kwargs)
        if self._after is not None:
            self._after(name)
        return result


def _base_name(func: Any) -> str:
    return func._schema.name.split("::")[-1]


def _is_view(func: Any) -> bool:
    infos = [result.alias_info for result in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _reads_value(func: Any, args: Any) -> bool:
    name = _base_name(func)
    if name in READS_A_VALUE or name in SHAPE_FROM_VALUES:
        return True
    if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1:
        indices = args[1] if isinstance(args[1], (list, tuple)) else ()
        return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
                   for i in indices)
    return False


def _copies_to_host(func: Any, args: Any, kwargs: Any, tensors: List[torch.Tensor]) -> bool:
    name = _base_name(func)
    if name == "_to_copy":
        target = kwargs.get("device")
        return (target is not None and torch.device(target).type == "cpu"
                and tensors[0].device.type != "cpu")
    if name in ("copy_", "_copy_from"):
        return args[0].device.type == "cpu" and args[1].device.type != "cpu"
    return False


def calling_frame(*skipped: str) -> Optional[traceback.FrameSummary]:
    """The innermost frame outside of torch, this file and those `skipped`: who asked for an
    operator. None in a thread that runs torch's own code alone, as a device's backward pass does.
    """
    for frame in reversed(traceback.extract_stack()):
        own = frame.filename in (__file__, *skipped) or frame.filename.endswith("mock.py")
        if not own and "/torch/" not in frame.filename:
            return frame
    return None


def _where(what: str) -> str:
    frame = calling_frame()
    return what if frame is None else f"{what} at {frame.filename}:{frame.lineno}"


@contextlib.contextmanager
def _watch_host_methods(step: Step) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in HOST_METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _watched(name, step)))
        yield


def _watched(name: str, step: Step) -> Any:
    original = getattr(torch.Tensor, name)

    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.device.type == "cpu":  # elsewhere the copy itself is seen
            step.syncs.append(_where("Tensor." + name))
        return original(self, *args, **kwargs)

    return method
