"""A training's checkpoints: what is in them, saving between two steps, going on from one."""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from dataclasses import dataclass
from typing import Any, Mapping, NamedTuple

import torch

from data.config import Config
from utils import checkpoint
from utils.checkpoint import CheckpointName, rng_state, set_rng_state, state_path
from utils.cli import print_lines
from utils.distributed.processes import Processes
from utils.distributed.sharing import failing_together, gather_bytes
from utils.engine.learner import Learner
from utils.engine.observer import StepRecords
from utils.errors import UserError, some
from utils.files import digest
from utils.run_folder import folder_of_weights
from utils.weights.files import read_weights
from utils.weights.loading import load_network
from utils.weights_folder import (
    WeightsFolder,
    claim_folder,
    find_checkpoint,
    find_restart,
    list_checkpoints,
    whole_checkpoint,
)

_BEFORE_IT_WAS_STORED = {"precision": "O0", "sync_bn": False}
"""What runs were whose state does not say it."""
_MAY_CHANGE = ("lr", "max_iter", "epochs", "schedule", "lr_steps", "gamma", "lr_warmup_init",
               "lr_warmup_until", "lr_final_factor", "early_stopping", "backbone_weights")
"""Fields of the configuration that may be others when a training goes on. What the schedule makes
of them is compared, and said where it differs."""
_OF_SCORES = ("nms_conf_thresh", "nms_thresh", "nms_top_k", "max_num_detections")
"""Those that the training itself does not read: they may be others, and it is said."""

LONGEST_UNSAVED = 600.0
"""Seconds of a training that a process killed without warning may lose, and a few steps."""
_CLOCK_INTERVAL = 10
"""Iterations between two looks at the clock."""


class SavePlan(NamedTuple):
    """Where weights files are written, and when."""

    name: str
    """Of the configuration; the first part of the files' names."""
    folder: str
    interval: int
    """Iterations between two files that stay. Those in between are passing ones."""
    keep_latest_interval: int | None = None
    """Only the newest file stays, and those of every so many iterations; None: all stay."""
    enabled: bool = True
    """False where only speed is measured."""
    on_interrupt: bool = True
    """A run that is stopped is saved."""


@dataclass
class BestScore:
    """Best average precision of masks over the validations of a training."""

    mask_ap: float | None = None
    """In [0, 1]; None before the first validation, and where no image had ground truth."""
    box_ap: float | None = None
    """In the same validation."""
    iteration: int = 0
    """Steps done by then."""
    since: int = 0
    """Validations that have followed, none of them better."""

    def update(self, iteration: int, mask_ap: float | None, box_ap: float | None) -> bool:
        """Take the scores of a validation; returns whether they are the best so far.

        The first validation is the best one whatever it scored; of equal ones the first stays.
        """
        if self.iteration and not _value(mask_ap) > _value(self.mask_ap):
            self.since += 1
            return False
        self.mask_ap, self.box_ap = mask_ap, box_ap
        self.iteration, self.since = int(iteration), 0
        return True

    def consider(self, row: Mapping[str, Any]) -> None:
        """Take the scores of a row of results.csv, which eval.py may have found, if the best."""
        mask_ap, box_ap = row["mask_mAP"] / 100, row["box_mAP"]
        if row["iteration"] != self.iteration and mask_ap > _value(self.mask_ap) + 1e-6:
            self.mask_ap, self.iteration = mask_ap, row["iteration"]
            self.box_ap = None if box_ap is None else box_ap / 100


def _value(score: float | None) -> float:
    """A score to compare by: none, and one that is no number, are below all others."""
    return -1.0 if score is None or score != score else float(score)


