"""The folder of one run, `runs/<name>/`: what was asked for, what came of it, the weights.

    config.json         configuration, flags, data: what `train.py --rerun` starts again from
    environment.json    versions, device, command line, source; an entry for each session
    results.csv         a row for each epoch and each validation
    training.csv        a row for each log line
    weights/            best.pth and last.pth, each with its .state
    evaluation/         scores by class, confusion matrix and pictures of the last evaluation
    plots/              curves and bars
    report.html         all of it on one page

Only the main process writes. Each file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from typing import Any, Dict, List, Mapping, Optional, Sequence

from utils.checkpoint import Origin, state_path
from utils.errors import UserError
from utils.files import write_whole
from utils.run_tables import RunTable

FORMAT = 1
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
RESULTS = "results.csv"
TRAINING = "training.csv"
REPORT = "report.html"
WEIGHTS = "weights"

LOSSES = ("B", "C", "M", "S", "I")
"""As the log lines name them: boxes, classes, masks, semantic segmentation, mask re-scoring."""
_LOSS_COLUMNS = tuple("loss_" + name for name in LOSSES) + ("loss_total",)
RESULT_COLUMNS = ("iteration", "epoch", "time", "lr") + _LOSS_COLUMNS + (
    "images_per_second", "skipped_steps", "images_scored", "box_mAP", "box_AP50", "box_AP75",
    "mask_mAP", "mask_AP50", "mask_AP75")
TRAINING_COLUMNS = ("iteration", "epoch", "lr") + _LOSS_COLUMNS + (
    "images_per_second", "skipped_steps", "seconds_per_step", "data_seconds", "memory_MiB")

_NAME = re.compile(r"^[^/\\\x00-\x1f]+$")
_MOST_FOLDERS = 100000


class RunFolder:
    """Paths of a run's files, and the few operations on them that are not somebody else's.

    Args:
        path: of the folder.
        run_id: tells runs apart that happen to have the same name.
    """

    def __init__(self, path: str, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        self.results = RunTable(self.file(RESULTS), RESULT_COLUMNS)
        self.training = RunTable(self.file(TRAINING), TRAINING_COLUMNS)

    def file(self, *parts: str) -> str:
        """Path of a file in the folder."""
        return os.path.join(self.path, *parts)

    def weights(self, name: str) -> str:
        """Path of `best` or `last`."""
        return self.file(WEIGHTS, name + ".pth")

    @property
    def origin(self) -> Dict[str, Any]:
        """What a checkpoint remembers, to find the folder again."""
        return {"path": self.path, "id": self.run_id}

    def read(self, name: str) -> Dict[str, Any]:
        """A JSON file of the folder; empty where there is none, or none that can be read."""
        return read_json(self.file(name)) or {}

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder."""
        write_json(self.file(name), values)

    def add_session(self, session: Mapping[str, Any]) -> None:
        """Note where and how the program was started, once more."""
        sessions: List[Any] = self.read(ENVIRONMENT).get("sessions", [])
        self.write(ENVIRONMENT, {"sessions": sessions + [dict(session)]})

    def go_on_from(self, iteration: int) -> None:
        """Take back the rows that follow `iteration`: they are going to be made again."""
        self.results.keep_until(iteration)
        self.training.keep_until(iteration)

    def keep_weights(self, path: str, name: str) -> None:
        """Make `best` or `last` the weights at `path`, with their state; a hard link if it works.

        The weights never stand beside the state of others: the old state goes first.
        """
        target = self.weights(name)
        if os.path.exists(target) and os.path.samefile(path, target):
            return
        new = [(path, target), (state_path(path), state_path(target))]
        new = [(source, place) for source, place in new if os.path.exists(source)]
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            for source, place in new:
                _link(source, place + ".new")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(state_path(target))
            for _, place in new:
                os.replace(place + ".new", place)
        except OSError as error:
            raise UserError(f"cannot write '{target}': {error.strerror or error}; free some space, "
                            "choose another folder with --project, or leave it out with "
                            "--no_run_folder") from error


def check_name(name: str) -> str:
    """A name that can be a folder's, or a `UserError`."""
    if not _NAME.match(name) or name in (".", "..") or name != name.strip():
        raise UserError(f"--name is '{name}', expected the name of a folder without / and spaces "
                        "around it; the place it is made in is --project")
    return name


