"""The folder of one run, `runs/<name>/`: what was asked for, what came of it, the weights.

    config.yaml         recipe, changes and flags, as `train.py --config` and `--rerun` read them
    environment.json    versions, device, command line, source; an entry for each session
    log.jsonl           a JSON object for each log line, each validation, each session
    results.csv         a row for each epoch and each validation
    weights/            best.pth and last.pth, each with its .state
    evaluation/         scores by class, confusion matrix and images of the last evaluation
    plots/              curves and bars
    report.html         all of it on one page

Only the main process writes. Each file is written whole or not at all, but for the log: it grows by
whole lines, and readers drop one that a crash cut off.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    TextIO,
)

import yaml

from utils.errors import UserError
from utils.files import alone, read_whole, refuse_endless, remove_abandoned, write_whole
from utils.parsing import Form, is_number, misfit, parse_json, parse_yaml, whole_number

if TYPE_CHECKING:
    from utils.weights.files import Origin

FORMAT = 2
CONFIG = "config.yaml"
OLD_CONFIG = "config.json"
"""Of format 1, which had all fields of the configuration in place of recipe and changes."""
ENVIRONMENT = "environment.json"
LOG = "log.jsonl"
RESULTS = "results.csv"
REPORT = "report.html"
WEIGHTS = "weights"

ITERATION, TOTAL = "iteration", "loss_total"
_COLUMNS = (ITERATION, "epoch", "time", "lr")
_MORE_COLUMNS = (TOTAL, "images_per_second", "skipped_steps", "images_scored", "box_mAP",
                 "box_AP50", "box_AP75", "mask_mAP", "mask_AP50", "mask_AP75")
"""Of results.csv, before and after the losses, which have the names that the network's loss has."""

_LONGEST_NAME = 40
"""Letters of a column of results.csv; losses have shorter names, damaged tables longer ones."""

_SPLIT: Form = {"annotation_file?": str, "sentences?": [str], "objects_per_class?": {"*": int}}
_CONFIG: Form = {
    "format": int, "id?": str, "config?": (str, type(None)), "set?": dict,
    "flags?": {"data?": (str, type(None))}, "data?": {"*": _SPLIT},
    "run?": {"config?": dict, "max_iter?": int, "class_names?": (list, type(None))}}
_OLD_CONFIG: Form = {"format": lambda value: value == 1, "config": dict, "changed?": [str],
                     "run?": dict}
_SESSIONS: Form = {"sessions": [{"packages?": dict, "command?": str}]}
_EVENT: Form = {"type": str, f"{ITERATION}?": lambda value: type(value) is int and value < 2 ** 63}
_OR_NONE = (int, float, type(None))  # NaN and infinity are written as null
_TRAIN: Form = {ITERATION: int, "epoch": int, "losses": dict, **dict.fromkeys(
    ("lr", "total", "skipped", "avg_fps", "fps"), _OR_NONE)}
"""What the files hold: config.yaml of both formats, environment.json, and of log.jsonl all records
and those of type train."""

_NAME = re.compile(r"^[^/\\\x00-\x1f]+$")

Row = Dict[str, str]
"""Text by column; '' where there is no value."""