class Saver:
    """Write and read the checkpoints of one training.

    `identity` is what makes this run the same training: configuration, class names, seed, batch,
    schedule; plain types. It stands at the top level of the state, so that evaluation finds the
    configuration and the class names without knowing about training. `launch` of this process is
    also the training's id, unless it goes on from a checkpoint. Only the main process writes.

    Attributes:
        training_id: stays the same however often the training is stopped and goes on.
        run_folder: path of the run folder that the state remembers; None without one.
    """

    def __init__(self, learner: Learner, plan: SavePlan, records: StepRecords, best: BestScore,
                 identity: Mapping[str, Any], epoch_size: int, launch: str,
                 is_main: bool = True) -> None:
        self.plan = plan
        self.training_id = self._launch = launch
        self._is_main = is_main
        self.run_folder: str | None = None
        self._passing: str | None = None
        self._saved_at = time.monotonic()
        self._folder: WeightsFolder | None = None
        self._learner, self._records, self._best = learner, records, best
        self._identity = dict(identity)
        self._epoch_size = epoch_size

    def open_folder(self, resumed: str | None = None) -> list[str]:
        """Take the folder that this training writes to; returns a sentence if it is not the one
        that was asked for, because that has files of another.

        Raises:
            UserError: it cannot be written, or the same training still runs.
        """
        if not (self.plan.enabled and self._is_main):
            return []
        asked = self.plan.folder
        self._folder = claim_folder(asked, self.plan.name, self.training_id, resumed)
        self.plan = self.plan._replace(folder=self._folder.path)
        if os.path.samefile(asked, self._folder.path):
            return []
        if resumed is not None:
            return [f"Weights go to '{self._folder.path}'"]
        return [f"'{asked}' has files of another training with this configuration; none is "
                f"replaced, this one writes to '{self._folder.path}'"]

    def close(self) -> None:
        """Leave the folder to others; nothing is saved after this."""
        if self._folder is not None:
            self._folder.close()

    def is_passing(self, done: int) -> bool:
        """Whether a checkpoint of iteration `done`, written on the way, makes room for the next."""
        return done % self.plan.interval != 0

    def is_due(self, done: int) -> bool:
        """Whether to save on the way: at the interval, and when `LONGEST_UNSAVED` has passed."""
        return not self.is_passing(done) or (
            self._folder is not None and done % _CLOCK_INTERVAL == 0
            and time.monotonic() - self._saved_at > LONGEST_UNSAVED)

    def path(self, done: int) -> str:
        """Weights file of iteration `done`."""
        return CheckpointName(self.plan.name, done // self._epoch_size, done).path(self.plan.folder)

    def state(self, done: int) -> dict[str, Any]:
        """Everything beside the weights that iteration `done` of this training is made of."""
        learner = self._learner
        state = dict(
            self._identity, iteration=done, epoch=done // self._epoch_size,
            position=done % self._epoch_size, optimizer=learner.optimizer.state_dict(),
            records=self._records.state_dict(), best=dict(vars(self._best)),
            loss_scale=learner.precision.state_dict(), rng=rng_state())
        if learner.average is not None:
            state["raw_weights"] = checkpoint.on_cpu(learner.raw_weights())
        state["training"] = self.training_id
        if self.run_folder is not None:
            state["run_folder"] = {"path": self.run_folder, "id": self.training_id}
        return state

    def save(self, done: int, interrupt: bool = False, finished: bool = False) -> str | None:
        """Write the checkpoint of iteration `done`; returns its path, None where none is kept.

        One of an `interrupt`, which does not come at an interval, replaces its like; the next one
        replaces one that `is_passing`. `finished` is noted of a training at its end.
        """
        plan = self.plan
        if self._folder is None:
            return None
        older = [path for path in list_checkpoints(plan.folder, plan.name)
                 if os.path.exists(state_path(path))]  # others were copied here
        name = CheckpointName(plan.name, done // self._epoch_size, done, interrupt)
        path = checkpoint.save_checkpoint(name.path(plan.folder), self._learner.weights(),
                                          self.state(done))
        try:
            self._folder.saved(path, self._launch, finished)
        except UserError as error:  # the checkpoint is there: no reason to lose a training
            print(f"Warning: {error}; the training goes on", flush=True)
        self._saved_at = time.monotonic()
        if self._passing is not None and self._passing != path:
            checkpoint.remove_checkpoint(self._passing)
        self._passing = None if interrupt or finished or not self.is_passing(done) else path
        for old in older:
            parsed = CheckpointName.parse(old)
            assert parsed is not None
            # What is further on is of a time before the training went back.
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
        state = checkpoint.load_state(weights_path)
        changed = [] if state is None else check_same_training(self._identity, state, weights_path)
        with learner.precision.float32_weights(learner.model):
            print(f"Weights : {load_network(learner.model, read_weights(weights_path))}")
        if state is None:
            if learner.average is not None:
                learner.average.restart()
            named = CheckpointName.parse(weights_path)
            start = start_iter if start_iter >= 0 else (named.iteration if named else 0)
            print(f"Resumed weights only : {weights_path} (no {state_path(weights_path)}); the "
                  f"optimiser starts afresh at iteration {start}")
            return start
        if learner.average is not None:
            with learner.precision.float32_weights(learner.model):
                learner.average.load(learner.model.state_dict())
                learner.model.load_state_dict(state["raw_weights"])
        learner.optimizer.load_state_dict(state["optimizer"])
        self._records.load_state_dict(state["records"], learner.device)
        if "best" in state:  # a state written before there was one leaves it as it is
            vars(self._best).update(state["best"])
        learner.precision.load_state_dict(state.get("loss_scale", {}))
        set_rng_state(state["rng"])
        folder = state.get("run_folder") or {}
        self.training_id = str(state.get("training") or folder.get("id") or self._launch)
        around = folder_of_weights(weights_path, None)  # the folder may have been moved since
        self.run_folder = around.path if around is not None and around.run_id == (
            self.training_id) else folder.get("path")
        start = int(state["iteration"])
        print_lines([f"Resumed : {weights_path} at iteration {start}"] + changed)
        return start


def check_same_training(identity: Mapping[str, Any], state: Mapping[str, Any],
                        weights_path: str) -> list[str]:
    """Refuse to resume a training that would not be the same one; returns a sentence for each part
    of the schedule, and for the data, that is not as it was.

    Raises:
        UserError: names the first part that differs, with both values.
    """
    changed: list[str] = []
    for key, value in identity.items():
        stored = state.get(key, _BEFORE_IT_WAS_STORED.get(key))
        if key == "learning_rate" and isinstance(stored, dict):
            changed += [f"Changed : {name} from {stored[name]} to {value[name]}" for name in value
                        if name in stored and stored[name] != value[name]]
            continue
        if key == "annotations":
            if stored not in (None, value):
                changed.append("Changed : images or objects of the training data, in an equal "
                               "number of images; the training goes on with what is there now")
            continue
        if key == "config" and isinstance(stored, dict):
            stored = Config.from_dict(stored).to_dict()  # as this version writes it
            changed += [f"Changed : {name} from {stored[name]} to {value[name]}; scores before and "
                        "after are not comparable" for name in _OF_SCORES
                        if stored[name] != value[name]]
            stored.update((name, value[name]) for name in _MAY_CHANGE + _OF_SCORES)
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
    return changed


def choose_start(resume: str | None, folder: str, config_name: str, launch: str, restarted: bool,
                 processes: Processes, device: torch.device) -> str | None:
    """The checkpoint that all processes go on from; None to start at the beginning.

    `resume` is what the user asked for, if anything. Where torch's launcher has `restarted` the
    processes of this launch, they go on from what the launch itself has saved, if anything.

    Raises:
        UserError: there is no such file, or hosts have different ones.
    """
    with failing_together(processes, device):
        path = find_restart(launch, folder, config_name) if restarted else None
        if path is None and resume is not None:
            path = find_checkpoint(resume, folder, config_name)
        if path is not None and path != resume:  # a file that was named is meant
            path = whole_checkpoint(path)
            if processes.is_main:
                _say_what_has_no_state(path)
    if processes.world_size > 1:
        _refuse_different_starts(path, processes, device)
    return path


def _say_what_has_no_state(path: str) -> None:
    """Weights of later iterations in the folder of `path` that no training goes on from."""
    of_recipe = list_checkpoints(os.path.dirname(path) or ".", checkpoint.recipe_of(path))
    later = itertools.dropwhile(lambda other: not os.path.samefile(other, path), of_recipe)
    bare = [os.path.basename(other) for other in list(later)[1:]
            if not os.path.exists(state_path(other))]
    if bare:
        print(f"Note: left out, for there is no .state beside: {some(bare)}; --weights starts a "
              "new training from such a file", flush=True)


def _refuse_different_starts(path: str | None, processes: Processes, device: torch.device) -> None:
    known = "" if path is None else digest(path)
    found = f"'{path}' ({known[:12]})" if known else "nothing"
    told = gather_bytes(json.dumps([known, f"{found} on {platform.node()}"]).encode("utf-8"),
                        processes, device)
    starts = [json.loads(part.decode("utf-8")) for part in told]
    for rank, (other, where) in enumerate(starts):
        if other != starts[0][0]:
            raise UserError(f"rank 0 would go on from {starts[0][1]}, rank {rank} from {where}; "
                            "all need the same file: copy it and its .state to each host, or use a "
                            "folder that they share")