def create_run_folder(project: str, name: str, run_id: str) -> RunFolder:
    """Make `project/name`, or `name-2`, `name-3`, .. where that is taken.

    Raises:
        UserError: the folder cannot be made.
    """
    for number in range(1, _MOST_FOLDERS):
        path = os.path.join(project, name if number == 1 else f"{name}-{number}")
        try:
            os.makedirs(project, exist_ok=True)
            os.mkdir(path)
        except FileExistsError:
            if os.path.isdir(project):
                continue
            raise UserError(f"--project is '{project}', which is a file; give a folder") from None
        except OSError as error:
            raise UserError(f"cannot make the run folder '{path}': {error.strerror or error}; "
                            "choose another place with --project, or leave it out with "
                            "--no_run_folder") from error
        return RunFolder(path, run_id)
    raise UserError(f"'{project}' has {_MOST_FOLDERS} run folders called '{name}'; choose another "
                    "--name")


def open_run_folder(path: str) -> Optional[RunFolder]:
    """The run folder at `path`; None where there is none."""
    values = read_json(os.path.join(path, CONFIG))
    if values is None or values.get("format") != FORMAT or not isinstance(values.get("id"), str):
        return None
    return RunFolder(path, values["id"])


def find_run_folder(weights_path: str, origin: Optional[Origin]) -> Optional[RunFolder]:
    """The folder of the run that made some weights; None where it is not known or gone.

    Weights that lie in a run folder belong to it, and others to the one that their state names.
    """
    inside, last = os.path.split(os.path.dirname(os.path.abspath(weights_path)))
    if last == WEIGHTS:
        found = open_run_folder(os.path.relpath(inside))
        if found is not None:
            return found
    found = None if origin is None or origin.path is None else open_run_folder(origin.path)
    return found if found is not None and origin and found.run_id == origin.run_id else None


def resumed_folder(project: str, origin: Optional[Mapping[str, Any]]) -> Optional[RunFolder]:
    """The folder in which a resumed run goes on; made again where it was removed.

    Args:
        project: where run folders are.
        origin: `RunFolder.origin` as the checkpoint has it.

    Returns:
        None where the checkpoint names none, or where its name belongs to another run by now.
    """
    if not origin:
        return None
    places = [str(origin["path"]), os.path.join(project, os.path.basename(str(origin["path"])))]
    for path in places:
        found = open_run_folder(path)
        if found is not None and found.run_id == origin["id"]:
            return found
    if os.path.exists(places[-1]):
        return None
    return create_run_folder(project, os.path.basename(places[-1]), str(origin["id"]))


def restarted_folder(project: str, name: str, environ: Mapping[str, str]) -> Optional[RunFolder]:
    """The folder that an earlier attempt of this launch made before its first checkpoint."""
    if int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0) == 0:
        return None
    wanted = launch_id(environ)
    for number in range(1, _MOST_FOLDERS):
        path = os.path.join(project, name if number == 1 else f"{name}-{number}")
        if not os.path.isdir(path):
            return None
        found = open_run_folder(path)
        if found is not None and found.run_id == wanted:
            return found
    return None


def launch_id(environ: Mapping[str, str]) -> str:
    """A name for this run that no other has, the same in each attempt of a launch."""
    launch = environ.get("LAUNCH_TIME"), environ.get("MASTER_PORT")
    if all(launch):
        return "launch-{}-{}".format(*launch)
    return f"{time.time_ns():x}-{os.getpid():x}"


def read_json(path: str) -> Optional[Dict[str, Any]]:
    """An object from a JSON file; None where there is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            values = json.load(stream)
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_json(path: str, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people: indented, names as they are."""
    data = json.dumps(values, indent=2, ensure_ascii=False, default=str).encode("utf-8")
    write_whole(path, lambda stream: stream.write(data + b"\n"))


def _link(source: str, target: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def loss_cells(losses: Mapping[str, float], total: float) -> Dict[str, float]:
    """Cells of the losses of a log line."""
    return dict({"loss_" + name: value for name, value in losses.items()}, loss_total=total)


def score_cells(summary: Mapping[str, Any]) -> Dict[str, Any]:
    """Cells of an evaluation, in percent, from `CocoResults.summary()`."""
    cells: Dict[str, Any] = {"images_scored": summary["images"]}
    for kind in ("box", "mask"):
        for column, key in (("mAP", "AP"), ("AP50", "AP50"), ("AP75", "AP75")):
            value = summary[kind][key]
            cells[f"{kind}_{column}"] = None if value is None else 100 * value
    return cells


def best_row(rows: Sequence[Mapping[str, str]]) -> Optional[Mapping[str, str]]:
    """The row with the best mask mAP, the first of equal ones; None where nothing was scored."""
    scored = [row for row in rows if row.get("mask_mAP")]
    return max(scored, key=lambda row: float(row["mask_mAP"])) if scored else None
