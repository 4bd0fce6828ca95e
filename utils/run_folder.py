"""The folder of one run, `runs/<name>/`: what was asked for, what came of it, the weights.

    config.yaml         recipe, changes and flags, as `train.py --config` and `--rerun` read them
    environment.json    versions, device, command line, source; an entry for each session
    log.jsonl           a JSON object for each log line, epoch, validation and session
    results.csv         a row for each epoch and each validation, made from the log
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
from typing import TYPE_CHECKING, Any, Dict, Iterator, Mapping, Sequence

import yaml

from utils.errors import UserError
from utils.files import alone, clean_below, read_whole, refuse_endless, temporary_name, write_whole
from utils.parsing import parse_json, parse_yaml

if TYPE_CHECKING:
    from utils.weights.files import Origin

FORMAT = 2
CONFIG = "config.yaml"
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

_NAME = re.compile(r"^[^/\\\x00-\x1f]+$")

Row = Dict[str, Any]
"""Values by column of results.csv; None, or no entry, where there is none."""


@contextlib.contextmanager
def damage_refused(path: str) -> Iterator[None]:
    """Turn what files that are not as this project writes them lead to into a `UserError`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError,
            ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged "
                        "or was written by another program; remove what is not this run's"
                        ) from error


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

    def read(self, name: str) -> dict[str, Any]:
        """A JSON or YAML file of the folder; empty where there is none.

        Raises:
            UserError: it cannot be read or holds something else.
        """
        path = self.file(name)
        with damage_refused(path):
            try:
                text = read_whole(path).decode("utf-8")
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return dict((parse_yaml if name == CONFIG else parse_json)(text, path))

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file for people: indented, names as they are."""
        text = json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"
        self.write_bytes(name, text.encode("utf-8", "backslashreplace"))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write any file of the folder."""
        write_whole(self.file(name), data)

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

    def sessions(self) -> list[dict[str, Any]]:
        """What `add_session` has noted so far."""
        return list(self.read(ENVIRONMENT).get("sessions", []))

    def records(self) -> list[dict[str, Any]]:
        """The records of the log: `type` (session, train, epoch, val), `time`, what is known."""
        found = []
        with damage_refused(self.file(LOG)), contextlib.suppress(FileNotFoundError):
            refuse_endless(self.file(LOG))
            with open(self.file(LOG), encoding="utf-8", errors="replace") as stream:
                for line in stream:
                    with contextlib.suppress(ValueError):  # cut off by a crash
                        record = json.loads(line)
                        if isinstance(record, dict) and "type" in record:
                            found.append(record)
        return found

    def training(self) -> list[Row]:
        """A row for each log line."""
        with damage_refused(self.file(LOG)):
            return [_train_row(record) for record in self.records() if record["type"] == "train"]

    def results(self) -> list[Row]:
        """A row for each iteration at which an epoch ended or the network was scored, with the
        losses of the last log line before it.
        """
        rows: dict[int, Row] = {}
        latest: Row = {}
        with damage_refused(self.file(LOG)):
            for record in self.records():
                if record["type"] == "train":
                    latest = _train_row(record)
                elif record["type"] in ("epoch", "val"):
                    done = int(record[ITERATION])
                    # eval.py may score an iteration that the training has left behind.
                    known = latest if latest.get(ITERATION, 0) <= done else {}
                    row = rows.setdefault(done, dict(known, iteration=done))
                    row.update(time=timestamp(record["time"]),
                               epoch=record.get("epoch", row.get("epoch")))
                    row.update(_score_row(record) if record["type"] == "val" else {})
        return [rows[done] for done in sorted(rows)]

    def add_record(self, kind: str, **values: Any) -> None:
        """Add a line to the log and bring results.csv up to date."""
        with alone(Path(self.path)):
            append_record(self.file(LOG), kind, values)
            self._write_results()

    def update_results(self) -> None:
        """Bring results.csv up to date with the log."""
        with alone(Path(self.path)):
            self._write_results()

    def _write_results(self) -> None:
        rows = self.results()
        losses = dict.fromkeys(name for row in rows for name in row
                               if name.startswith("loss_") and name != TOTAL)
        text = io.StringIO()
        table = csv.DictWriter(text, [*_COLUMNS, *losses, *_MORE_COLUMNS], restval="",
                               lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                            for name, value in row.items()})
        self.write_bytes(RESULTS, text.getvalue().encode("utf-8"))

    def go_on_from(self, iteration: int) -> None:
        """Take back what the log and the results say of later iterations: they are made again."""
        clean_below(self.path)
        if os.path.exists(self.file(LOG)):
            with alone(Path(self.path)), damage_refused(self.file(LOG)):
                lines = [json.dumps(record) + "\n" for record in self.records()
                         if record.get(ITERATION, 0) <= iteration]
                self.write_bytes(LOG, "".join(lines).encode("utf-8"))
                self._write_results()

    def keep_weights(self, path: str, name: str) -> None:
        """Make `best` or `last` the weights at `path`, with their state; a hard link if it works.

        The weights never stand beside the state of others: the old state goes first.
        """
        from utils.checkpoint import state_path  # imports PyTorch, for which a report need not wait

        target = self.weights(name)
        if os.path.exists(target) and os.path.samefile(path, target):
            return
        new = [(source, temporary_name(place), place) for source, place in (
            (path, target), (state_path(path), state_path(target))) if os.path.exists(source)]
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with alone(Path(self.path)):
                for source, name, _ in new:
                    try:
                        os.link(source, name)
                    except OSError:  # another disk, or a file system without links
                        shutil.copyfile(source, name)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(state_path(target))
                for _, name, place in new:
                    os.replace(name, place)
        except OSError as error:
            for _, name, _ in new:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            raise UserError(f"cannot write '{target}': {error.strerror or error}; free some space, "
                            "choose another folder with --project, or leave it out with "
                            "--no_run_folder") from error


