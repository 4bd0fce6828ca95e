"""The record of one training: its logs and its run folder. Only the main process has one."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, Dict, List, Optional, Sequence

from data.config import get_config, list_configs
from utils.checkpoint import remove_checkpoint, save_checkpoint
from utils.device import describe
from utils.engine.learner import Learner
from utils.engine.log import RunLog
from utils.engine.saving import Saver
from utils.engine.setup import Training
from utils.engine.train_flags import flagged_fields
from utils.errors import UserError
from utils.files import refuse_unwritable
from utils.inference.evaluation_record import ScoredEvaluation, describe_data, write_evaluation
from utils.report import build_report
from utils.run_folder import (
    REPORT,
    WEIGHTS,
    RunFolder,
    best_row,
    describe_session,
    folder_of_run,
)

REPORT_SECONDS = 60
"""Between two reports of a training that validates often."""
_NOT_RERUN = ("command_line", "recipe", "settings", "config", "rerun", "resume", "start_iter",
              "local_rank")
"""Flags that do not belong to a training but to one start of it, or to its configuration."""


class RunRecord:
    """Takes what happens in a training; does nothing in all processes but the main one.

    Args:
        log: None where nothing is written.
        folder: None where none is made.
    """

    def __init__(self, log: Optional[RunLog] = None, folder: Optional[RunFolder] = None) -> None:
        self._log, self._folder = log, folder

    @property
    def path(self) -> Optional[str]:
        """Of the run folder; None without one."""
        return None if self._folder is None else self._folder.path

    def write(self, kind: str, **values: Any) -> None:
        """Add a record; `kind` is session, train, epoch or val."""
        if self._log is not None:
            self._log.write(kind, **values)

    def keep_weights(self, path: str) -> None:
        """Make a checkpoint the run folder's last one."""
        if self._folder is not None:
            self._folder.keep_weights(path, "last")

    def keep_best(self, learner: Learner, saver: Saver, done: int) -> None:
        """Make the weights that were scored the run folder's best ones."""
        if self._folder is not None:
            new = self._folder.file(WEIGHTS, ".best.new.pth")
            save_checkpoint(new, learner.weights(), saver.state(done))
            self._folder.keep_weights(new, "best")
            remove_checkpoint(new)

    def recorded_best(self) -> Optional[Sequence[Any]]:
        """Iteration, mask and box AP in [0, 1] of the best row of results.csv, if there is one.

        It may be one that eval.py scored and that the training does not know.
        """
        row = None if self._folder is None else best_row(self._folder.results.rows())
        if row is None:
            return None
        box = float(row["box_mAP"]) / 100 if row["box_mAP"] else None
        return int(row["iteration"]), float(row["mask_mAP"]) / 100, box

    def add_validation(self, evaluation: ScoredEvaluation, is_best: bool) -> List[str]:
        """Keep what the best weights found; the report is drawn anew if it is a minute old.

        Returns:
            A line for the user, if something went wrong.
        """
        folder = self._folder
        if folder is None:
            return []
        report = folder.file(REPORT)
        try:
            if is_best:
                write_evaluation(folder, evaluation)
            if not os.path.exists(report) or (
                    time.time() - os.path.getmtime(report) > REPORT_SECONDS):
                build_report(folder)
        except Exception as error:  # an image is no reason to lose a training
            return [_trouble(folder, error)]
        return []

    def finish(self) -> List[str]:
        """Draw the report of what has been done so far; returns lines for the user."""
        if self._folder is None:
            return []
        try:
            return build_report(self._folder)
        except Exception as error:  # the training itself has gone well
            return [_trouble(self._folder, error)]


def _trouble(folder: RunFolder, error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return (f"The report is not complete ({' '.join(text.split())}); 'python -m utils.report "
            f"{folder.path}' draws it again")


def open_record(args: argparse.Namespace, training: Training, start: int) -> RunRecord:
    """Open what the command line asks for, and print where it is.

    Raises:
        UserError: something cannot be written.
    """
    if not training.processes.is_main:
        return RunRecord()
    if training.saver.plan.enabled:
        refuse_unwritable(training.saver.plan.folder)
    flags = {name: value for name, value in vars(args).items()
             if name not in _NOT_RERUN and name not in flagged_fields()}
    folder = None
    if not (args.no_run_folder or args.train_performance):
        folder = open_folder(args, training, flags, start)
    log = RunLog(training.config.name, None if args.no_log else args.log_folder,
                 None if args.no_log else args.tensorboard, folder, start)
    if folder is not None:
        print("\n".join([f"Run folder : {folder.path}"] + log.notes), flush=True)
    record = RunRecord(log, folder)
    record.write("session", config=training.config.to_dict(), args=flags,
                 device=describe(training.learner.device))
    return record


def open_folder(args: argparse.Namespace, training: Training, flags: Dict[str, Any],
                start: int) -> RunFolder:
    """The run folder with what this session is going to do.

    A resumed run, and one that torch's launcher has started again, goes on in the folder it had;
    what its tables say of iterations after `start` is dropped.
    """
    config = training.config
    folder = folder_of_run(args.project, args.name or config.name, training.saver.run_folder,
                           os.environ)
    if not folder.read_config():
        released = get_config(config.name if config.name in list_configs() else "yolact_base")
        data = {"train": describe_data(training.dataset)}
        if training.validation is not None:
            data["val"] = describe_data(training.validation.evaluation.dataset)
        folder.write_config({
            "program": "train.py", "config": released.name,
            "set": config.changes_from(released),
            "flags": {name: value for name, value in flags.items() if value is not None},
            "run": dict(_facts(training, args.seed), config=config.to_dict()), "data": data})
    folder.add_session(describe_session(
        describe(training.learner.device), args.command_line, seed=args.seed,
        processes=training.processes.world_size, start_iteration=start))
    folder.go_on_from(start)
    training.saver.run_folder = folder.origin
    return folder


def _facts(training: Training, seed: int) -> Dict[str, Any]:
    """What follows from the configuration and the data, for the report."""
    epoch_size, max_iter = training.loader.epoch_size, training.schedule.max_iter
    return {
        "parameters": sum(p.numel() for p in training.learner.model.parameters()),
        "images_per_card": training.loader.batch_size, "cards": training.processes.world_size,
        "batches_per_step": training.sharing.micro_batches,
        "images_per_step": training.images_per_step, "iterations_per_epoch": epoch_size,
        "max_iter": max_iter, "epochs": round(max_iter / epoch_size, 2),
        "base_lr": training.schedule.base_lr, "precision": training.learner.precision.name,
        "seed": seed, "class_names": training.dataset.class_names,
        "category_ids": [category.id for category in training.dataset.categories]}
