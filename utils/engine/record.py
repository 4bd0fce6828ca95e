"""The record of one training: its logs and its run folder. Only the main process has one."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, Dict, List, Optional, Sequence

from data.coco import CocoDataset
from data.config import get_config
from utils.checkpoint import remove_checkpoint, write_pair
from utils.device import describe
from utils.engine.learner import Learner
from utils.engine.log import RunLog, open_log
from utils.engine.saving import Saver
from utils.engine.setup import Training
from utils.errors import UserError
from utils.files import refuse_unwritable
from utils.inference.evaluator import CocoEvaluator
from utils.inference.results import CocoResults
from utils.report.build import build_report
from utils.report.evaluation import Scored, add_evaluation
from utils.run_environment import describe_data, describe_environment
from utils.run_folder import (
    CONFIG,
    FORMAT,
    REPORT,
    RunFolder,
    check_name,
    create_run_folder,
    launch_id,
    restarted_folder,
    resumed_folder,
)

REPORT_SECONDS = 60
"""Between two reports of a training that validates often."""
_NOT_FLAGS = ("command_line", "recipe", "rerun", "resume", "start_iter", "local_rank", "settings")


class RunRecord:
    """Takes what happens in a training; does nothing in all processes but the main one.

    Args:
        log: None where nothing is written.
        folder: None where none is made.
        lines: for the user, on what is written where.
    """

    def __init__(self, log: Optional[RunLog] = None, folder: Optional[RunFolder] = None,
                 lines: Sequence[str] = ()) -> None:
        self._log, self._folder = log, folder
        self.lines = list(lines)

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

    def add_validation(self, evaluator: CocoEvaluator, results: CocoResults, dataset: CocoDataset,
                       done: int, is_best: bool, learner: Learner, saver: Saver) -> str:
        """Keep the best weights and what they found; returns a sentence if something went wrong.

        The report is drawn anew if the last one is a minute old.
        """
        folder = self._folder
        if folder is None:
            return ""
        if is_best:
            new = folder.file("weights", ".best.new.pth")
            write_pair(new, learner.weights(), saver.state(done))
            folder.keep_weights(new, "best")
            remove_checkpoint(new)
        try:
            if is_best:
                add_evaluation(folder, Scored(evaluator, results, dataset, "best.pth", done))
            report = folder.file(REPORT)
            if not os.path.exists(report) or (
                    time.time() - os.path.getmtime(report) > REPORT_SECONDS):
                build_report(folder)
        except Exception as error:  # an image is no reason to lose a training
            return self._trouble(error)
        return ""

    def finish(self) -> List[str]:
        """Draw the report of what has been done so far; returns lines for the user."""
        if self._folder is None:
            return []
        try:
            missing = build_report(self._folder)
        except Exception as error:  # the training itself has gone well
            missing = self._trouble(error)
        return ([missing] if missing else []) + [f"Report : {self._folder.file(REPORT)}"]

    def _trouble(self, error: Exception) -> str:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return (f"The report is not complete ({' '.join(text.split())}); 'python -m utils.report "
                f"{self.path}' draws it again")


def open_record(args: argparse.Namespace, training: Training, start: int) -> RunRecord:
    """Open what the command line asks for.

    Raises:
        UserError: something cannot be written.
    """
    if not training.processes.is_main:
        return RunRecord()
    if training.saver.plan.enabled:
        refuse_unwritable(training.saver.plan.folder)
    folder = _open_folder(args, training, start)
    log = open_log(args, training.config.name, folder, start)
    lines = [] if folder is None else [f"Run folder : {folder.path}"] + log.notes
    record = RunRecord(log, folder, lines)
    record.write("session", config=training.config.to_dict(), args=_plain(vars(args)),
                 device=describe(training.learner.device))
    return record


def _open_folder(args: argparse.Namespace, training: Training, start: int) -> Optional[RunFolder]:
    """The folder of this run, with its configuration; None where it is to have none.

    A resumed run, and one that torch's launcher has started again, goes on in the folder it had;
    what its tables say of iterations after `start` is dropped.
    """
    if args.no_run_folder or args.train_performance:
        return None
    name = check_name(args.name) if args.name else training.config.name
    folder = resumed_folder(args.project, training.saver.run_folder)
    if folder is None and start == 0:
        folder = restarted_folder(args.project, name, os.environ)
    if folder is None:
        folder = create_run_folder(args.project, name, launch_id(os.environ))
    if not folder.read(CONFIG):
        folder.write(CONFIG, _contents(args, training, folder))
    folder.add_session(describe_environment(
        describe(training.learner.device), args.command_line,
        processes=training.processes.world_size, seed=args.seed, start_iteration=start))
    folder.go_on_from(start)
    training.saver.run_folder = folder.origin
    return folder


def _plain(flags: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in flags.items() if key not in _NOT_FLAGS}


def _contents(args: argparse.Namespace, training: Training, folder: RunFolder) -> Dict[str, Any]:
    """Flags and configuration to start again from, and what they mean."""
    config, epoch_size = training.config, training.loader.epoch_size
    released = get_config(config.name)
    max_iter = training.schedule.max_iter
    data = {"train": describe_data(training.dataset)}
    if training.validation is not None:
        data["val"] = describe_data(training.validation.evaluation.dataset)
    model = training.learner.model
    return {
        "format": FORMAT, "id": folder.run_id, "program": "train.py",
        "flags": _plain(vars(args)), "config": config.to_dict(),
        "changed": list(config.changes_from(released)),
        "run": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "images_per_card": training.loader.batch_size,
            "cards": training.processes.world_size,
            "batches_per_step": training.sharing.micro_batches,
            "images_per_step": training.images_per_step,
            "iterations_per_epoch": epoch_size, "max_iter": max_iter,
            "epochs": round(max_iter / epoch_size, 2), "base_lr": training.schedule.base_lr,
            "precision": training.learner.precision.name, "seed": args.seed,
            "class_names": training.dataset.class_names,
            "category_ids": [category.id for category in training.dataset.categories]},
        "data": data}