def append_record(path: str, kind: str, values: Mapping[str, Any]) -> None:
    """Add a JSON object to a log; it is on its way to the disk when this returns. What JSON does
    not have, NaN and infinity, is null.
    """
    text = json.dumps(dict({"type": kind, "time": time.time()}, **values))
    plain = json.loads(text, parse_constant=lambda name: None)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(plain) + "\n")


def open_run_folder(path: str, run_id: str | None = None) -> RunFolder | None:
    """The run folder at `path`; None where there is none, or one of another run than `run_id`."""
    try:
        values = RunFolder(path, "").read(CONFIG)
    except UserError:
        return None
    found = values.get("id")
    if values.get("format") != FORMAT or not isinstance(found, str) or run_id not in (None, found):
        return None
    return RunFolder(path, found)


def folder_of_weights(weights_path: str, origin: Origin | None) -> RunFolder | None:
    """The folder of the run that made some weights; None where it is not known or gone.

    Weights that lie in a run folder belong to it, and others to the one that their state names.
    """
    inside, last = os.path.split(os.path.dirname(os.path.abspath(weights_path)))
    found = open_run_folder(os.path.relpath(inside)) if last == WEIGHTS else None
    if found is not None or origin is None or origin.path is None or origin.run_id is None:
        return found
    return open_run_folder(origin.path, origin.run_id)


def folder_of_run(project: str, name: str, run_id: str, before: str | None = None,
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
    found = None
    if before is not None:
        name, restarted = os.path.basename(before), True
        found = open_run_folder(before, run_id)
    path, number = os.path.join(project, name), 1
    while found is None:
        found = open_run_folder(path, run_id) if restarted else None
        try:
            if found is None:
                os.makedirs(project, exist_ok=True)
                os.mkdir(path)
                found = RunFolder(path, run_id)
        except FileExistsError:
            clean_below(path)  # of a run that was killed, and that nobody goes on with
            number += 1
            path = os.path.join(project, f"{name}-{number}")
        except OSError as error:
            raise UserError(f"cannot make the run folder '{path}': {error.strerror or error}; "
                            "choose another place with --project, or leave it out with "
                            "--no_run_folder") from error
    return found


def timestamp(seconds: float | None = None) -> str:
    """A time since the epoch, or now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _train_row(record: Mapping[str, Any]) -> Row:
    return dict({f"loss_{name}": value for name, value in record["losses"].items()},
                iteration=int(record[ITERATION]), epoch=record["epoch"], lr=record["lr"],
                loss_total=record["total"], skipped_steps=record["skipped"],
                images_per_second=record["avg_fps"] or record["fps"])


def _score_row(record: Mapping[str, Any]) -> Row:
    """Scores in percent, from `CocoResults.summary()`."""
    row: Row = {"images_scored": record["images"]}
    for kind in ("box", "mask"):
        for column, key in (("mAP", "AP"), ("AP50", "AP50"), ("AP75", "AP75")):
            value = record[kind][key]
            row[f"{kind}_{column}"] = None if value is None else 100.0 * value
    return row


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row with the best mask mAP, the first of equal ones; None where nothing was scored."""
    scored = [row for row in rows if row.get("mask_mAP") is not None]
    return max(scored, key=lambda row: row["mask_mAP"]) if scored else None
