"""The full state of a training run, beside its weights: pack it, compare it, put it back."""

from __future__ import annotations

from typing import Any, Dict, Tuple

import torch

from training.best_score import BestScore
from training.step_records import StepRecords
from utils.amp import Precision
from utils.checkpoint import rng_state, set_rng_state, state_path
from utils.errors import UserError
from utils.optimizer import FlatOptimizer

_BEFORE_IT_WAS_STORED = {"precision": "O0", "sync_bn": False}
"""What runs were whose state does not say it."""


def pack_state(identity: Dict[str, Any], iteration: int, epoch_size: int,
               optimizer: FlatOptimizer, records: StepRecords,
               best: BestScore, precision: Precision) -> Dict[str, Any]:
    """Everything but the weights that the run needs to go on after `iteration` steps.

    Args:
        identity: what makes this run the same training: configuration, class names, seed, batch,
            schedule; plain types. Stored at the top level, so that evaluation finds the
            configuration and the class names without knowing about training.
        iteration: steps done.
        epoch_size: steps in an epoch.
        optimizer: its buffers are stored.
        records: the losses of the last steps are stored.
        best: the best validation so far.
        precision: its loss scale is stored.
    """
    return dict(identity, iteration=iteration, epoch=iteration // epoch_size,
                position=iteration % epoch_size, optimizer=optimizer.state_dict(),
                records=records.state_dict(), best=best.state_dict(),
                loss_scale=precision.state_dict(), rng=rng_state())


def check_same_run(identity: Dict[str, Any], state: Dict[str, Any], weights_path: str) -> None:
    """Refuse to resume a training that would not be the same one.

    Raises:
        UserError: names the first part that differs, with both values.
    """
    for key, value in identity.items():
        stored = state.get(key, _BEFORE_IT_WAS_STORED.get(key))
        if stored != value:
            found, expected = _difference(stored, value)
            raise UserError(
                "cannot resume '{}': its {} is {}, this run's is {}; use the flags and the data of "
                "that run, or remove '{}' to start a new training from its weights".format(
                    weights_path, key, found, expected, state_path(weights_path)))


def unpack_state(state: Dict[str, Any], optimizer: FlatOptimizer, records: StepRecords,
                 best: BestScore, precision: Precision, device: torch.device) -> int:
    """Put back what `pack_state` packed; returns the number of steps done.

    A state written before there was a best validation or a loss scale leaves them as they are.
    """
    optimizer.load_state_dict(state["optimizer"])
    records.load_state_dict(state["records"], device)
    if "best" in state:
        best.load_state_dict(state["best"])
    precision.load_state_dict(state.get("loss_scale", {}))
    set_rng_state(state["rng"])
    return int(state["iteration"])


def _difference(found: Any, expected: Any) -> Tuple[Any, Any]:
    """Reduce two dicts to the keys that differ, for a readable message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in expected if found.get(key) != expected[key]]
        return {key: found.get(key) for key in keys}, {key: expected[key] for key in keys}
    return found, expected