class RunFolder:
    """Paths of a run's files, and the operations on them that all who write them share.

    `run_id` tells runs apart that happen to have the same name.
    """

    def __init__(self, path: str, run_id: str) -> None:
        self.path = path
        self.run_id = run_id

    def file(self, *parts: str) -> str:
        """Path of a file in the folder."""
        return os.path.join(self.path, *parts)

    def weights(self, name: str) -> str:
        """Path of `best` or `last`."""
        return self.file(WEIGHTS, name + ".pth")

    def read(self, name: str, form: Form) -> Dict[str, Any]:
        """A JSON file of the folder; empty where there is none, or none that can be read.

        Raises:
            UserError: its values are not of this form.
        """
        values = _read_mapping(self.file(name), parse_json)
        problem = misfit(values, form) if values else ""
        if problem:
            raise UserError(f"{self.file(name)}: {problem}, so it is damaged or was written by "
                            "another program; remove it")
        return values

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file for people: indented, names as they are."""
        text = json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write any file of the folder."""
        write_whole(self.file(name), lambda stream: stream.write(data))

    def read_config(self) -> Dict[str, Any]:
        """What `write_config` wrote; empty where there is nothing. See `read_run_config`."""
        return read_run_config(self.path)

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write config.yaml: `values` after format and id of the run."""
        plain = json.loads(json.dumps(values, default=str))  # tuples have no place in YAML
        dumper: Any = type("Dumper", (yaml.SafeDumper,), {})  # writes lists on one line
        dumper.add_representer(list, lambda writer, items: writer.represent_sequence(
            "tag:yaml.org,2002:seq", items, flow_style=True))
        text: str = yaml.dump(dict({"format": FORMAT, "id": self.run_id}, **plain), Dumper=dumper,
                              sort_keys=False, allow_unicode=True, width=100)
        self.write_bytes(CONFIG, text.encode("utf-8"))

    def add_session(self, session: Mapping[str, Any]) -> None:
        """Note where and how the program was started, once more."""
        self.write(ENVIRONMENT, {"sessions": self.sessions() + [dict(session)]})

    def sessions(self) -> List[Dict[str, Any]]:
        """What `add_session` has noted so far."""
        found: List[Dict[str, Any]] = self.read(ENVIRONMENT, _SESSIONS).get("sessions", [])
        return found

    def log_records(self) -> Iterator[Dict[str, Any]]:
        """The records of log.jsonl: `type` (session, train, val), `time`, and what is known; those
        of type train that others have written, as their keys show, are left out.
        """
        return (record for record in self._log()
                if record["type"] != "train" or not misfit(record, _TRAIN))

    def _log(self) -> Iterator[Dict[str, Any]]:
        with _open(self.file(LOG)) as stream:
            for line in stream:
                record: Any = None
                with contextlib.suppress(UserError):  # cut off by a crash
                    record = parse_json(line, LOG)
                if not misfit(record, _EVENT):
                    yield record

    def training(self) -> List[Row]:
        """A row for each log line, with columns of results.csv."""
        return [_to_row(_to_text(train_cells(record))) for record in self.log_records()
                if record["type"] == "train"]

    def results(self) -> List[Row]:
        """The rows of results.csv, one for an iteration."""
        try:
            with _open(self.file(RESULTS)) as stream:
                rows = [_to_row(row) for row in csv.DictReader(stream)]
        except csv.Error as problem:
            raise UserError(f"{self.file(RESULTS)}: {problem}, so it is damaged; remove it"
                            ) from None
        return [row for row in rows if whole_number(row.get(ITERATION, "")) is not None]

    def add_result(self, values: Mapping[str, Any]) -> None:
        """Add a row to results.csv, or fill in that of the same iteration: `values` by column; what
        fits none is left out, None and NaN leave a cell as it is.
        """
        row = _to_text(values)
        with alone(Path(self.path)):
            rows = {item[ITERATION]: item for item in self.results()}
            old = rows.get(row[ITERATION], {})
            rows[row[ITERATION]] = dict(old, **{name: cell for name, cell in row.items() if cell})
            self._write_results(sorted(rows.values(), key=lambda item: int(item[ITERATION])))

    def _write_results(self, rows: Sequence[Row]) -> None:
        losses = dict.fromkeys(name for row in rows for name in row
                               if name.startswith("loss_") and name != TOTAL)
        text = io.StringIO()
        table = csv.DictWriter(text, [*_COLUMNS, *losses, *_MORE_COLUMNS], restval="",
                               extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        self.write_bytes(RESULTS, text.getvalue().encode("utf-8"))

    def go_on_from(self, iteration: int) -> None:
        """Take back what the log and the results say of later iterations: they are made again."""
        for part in ("", WEIGHTS, "evaluation"):
            remove_abandoned(self.file(part))
        if os.path.exists(self.file(LOG)):
            lines = [json.dumps(record) + "\n" for record in self._log()
                     if record.get(ITERATION, 0) <= iteration]
            self.write_bytes(LOG, "".join(lines).encode("utf-8"))
        if os.path.exists(self.file(RESULTS)):
            with alone(Path(self.path)):
                self._write_results([row for row in self.results()
                                     if int(row[ITERATION]) <= iteration])

    def keep_weights(self, path: str, name: str) -> None:
        """Make `best` or `last` the weights at `path`, with their state; a hard link if it works.

        The weights never stand beside the state of others: the old state goes first.
        """
        from utils.checkpoint import state_path  # imports PyTorch, for which a report need not wait

        target = self.weights(name)
        if os.path.exists(target) and os.path.samefile(path, target):
            return
        new = [(path, target), (state_path(path), state_path(target))]
        new = [(source, place) for source, place in new if os.path.exists(source)]
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with alone(Path(self.path)):
                for source, place in new:
                    _link(source, place + ".new")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(state_path(target))
                for _, place in new:
                    os.replace(place + ".new", place)
        except OSError as error:
            for _, place in new:
                with contextlib.suppress(OSError):
                    os.unlink(place + ".new")
            raise UserError(f"cannot write '{target}': {error.strerror or error}; free some space, "
                            "choose another folder with --project, or leave it out with "
                            "--no_run_folder") from error


def read_run_config(path: str) -> Dict[str, Any]:
    """The configuration in the run folder at `path`, of any format; empty where there is none.

    Returns:
        `format`, `id`, `program`, `config` (the recipe's name), `set` (what differs from the
        recipe), `flags`, `run` (derived facts, `config` with all fields among them) and `data`.
    """
    stored = _read_mapping(os.path.join(path, CONFIG), parse_yaml)
    old = {} if stored else _read_mapping(os.path.join(path, OLD_CONFIG), parse_json)
    if not misfit(old, _OLD_CONFIG):
        fields = old["config"]
        stored = dict(old, format=FORMAT, config=fields.get("name"),
                      run=dict(old.get("run", {}), config=fields),
                      set={name: fields[name] for name in old.pop("changed", []) if name in fields})
    return {} if misfit(stored, _CONFIG) else stored


def open_run_folder(path: str, run_id: Optional[str] = None) -> Optional[RunFolder]:
    """The run folder at `path`; None where there is none, or one of another run than `run_id`."""
    values = read_run_config(path)
    found = values.get("id")
    if values.get("format") != FORMAT or not isinstance(found, str) or run_id not in (None, found):
        return None
    return RunFolder(path, found)


def folder_of_weights(weights_path: str, origin: Optional[Origin]) -> Optional[RunFolder]:
    """The folder of the run that made some weights; None where it is not known or gone.

    Weights that lie in a run folder belong to it, and others to the one that their state names.
    """
    inside, last = os.path.split(os.path.dirname(os.path.abspath(weights_path)))
    found = open_run_folder(os.path.relpath(inside)) if last == WEIGHTS else None
    if found is not None or origin is None or origin.path is None or origin.run_id is None:
        return found
    return open_run_folder(origin.path, origin.run_id)


def folder_of_run(project: str, name: str, run_id: str, before: Optional[str] = None,
                  restarted: bool = False) -> RunFolder:
    """The folder in `project` that a training writes to, found again or made; a name that is taken
    gets a number: `name-2`.

    The folder that it had `before`, at the checkpoint that it goes on from, is used or made again;
    one that torch's launcher has `restarted` without a checkpoint takes that of its last attempt.

    Raises:
        UserError: the folder cannot be made, or `name` is no name of a folder.
    """
    if not _NAME.match(name) or name in (".", "..") or name != name.strip():
        raise UserError(f"--name is '{name}', expected the name of a folder without / and spaces "
                        "around it; the place it is made in is --project")
    if os.path.exists(project) and not os.path.isdir(project):
        raise UserError(f"--project is '{project}', which is a file; give a folder")
    if before is not None:
        name, restarted = os.path.basename(before), True
        found = open_run_folder(before, run_id)
        if found is not None:
            return found
    path, number = os.path.join(project, name), 1
    while True:
        found = open_run_folder(path, run_id) if restarted else None
        if found is not None:
            return found
        try:
            os.makedirs(project, exist_ok=True)
            os.mkdir(path)
            return RunFolder(path, run_id)
        except FileExistsError:
            remove_abandoned(path)  # of a run that was killed before it had saved anything
            number += 1
            path = os.path.join(project, f"{name}-{number}")
        except OSError as error:
            raise UserError(f"cannot make the run folder '{path}': {error.strerror or error}; "
                            "choose another place with --project, or leave it out with "
                            "--no_run_folder") from error


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def train_cells(record: Mapping[str, Any]) -> Dict[str, Any]:
    """Cells of a log line in results.csv, from the values of a `train` record."""
    return dict({f"loss_{name}": value for name, value in record["losses"].items()},
                iteration=record["iteration"], epoch=record["epoch"], lr=record["lr"],
                loss_total=record["total"], skipped_steps=record["skipped"],
                images_per_second=record["avg_fps"] or record["fps"])


def score_cells(summary: Mapping[str, Any]) -> Dict[str, Any]:
    """Cells of an evaluation in results.csv, in percent, from `CocoResults.summary()`."""
    cells: Dict[str, Any] = {"images_scored": summary["images"]}
    for kind in ("box", "mask"):
        for column, key in (("mAP", "AP"), ("AP50", "AP50"), ("AP75", "AP75")):
            value = summary[kind][key]
            cells[f"{kind}_{column}"] = None if value is None else 100 * value
    return cells


def best_row(rows: Sequence[Row]) -> Optional[Row]:
    """The row with the best mask mAP, the first of equal ones; None where nothing was scored."""
    scored = [row for row in rows if row.get("mask_mAP")]
    return max(scored, key=lambda row: float(row["mask_mAP"])) if scored else None


def _to_text(values: Mapping[str, Any]) -> Row:
    return {name: "" if value is None or value != value else
            f"{value:.6g}" if isinstance(value, float) else str(value)
            for name, value in values.items()}


def _to_row(cells: Mapping[Any, Any]) -> Row:
    """The cells of a row as programs here write them: named by a word, numbers but for the time."""
    return {name: cell if name == "time" or _is_number(cell) else ""
            for name, cell in cells.items()
            if isinstance(cell, str) and len(name) <= _LONGEST_NAME and name.isidentifier()}


def _is_number(text: str) -> bool:
    try:
        return is_number(float(text))
    except ValueError:
        return False


def _open(path: str) -> TextIO:
    """A text file for reading; an empty one where there is none."""
    try:
        refuse_endless(path)
        return open(path, encoding="utf-8", errors="replace", newline="")  # noqa: SIM115
    except FileNotFoundError:
        return io.StringIO()
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem}") from None


def _read_mapping(path: str, parse: Callable[[str, str], Any]) -> Dict[str, Any]:
    """What a JSON or YAML file holds; empty where it cannot be read or holds something else."""
    try:
        values = parse(read_whole(path).decode("utf-8"), path)
    except (OSError, ValueError, UserError):
        return {}
    return values if isinstance(values, dict) else {}


def _link(source: str, target: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
