"""A training's checkpoints: what is in them, saving between two steps, going on from one."""

from __future__ import annotations

import os
from typing import Any, Dict, Mapping, NamedTuple, Optional

from data.config import Config
from utils import checkpoint
from utils.checkpoint import CheckpointName, rng_state, set_rng_state
from utils.engine.learner import Learner
from utils.engine.records import BestScore, StepRecords
from utils.errors import UserError
from utils.weights.files import read_weights
from utils.weights.loading import load_network

_BEFORE_IT_WAS_STORED = {"precision": "O0", "sync_bn": False}
"""What runs were whose state does not say it."""
_MAY_CHANGE = ("early_stopping", "backbone_weights")
"""Fields of the configuration that a resumed run need not agree with."""


class SavePlan(NamedTuple):
    """Where weights files are written, and when."""

    name: str
    """Of the configuration; the first part of the files' names."""
    folder: str
    interval: int
    """Iterations between two files."""
    keep_latest_interval: Optional[int] = None
    """Only the newest file stays, and those of every so many iterations; None: all stay."""
    enabled: bool = True
    """False where only speed is measured."""
    on_interrupt: bool = True
    """A run that is stopped is saved."""


class Saver:
    """Write and read the checkpoints of one training.

    Args:
        learner: what is saved.
        plan: where and when.
        records: the losses of the last steps are saved.
        best: the best validation so far is saved.
        identity: what makes this run the same training: configuration, class names, seed, batch,
            schedule; plain types. Stored at the top level of the state, so that evaluation finds
            the configuration and the class names without knowing about training.
        epoch_size: steps in an epoch.
        is_main: only the main process writes.

    Attributes:
        run_folder: what the state remembers to find the run folder again; None without one.
    """

    def __init__(self, learner: Learner, plan: SavePlan, records: StepRecords, best: BestScore,
                 identity: Mapping[str, Any], epoch_size: int, is_main: bool = True) -> None:
        self.plan = plan
        self._is_main = is_main
        self.run_folder: Optional[Mapping[str, Any]] = None
        self._learner, self._records, self._best = learner, records, best
        self._identity = dict(identity)
        self._epoch_size = epoch_size

    def path(self, done: int) -> str:
        """Weights file of iteration `done`."""
        return CheckpointName(self.plan.name, done // self._epoch_size, done).path(self.plan.folder)

    def state(self, done: int) -> Dict[str, Any]:
        """Everything beside the weights that iteration `done` of this training is made of."""
        learner = self._learner
        state = dict(
            self._identity, iteration=done, epoch=done // self._epoch_size,
            position=done % self._epoch_size, optimizer=learner.optimizer.state_dict(),
            records=self._records.state_dict(), best=self._best.state_dict(),
            loss_scale=learner.precision.state_dict(), rng=rng_state())
        if learner.average is not None:
            state["raw_weights"] = checkpoint.on_cpu(learner.raw_weights())
        if self.run_folder is not None:
            state["run_folder"] = dict(self.run_folder)
        return state

    def save(self, done: int, interrupt: bool = False) -> Optional[str]:
        """Write the checkpoint of iteration `done`; returns its path, None where none is kept."""
        plan = self.plan
        if not (plan.enabled and self._is_main):
            return None
        older = checkpoint.list_checkpoints(plan.folder, plan.name)
        name = CheckpointName(plan.name, done // self._epoch_size, done, interrupt)
        path = checkpoint.save_checkpoint(name.path(plan.folder), self._learner.weights(),
                                          self.state(done))
        for old in older:
            parsed = CheckpointName.parse(old)
            assert parsed is not None
            # What is further on belongs to another training in the same folder.
            replaced = parsed.interrupt if interrupt else (
                plan.keep_latest_interval is not None and parsed.iteration < done
                and parsed.iteration % plan.keep_latest_interval != 0)
            if replaced and old != path:
                checkpoint.remove_checkpoint(old)
        return path

    def resume(self, weights_path: str, start_iter: int = -1) -> int:
        """Go on from a checkpoint; returns the iteration to go on from.

        With the full state beside the weights the run goes on exactly; where it keeps averages,
        the weights file has them and the state the raw weights. Weights alone (the original's
        files, for one) start a fresh optimiser at `start_iter`, or if that is negative at the
        iteration in the name.

        Raises:
            UserError: the checkpoint is of another training.
        """
        learner = self._learner
        with learner.precision.float32_weights(learner.model):
            print(f"Weights : {load_network(learner.model, read_weights(weights_path))}")
        state = checkpoint.load_state(weights_path)
        if state is None:
            if learner.average is not None:
                learner.average.restart()
            named = CheckpointName.parse(weights_path)
            start = start_iter if start_iter >= 0 else (named.iteration if named else 0)
            print(f"Resumed weights only : {weights_path} (no "
                  f"{checkpoint.state_path(weights_path)}); the optimiser starts afresh at "
                  f"iteration {start}")
            return start
        check_same_training(self._identity, state, weights_path)
        if learner.average is not None:
            with learner.precision.float32_weights(learner.model):
                learner.average.load(learner.model.state_dict())
                learner.model.load_state_dict(state["raw_weights"])
        learner.optimizer.load_state_dict(state["optimizer"])
        self._records.load_state_dict(state["records"], learner.device)
        if "best" in state:  # a state written before there was one leaves it as it is
            self._best.load_state_dict(state["best"])
        learner.precision.load_state_dict(state.get("loss_scale", {}))
        set_rng_state(state["rng"])
        self.run_folder = state.get("run_folder")
        start = int(state["iteration"])
        print(f"Resumed : {weights_path} at iteration {start}")
        return start


def check_same_training(identity: Mapping[str, Any], state: Mapping[str, Any],
                        weights_path: str) -> None:
    """Refuse to resume a training that would not be the same one.

    Raises:
        UserError: names the first part that differs, with both values.
    """
    for key, value in identity.items():
        stored = state.get(key, _BEFORE_IT_WAS_STORED.get(key))
        if key == "config" and isinstance(stored, dict):
            # As this version writes it.
            stored = Config.from_dict(stored).replace(
                **{name: value[name] for name in _MAY_CHANGE}).to_dict()
        if stored != value:
            found, expected = stored, value
            if isinstance(stored, dict):  # the keys that differ are enough
                keys = [name for name in value if stored.get(name) != value[name]]
                found, expected = ({name: part.get(name) for name in keys}
                                   for part in (stored, value))
            raise UserError(
                f"cannot resume '{weights_path}': its {key} is {found}, this run's is {expected}; "
                "use the flags and the data of that run, or start a new training from its weights "
                f"with --weights={weights_path}")


def find_restart(environ: Mapping[str, str], folder: str, config_name: str) -> Optional[str]:
    """Newest weights file of this very launch in `folder`, where torch's elastic launcher has
    started the ranks again.

    None in the first attempt, and where nothing was saved since LAUNCH_TIME (seconds): files of an
    earlier training must not be mistaken for this one's.
    """
    if int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0) == 0:
        return None
    since = float(environ.get("LAUNCH_TIME") or "inf")
    found = [path for path in checkpoint.list_checkpoints(folder, config_name)
             if os.path.getmtime(path) >= since]
    return found[-1] if found else None
