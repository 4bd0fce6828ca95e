"""When a step runs as usual, is recorded, and is replayed, and where that is refused."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from utils import device_graph
from utils.device_graph import (
    WARM_UP,
    WARM_UP_SHARED,
    GraphedCall,
    GraphedStep,
    prepare_graphs,
)
from utils.errors import UserError

CUDA = torch.device("cuda", 0)


class Runtime:
    """A module like torch.cuda, whose graphs note what is done with them."""

    def __init__(self, notes):
        class CUDAGraph:
            numbers = itertools.count()

            def __init__(self):
                self.number = next(self.numbers)

            def replay(self):
                notes.append(("replay", self.number))

            def pool(self):
                return f"pool of {self.number}"

        class graph:  # noqa: N801
            def __init__(self, recorded, pool=None, stream=None, capture_error_mode="global"):
                notes.append(("record", pool, stream, capture_error_mode))

            def __enter__(self):
                return None

            def __exit__(self, *error):
                return None

        self.CUDAGraph, self.graph = CUDAGraph, graph
        self.current_stream = lambda device: "stream"


@pytest.fixture
def notes(monkeypatch):
    found = []
    runtime = Runtime(found)
    monkeypatch.setattr(device_graph, "device_runtime", lambda device: runtime)
    return found


def step_into(notes):
    def step(batches, void):
        notes.append(("void" if void else "step", batches[0]))
    return step


@pytest.mark.parametrize("shared", [False, True])
def test_each_place_is_recorded_once_after_its_warm_up(notes, shared):
    step = GraphedStep(step_into(notes), CUDA, shared)
    warm_up = WARM_UP_SHARED if shared else WARM_UP
    small, large = ("small",), ("large",)
    for _ in range(warm_up + 2):
        step(small)
    assert notes == [("step", "small")] * warm_up + [
        ("record", None, "stream", "thread_local"), ("step", "small"), ("replay", 0), ("replay", 0)]
    notes.clear()
    step(small, True)
    for _ in range(warm_up + 1):
        step(large)
    step(small)
    assert notes == [("void", "small")] + [("step", "large")] * warm_up + [
        ("record", "pool of 0", "stream", "thread_local"), ("step", "large"), ("replay", 1),
        ("replay", 0)]


def test_a_call_is_recorded_once_for_each_shape(notes):
    """Replays read a place of their own and leave their result there; the caller gets a copy."""
    call = GraphedCall(lambda values: notes.append(("call", len(values))) or [values],
                       lambda result: [values.clone() for values in result], torch.device("cpu"))
    device_graph.CLASSES["cpu"] = "CUDAGraph"
    try:
        for _ in range(WARM_UP):
            call(torch.zeros(2))
        first, second = call(torch.ones(2)), call(torch.full((2,), 5.0))
        call(torch.zeros(3))
    finally:
        del device_graph.CLASSES["cpu"]
    assert notes == [("call", 2)] * WARM_UP + [
        ("record", None, "stream", "thread_local"), ("call", 2), ("replay", 0), ("replay", 0),
        ("call", 3)]
    assert first[0].tolist() == [1, 1] and second[0].tolist() == [5, 5]


def test_a_step_that_cannot_be_recorded_is_one_sentence(notes):
    def step(batches, void):
        if len(notes) > WARM_UP:
            raise RuntimeError("Cannot run aclop operators\nand more")
        notes.append("step")

    graphed = GraphedStep(step, CUDA, False)
    for _ in range(WARM_UP):
        graphed(("batch",))
    with pytest.raises(UserError, match=r"recorded \(Cannot run aclop operators\); leave it out"):
        graphed(("batch",))


@pytest.mark.parametrize(("kind", "runtime", "saturating", "queue", "expected"), [
    ("cpu", None, False, "1", "the CPU launches nothing"),
    ("cuda", SimpleNamespace(), False, "1", "this PyTorch has no graphs"),
    ("npu", None, True, "1", "a card that saturates"),
    ("npu", None, False, "2", "TASK_QUEUE_ENABLE=2")])
def test_refused_in_one_sentence(monkeypatch, kind, runtime, saturating, queue, expected):
    device = SimpleNamespace(type=kind)
    whole = Runtime([])
    whole.NPUGraph = whole.CUDAGraph
    monkeypatch.setattr(device_graph, "device_runtime", lambda device: runtime or whole)
    monkeypatch.setattr(device_graph, "describe", lambda device: "device")
    monkeypatch.setattr(device_graph, "saturates", lambda device: saturating)
    monkeypatch.setenv("TASK_QUEUE_ENABLE", queue)
    with pytest.raises(UserError, match=expected) as caught:
        prepare_graphs(device)
    assert "leave it out" in str(caught.value) and "\n" not in str(caught.value)
