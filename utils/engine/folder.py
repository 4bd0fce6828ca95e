"""What a training puts into its run folder, and when. Only the main process has one."""

from __future__ import annotations

import os
import time
from typing import Any, Dict, Mapping, Optional

from data.config import get_config
from utils.checkpoint import remove_checkpoint, write_pair
from utils.device import describe
from utils.engine.saving import state_of, weights_of
from utils.engine.setup import Run
from utils.errors import UserError
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
_NOT_FLAGS = ("command_line", "stored_config", "rerun", "resume", "start_iter", "local_rank")


def open_folder(run: Run, start: int, environ: Mapping[str, str]) -> Optional[RunFolder]:
    """The folder of this run, with its configuration; None where it is to have none.

    A resumed run, and one that torch's launcher has started again, goes on in the folder it had;
    what its tables say of iterations after `start` is dropped.

    Raises:
        UserError: the folder cannot be made, or --name is no name of a folder.
    """
    args = run.args
    if args.no_run_folder or args.train_performance or not run.processes.is_main:
        return None
    name = check_name(args.name) if args.name else run.config.name
    folder = resumed_folder(args.project, run.folder_before)
    if folder is None and start == 0:
        folder = restarted_folder(args.project, name, environ)
    if folder is None:
        folder = create_run_folder(args.project, name, launch_id(environ))
    if not folder.read(CONFIG):
        folder.write(CONFIG, _contents(run, folder))
    folder.add_session(describe_environment(
        describe(run.device), args.command_line, processes=run.processes.world_size,
        seed=args.seed, start_iteration=start))
    folder.go_on_from(start)
    return folder


def add_validation(run: Run, scored: Scored, is_best: bool) -> Optional[str]:
    """Keep the best weights and what they found; returns a sentence if something went wrong.

    The report is drawn anew if the last one is a minute old.
    """
    folder = run.folder
    if folder is None:
        return None
    if is_best:
        new = folder.file("weights", ".best.new.pth")
        write_pair(new, weights_of(run), state_of(run, run.best.iteration))
        folder.keep_weights(new, "best")
        remove_checkpoint(new)
    try:
        if is_best:
            add_evaluation(folder, scored)
        report = folder.file(REPORT)
        if not os.path.exists(report) or time.time() - os.path.getmtime(report) > REPORT_SECONDS:
            build_report(folder)
    except Exception as error:  # a picture is no reason to lose a training
        return _trouble(folder, error)
    return None


def finish_folder(run: Run) -> Optional[str]:
    """Draw the report of what has been done so far; returns a sentence for the user, if any."""
    if run.folder is None:
        return None
    try:
        return build_report(run.folder)
    except Exception as error:  # the training itself has gone well
        return _trouble(run.folder, error)


def _trouble(folder: RunFolder, error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return "The report is not complete ({}); 'python -m utils.report {}' draws it again".format(
        " ".join(text.split()), folder.path)


def _contents(run: Run, folder: RunFolder) -> Dict[str, Any]:
    """What config.json says: flags and configuration to start again from, and what they mean."""
    config, epoch_size = run.config.to_dict(), run.loader.epoch_size
    released = get_config(run.config.name).to_dict()
    flags = {key: value for key, value in vars(run.args).items() if key not in _NOT_FLAGS}
    max_iter = run.learning_rate.max_iter
    data = {"train": describe_data(run.dataset)}
    if run.validation_set is not None:
        data["val"] = describe_data(run.validation_set)
    return {
        "format": FORMAT, "id": folder.run_id, "program": "train.py", "flags": flags,
        "config": config,
        "changed": [key for key, value in config.items() if value != released[key]],
        "run": {
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "images_per_card": run.loader.batch_size, "cards": run.processes.world_size,
            "batches_per_step": run.sharing.micro_batches,
            "images_per_step": run.loader.batch_size * run.sharing.shares,
            "iterations_per_epoch": epoch_size, "max_iter": max_iter,
            "epochs": round(max_iter / epoch_size, 2), "base_lr": run.learning_rate.base_lr,
            "precision": run.precision.name, "seed": run.args.seed,
            "class_names": run.dataset.class_names,
            "category_ids": [category.id for category in run.dataset.categories]},
        "data": data}
