"""Checkpoints: a plain weights file that the original loads, and the full state beside it.

    <folder>/<config>_<epoch>_<iteration>.pth            state dict of the network, CPU tensors
    <folder>/<config>_<epoch>_<iteration>.state          everything else a resumed run needs

`_interrupt` before the suffix marks a run that was stopped. The state is written first and knows
the digest of its weights: a pair that is mixed or torn is never resumed. Both hold tensors and
plain types only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import random
import re
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import digest, write_whole
from utils.parsing import Form, misfit
from utils.weights.files import Origin, WeightsFile, load_tensors, read_weights

STATE_FORMAT = 1
_NONE = type(None)


def _all(kind: type) -> Callable[[Any], bool]:
    """Whether a value is nothing, or a sequence of such values."""
    return lambda value: value is None or (isinstance(value, (list, tuple))
                                           and all(isinstance(item, kind) for item in value))


_STATE: Form = {
    "config?": (dict, _NONE), "class_names?": _all(str), "category_ids?": _all(int),
    "iteration?": (int, _NONE),
    "run_folder?": lambda value: value is None or not misfit(
        value, {"path?": (str, _NONE), "id?": (str, _NONE)})}
"""What is read of a state by others than the training that goes on from it."""
_NAME = re.compile(r"^(?P<config>.+)_(?P<epoch>\d+)_(?P<iteration>\d+)(?P<interrupt>_interrupt)?$")


class CheckpointName(NamedTuple):
    """What a weights file's name says; the original parses the same pattern."""

    config: str
    epoch: int
    iteration: int
    interrupt: bool = False

    def path(self, folder: str) -> str:
        """Path of the weights file in `folder`."""
        suffix = "_interrupt" if self.interrupt else ""
        return os.path.join(folder, f"{self.config}_{self.epoch}_{self.iteration}{suffix}.pth")

    @staticmethod
    def parse(path: str) -> CheckpointName | None:
        """Read a file name; None where it does not follow the pattern."""
        match = _NAME.match(os.path.splitext(os.path.basename(path))[0])
        if match is None:
            return None
        return CheckpointName(match.group("config"), int(match.group("epoch")),
                              int(match.group("iteration")), match.group("interrupt") is not None)


def state_path(weights_path: str) -> str:
    """Path of the full state that belongs to a weights file."""
    return os.path.splitext(weights_path)[0] + ".state"


def save_checkpoint(path: str, state_dict: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Write weights to `path`, whose folder is made, and the full state beside them; returns the
    path. The network's tensors are copied to the CPU one by one; `state`, tensors and plain types,
    gets `format` and the weights' digest.
    """
    weights = serialise(on_cpu(state_dict))
    write_whole(state_path(path), serialise(dict(
        state, format=STATE_FORMAT, weights_sha256=hashlib.sha256(weights).hexdigest())))
    write_whole(path, weights)
    return path


def serialise(values: Any) -> memoryview:
    """The file that torch.save makes; on a disk that is full it would raise a RuntimeError about
    file positions.
    """
    file = io.BytesIO()
    torch.save(values, file)
    return file.getbuffer()


def on_cpu(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU.

    A clone each: parameters are views of one flat buffer, and saving a view saves it all.
    """
    return {key: value.detach().cpu().clone() for key, value in state_dict.items()}


def remove_checkpoint(path: str) -> None:
    """Delete a weights file and its state; a missing one is fine."""
    for victim in (path, state_path(path)):
        if os.path.exists(victim):
            os.unlink(victim)


def recipe_of(path: str) -> str | None:
    """Recipe that a weights file's name names; None if it follows no pattern."""
    name = CheckpointName.parse(path)
    return name.config if name else None


def load_state(weights_path: str) -> dict[str, Any] | None:
    """Full state beside a weights file, or None where there is none.

    Raises:
        UserError: the file is damaged, was written by a newer version of this project, or beside
            other weights.
    """
    state = _read_state(weights_path)
    if state is not None and not _is_pair(weights_path, state):
        raise UserError(f"'{weights_path}' and '{state_path(weights_path)}' do not belong "
                        "together: the state was written beside other weights; copy both files of "
                        "one checkpoint again, or start a new training from the weights "
                        f"(--weights={weights_path})")
    return state


def _read_state(weights_path: str) -> dict[str, Any] | None:
    path = state_path(weights_path)
    if not os.path.isfile(path):
        return None
    state = load_tensors(path)
    found = state.get("format")
    if found != STATE_FORMAT:
        raise UserError(f"'{path}' has state format {found if type(found) is int else 'unknown'}, "
                        f"this version reads {STATE_FORMAT}; resume with the version that wrote "
                        f"it, or start a new training from the weights (--weights={weights_path})")
    problem = misfit(state, _STATE)
    if problem:
        raise UserError(f"'{path}' is damaged: {problem}; copy it again, or do without it: "
                        f"--weights={weights_path} with the file removed")
    return state


def _is_pair(weights_path: str, state: Mapping[str, Any]) -> bool:
    # States of older versions do not say.
    return "weights_sha256" not in state or state["weights_sha256"] == digest(weights_path)


def load_for_inference(path: str) -> WeightsFile:
    """Read weights, and what is known of their training.

    That comes from the full state beside the weights, or from the file itself where it can hold it
    (safetensors). Where the state was written beside other weights, names and configuration are
    taken all the same, and it is said.
    """
    weights, state = read_weights(path), _read_state(path)
    if state is None:
        return weights
    names, category_ids = state.get("class_names"), state.get("category_ids")
    iteration, folder = state.get("iteration"), state.get("run_folder") or {}
    origin = None if iteration is None else Origin(int(iteration), folder.get("path"),
                                                   folder.get("id"))
    more = []
    if not _is_pair(path, state):
        origin = None
        more = [f"Warning: {state_path(path)} was written beside other weights than these; class "
                "names and configuration are taken from it"]
    return dataclasses.replace(
        weights, config=state.get("config"), class_names=None if names is None else list(names),
        category_ids=None if category_ids is None else [int(number) for number in category_ids],
        origin=origin, warnings=weights.warnings + more)


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, as tensors and plain types."""
    legacy: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = legacy
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position),
                  int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
