"""The record of one training: log, results and trackers, and its run folder.

A record is a kind (session, train, epoch, val) and values; losses go under whatever names they
have. Only the main process keeps records.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from data.config import get_config, list_configs
from utils.checkpoint import remove_checkpoint, save_checkpoint
from utils.cli import print_lines
from utils.device import describe
from utils.distributed.processes import is_restart
from utils.engine.learner import Learner
from utils.engine.saving import Saver
from utils.engine.setup import Training
from utils.engine.trackers import TensorBoard, Tracker, open_tracker, require_tracker
from utils.engine.train_flags import flagged_fields
from utils.errors import UserError, first_line
from utils.files import refuse_unwritable, temporary_name
from utils.inference.evaluation_record import ScoredEvaluation, describe_data, write_evaluation
from utils.report import build_report
from utils.run_folder import (
    LOG,
    REPORT,
    Row,
    RunFolder,
    append_record,
    best_row,
    folder_of_run,
    timestamp,
)

REPORT_SECONDS, RESULTS_SECONDS = 60, 10
"""Between two reports of a training that validates often, and two results.csv of short epochs."""
_PACKAGES = ("torch", "numpy", "cv2", "PIL", "matplotlib")
_GIT_SECONDS = 10
_NOT_RERUN = ("command_line", "recipe", "settings", "config", "rerun", "resume", "start_iter",
              "local_rank")
"""Flags that do not belong to a training but to one start of it, or to its configuration."""


class RunRecord:
    """Takes what happens in a training; without arguments, as in all processes but the main one,
    it does nothing.

    Once it is open, what cannot be written is said, once, and left out: a full disk under a record
    is no reason to lose a training.

    Args:
        folder: of the run; gets log, results, weights, the report and, where TensorBoard is
            installed, its events; where it is not, `notes` says so.
        log: path of another log, with the same lines, that the user asked for.
        board: folder of TensorBoard events that the user asked for.
        tracker: another that the user asked for.
        start: iteration that the run goes on from; what earlier events say of later ones is void.

    Raises:
        UserError: something cannot be written, or `board` is given and TensorBoard not installed.
    """

    def __init__(self, folder: RunFolder | None = None, log: str | None = None,
                 board: str | None = None, tracker: Tracker | None = None, start: int = 0) -> None:
        self.notes: list[str] = []
        self._folder = folder
        self._said: set[str] = set()
        self._updated = 0.0
        own_log = None if folder is None else folder.file(LOG)
        self._logs = [path for path in (log, own_log) if path is not None]
        self._trackers = [] if tracker is None else [tracker]
        for place in (board, self.path):
            try:
                if place is not None:
                    self._trackers.append(TensorBoard(place, start))
            except ImportError as error:
                if place == board:
                    raise UserError(f"--tensorboard needs the package tensorboard ({error}); "
                                    "install it or leave the flag out") from error
                self.notes.append("TensorBoard is not installed: no events in the run folder (pip "
                                  "install tensorboard)")
            except UserError as error:
                if place == board:
                    raise
                self.notes.append(f"No events in the run folder: {error}")
        for path in self._logs:
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                open(path, "a").close()
            except OSError as error:
                raise UserError(f"cannot write the log '{path}': {error.strerror}; choose another "
                                "folder with --log_folder, or give --no_log") from error

    @property
    def path(self) -> str | None:
        """Of the run folder; None without one."""
        return None if self._folder is None else self._folder.path

    def write(self, kind: str, **values: Any) -> None:
        """Add a record to all logs: `session`; `train`, as `Observer.progress` puts it together;
        `epoch`; or `val`, a summary of scores. Of the last two there is a row in results.csv.
        """
        for path in self._logs:
            with self._trying(f"the log '{path}'"):
                append_record(path, kind, values)
        if kind == "val" or (kind == "epoch" and time.time() - self._updated > RESULTS_SECONDS):
            self._update_results()
        if kind in ("train", "val"):
            numbers = {f"{kind}/{key}": value for key, value in flatten(values).items()}
            self._to_trackers(lambda tracker: tracker.log(numbers, values["iteration"]))

    def keep_weights(self, path: str, name: str = "last") -> None:
        """Make a checkpoint the run folder's last or best one."""
        if self._folder is not None:
            with self._trying(f"the run folder's {name} weights"):
                self._folder.keep_weights(path, name)

    def keep_best(self, learner: Learner, saver: Saver, done: int) -> None:
        """Make the weights that were scored the run folder's best ones."""
        if self._folder is not None:
            new = temporary_name(self._folder.weights("best"), ".pth")
            with self._trying("the run folder's best weights"):
                save_checkpoint(new, learner.weights(), saver.state(done))
            self.keep_weights(new, "best")
            remove_checkpoint(new)

    def recorded_best(self) -> Row | None:
        """The best row of results.csv; eval.py may have made it, unknown to the training."""
        with self._trying("results.csv"):
            return None if self._folder is None else best_row(self._folder.results())
        return None

    def add_validation(self, evaluation: ScoredEvaluation, is_best: bool) -> list[str]:
        """Keep what the best weights found; the report is drawn anew if it is a minute old. Returns
        a line for the user, if something went wrong.
        """
        def draw(folder: RunFolder) -> list[str]:
            if is_best:
                write_evaluation(folder, evaluation)
            report = folder.file(REPORT)
            if not os.path.exists(report) or (
                    time.time() - os.path.getmtime(report) > REPORT_SECONDS):
                build_report(folder)
            return []

        return self._drawn(draw)

    def finish(self) -> list[str]:
        """Close what is open and draw the report; returns lines for the user."""
        self._update_results()
        self._to_trackers(lambda tracker: tracker.close())
        return self._drawn(build_report)

    def _update_results(self) -> None:
        if self._folder is not None:
            with self._trying("results.csv"):
                self._folder.update_results()
            self._updated = time.time()

    def _to_trackers(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            with self._trying(tracker.name):
                try:
                    tell(tracker)
                except Exception as error:  # whatever a foreign package, or its server, raises
                    raise UserError(first_line(error)) from error

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        """Say what fails, unless it is already known to."""
        try:
            yield
        except (OSError, UserError) as error:
            if name not in self._said:
                self._said.add(name)
                reason = error if isinstance(error, UserError) else error.strerror or error
                print(f"Warning: {name} cannot be written ({reason}); the training goes on",
                      flush=True)

    def _drawn(self, draw: Callable[[RunFolder], list[str]]) -> list[str]:
        """What `draw` has to say, or why it failed: an image is no reason to lose a training."""
        if self._folder is None:
            return []
        try:
            return draw(self._folder)
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            return [f"The report is not complete ({kind}{' '.join(str(error).split())}); 'python "
                    f"-m utils.report {self._folder.path}' draws it again"]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"losses": {"B": 1}}` becomes `{"losses.B": 1}`; what is no number is left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, prefix + key + "."))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def open_record(args: argparse.Namespace, training: Training, start: int) -> RunRecord:
    """Open what the command line asks for, and print where it is.

    Raises:
        UserError: something cannot be written.
    """
    if not training.processes.is_main:
        return RunRecord()
    log_folder, board, tracker_name = (None, None, None) if args.no_log else (
        args.log_folder, args.tensorboard, args.track)
    if tracker_name is not None:
        require_tracker(tracker_name)
    for flag, place in (("--log_folder", log_folder), ("--tensorboard", board)):
        if place is not None and "://" not in place:  # TensorBoard takes those
            try:
                refuse_unwritable(place)
            except UserError as error:
                raise UserError(f"{error} with {flag}") from error
    flags = {name: value for name, value in vars(args).items()
             if name not in _NOT_RERUN and name not in flagged_fields()}
    config, folder, tracker = training.config, None, None
    if not (args.no_run_folder or args.train_performance):
        folder = open_folder(args, training, flags, start)
    path = None if folder is None else folder.path
    if tracker_name is not None:
        tracker = open_tracker(tracker_name, training.saver.training_id,
                               os.path.basename(path or config.name), config.to_dict(), path)
    log = None if log_folder is None else os.path.join(log_folder, config.name + ".log")
    record = RunRecord(folder, log, board, tracker, start)
    if folder is not None:
        print_lines([f"Run folder : {folder.path}"] + record.notes)
    record.write("session", config=config.to_dict(), args=flags,
                 device=describe(training.learner.device))
    return record


def open_folder(args: argparse.Namespace, training: Training, flags: dict[str, Any],
                start: int) -> RunFolder:
    """The run folder with what this session is going to do.

    A resumed run, and one that torch's launcher has started again, goes on in the folder it had;
    what its tables say of iterations after `start` is dropped.
    """
    config = training.config
    folder = folder_of_run(args.project, args.name or config.name, training.saver.training_id,
                           training.saver.run_folder, is_restart(os.environ))
    released = get_config(config.name if config.name in list_configs() else "yolact_base")
    data = {"train": describe_data(training.dataset)}
    if training.validation is not None:
        data["val"] = describe_data(training.validation.evaluation.dataset)
    folder.write_config({
        "program": "train.py", "config": released.name, "set": config.changes_from(released),
        "flags": {name: value for name, value in flags.items() if value is not None},
        "run": dict(_facts(training, args.seed), config=config.to_dict()), "data": data})
    folder.add_session(describe_session(
        describe(training.learner.device), args.command_line, seed=args.seed,
        processes=training.processes.world_size, start_iteration=start))
    folder.go_on_from(start)
    training.saver.run_folder = folder.path
    return folder


def describe_session(device: str, argv: Sequence[str], **more: Any) -> dict[str, Any]:
    """What a program runs on; `argv` begins with the program."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(ImportError):
            versions[name] = str(importlib.import_module(name).__version__)
    return dict({
        "time": timestamp(), "command": " ".join(shlex.quote(word) for word in argv),
        "folder": os.getcwd(), "host": platform.node(), "system": platform.platform(),
        "device": device, "cores": os.cpu_count(), "python": platform.python_version(),
        "packages": versions, "source": source_version()}, **more)


def source_version() -> str | None:
    """Git commit of the project, with `-dirty` where files differ from it; None outside of git."""
    folder = str(Path(__file__).resolve().parents[2])
    if not os.path.exists(os.path.join(folder, ".git")):
        return None
    command = ["git", "-C", folder, "describe", "--always", "--long", "--dirty", "--abbrev=40"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=_GIT_SECONDS,
                                       universal_newlines=True).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _facts(training: Training, seed: int) -> dict[str, Any]:
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
