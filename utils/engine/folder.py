"""What a training puts into its run folder, and when. Only the main process has one."""

from __future__ import annotations

import os
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from torch import Tensor

from data.coco import CocoDataset
from data.config import Config, get_config
from utils.checkpoint import remove_checkpoint, write_pair
from utils.errors import UserError
from utils.inference.evaluation_record import ScoredEvaluation, describe_data, write_evaluation
from utils.report import build_report
from utils.run_folder import REPORT, WEIGHTS, RunFolder, best_row

REPORT_SECONDS = 60
"""Between two reports of a training that validates often."""

Checkpoint = Tuple[Dict[str, Tensor], Dict[str, Any]]
"""Weights, and the state beside them."""


def begin_session(folder: RunFolder, config: Config, flags: Mapping[str, Any],
                  facts: Mapping[str, Any], data: Mapping[str, Optional[CocoDataset]], start: int,
                  session: Mapping[str, Any]) -> None:
    """Note what is trained and on what; drop what the tables say of iterations after `start`.

    Args:
        folder: of `utils.run_folder.folder_of_run`; one that has a configuration keeps it.
        config: of the network and its training.
        flags: of the command line, that start the same training again; None is not given.
        facts: what follows from these, in plain types: `max_iter`, `iterations_per_epoch`,
            `class_names` and whatever else the report is to show.
        data: datasets by split, `train` and `val`.
        start: iteration that the session starts at.
        session: of `utils.run_folder.describe_session`.
    """
    if not folder.read_config():
        fields, released = config.to_dict(), get_config(config.name).to_dict()
        folder.write_config({
            "program": "train.py", "config": config.name,
            "set": {name: value for name, value in fields.items() if value != released[name]},
            "flags": {name: value for name, value in flags.items() if value is not None},
            "run": dict(facts, config=fields),
            "data": {split: describe_data(dataset) for split, dataset in data.items()
                     if dataset is not None}})
    folder.add_session(dict(session, start_iteration=start))
    folder.go_on_from(start)


def recorded_best(folder: RunFolder) -> Optional[Tuple[int, float, Optional[float]]]:
    """Iteration, mask and box average precision in [0, 1] of the best row of results.csv, if any.

    It may be one that eval.py scored and that the training does not know.
    """
    row = best_row(folder.results.rows())
    if row is None:
        return None
    box = row["box_mAP"]
    return int(row["iteration"]), float(row["mask_mAP"]) / 100, float(box) / 100 if box else None


def add_validation(folder: RunFolder, evaluation: ScoredEvaluation,
                   best: Optional[Callable[[], Checkpoint]]) -> Optional[str]:
    """Keep weights that are the best so far and what they found.

    The report is drawn anew if the last one is a minute old.

    Args:
        folder: with the validation's row in results.csv.
        evaluation: the validation.
        best: gives the weights that were scored; None where earlier ones are better.

    Returns:
        A sentence for the user, if something went wrong.
    """
    if best is not None:
        new = folder.file(WEIGHTS, ".best.new.pth")
        write_pair(new, *best())
        folder.keep_weights(new, "best")
        remove_checkpoint(new)
    report = folder.file(REPORT)
    try:
        if best is not None:
            write_evaluation(folder, evaluation)
        if not os.path.exists(report) or time.time() - os.path.getmtime(report) > REPORT_SECONDS:
            build_report(folder)
    except Exception as error:  # an image is no reason to lose a training
        return _trouble(folder, error)
    return None


def finish_folder(folder: RunFolder) -> List[str]:
    """Draw the report of what has been done so far; returns lines for the user."""
    try:
        return build_report(folder)
    except Exception as error:  # the training itself has gone well
        return [_trouble(folder, error)]


def _trouble(folder: RunFolder, error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return (f"The report is not complete ({' '.join(text.split())}); 'python -m utils.report "
            f"{folder.path}' draws it again")
