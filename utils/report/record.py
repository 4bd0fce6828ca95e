"""Put what eval.py found into the run folder that its weights belong to."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Optional

from utils.checkpoint import Origin
from utils.errors import UserError
from utils.report.build import build_report
from utils.report.evaluation import Scored, add_evaluation, recorded_evaluation
from utils.run_environment import describe_data
from utils.run_folder import (
    CONFIG,
    FORMAT,
    REPORT,
    RunFolder,
    best_row,
    find_run_folder,
    launch_id,
    open_run_folder,
    score_cells,
)

AUTO, NONE = "auto", "none"


def folder_for(choice: str, weights_path: str, origin: Optional[Origin],
               config: Dict[str, Any]) -> Optional[RunFolder]:
    """The folder that an evaluation goes to.

    Args:
        choice: `auto` for that of the run that made the weights, if it is there; `none`; or a
            folder, which is made if it does not exist.
        weights_path: what is evaluated.
        origin: what the state beside the weights says of them.
        config: of the network, for a folder that is made.
    """
    if choice == NONE:
        return None
    if choice == AUTO:
        return find_run_folder(weights_path, origin)
    found = open_run_folder(choice)
    if found is None:
        found = RunFolder(choice, launch_id({}))
        found.write(CONFIG, {"format": FORMAT, "id": found.run_id, "program": "eval.py",
                             "config": config})
    return found


def record_evaluation(folder: RunFolder, scored: Scored, origin: Optional[Origin],
                      demanded: bool) -> List[str]:
    """Add scores, confusion matrix and pictures to a run folder and draw its report.

    An evaluation on fewer images of the same file than the recorded one is left out unless it is
    `demanded`. Where the training did not validate at the weights' iteration, the row of
    results.csv gets the scores of an evaluation on all images, and the best of them are best.pth.

    Returns:
        Lines for the user.

    Raises:
        UserError: the folder cannot be written.
    """
    before = recorded_evaluation(folder)
    images = len(scored.evaluator)
    if not demanded and before.get("annotations") == scored.dataset.annotation_file and (
            images < before["images"]):
        return ["Run folder : {} keeps its evaluation of {} images; --run_folder={} replaces "
                "it".format(folder.path, before["images"], folder.path)]
    add_evaluation(folder, scored)
    if origin is not None and origin.run_id == folder.run_id and images == len(scored.dataset):
        _fill_row(folder, scored, origin)
    missing = build_report(folder)
    return ([missing] if missing else []) + [f"Report : {folder.file(REPORT)}"]


def _fill_row(folder: RunFolder, scored: Scored, origin: Origin) -> None:
    """Give the weights' iteration its scores, unless it has some or these are of other data."""
    contents = folder.read(CONFIG)
    data = contents.get("data", {})
    known = data.get("val", {}).get("annotation_file")
    here = scored.dataset.annotation_file
    if known is not None and os.path.abspath(known) != os.path.abspath(here):
        return
    rows = {row["iteration"]: row for row in folder.results.rows()}
    iteration = str(origin.iteration)
    if rows.get(iteration, {}).get("mask_mAP"):
        return
    if known is None:
        folder.write(CONFIG, dict(contents, data=dict(data, val=describe_data(scored.dataset))))
    size = contents.get("run", {}).get("iterations_per_epoch")
    folder.results.add(dict(score_cells(scored.results.summary()), iteration=iteration,
                            epoch=int(iteration) // size if size else None))
    best = best_row(folder.results.rows())
    if best is not None and best["iteration"] == iteration:
        folder.keep_weights(scored.weights, "best")


def trouble(folder: RunFolder, error: UserError) -> str:
    """What to say where a folder that nobody asked for cannot be written."""
    return f"Run folder : {folder.path} is left as it was ({error}); --run_folder=none says nothing"
