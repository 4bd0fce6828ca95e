"""The report of a run, on one page: `python -m utils.report runs/yolact_base`. Of several runs,
also a page that sets them side by side.

Plots and page are made from the files of the run folder alone. Plots need matplotlib and the page
Jinja2, which comes with current PyTorch; what is not installed is left out, and a line says so.
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import os
import shlex
import sys
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from utils import plots
from utils.cli import ArgumentParser, print_lines, run_main
from utils.errors import UserError
from utils.files import read_whole, write_whole
from utils.run_folder import CONFIG, REPORT, RunFolder, best_row, damage_refused, open_run_folder

SUMMARY = os.path.join("evaluation", "evaluation.json")
PER_CLASS = os.path.join("evaluation", "per_class.csv")
MATRIX = os.path.join("evaluation", "confusion_matrix.csv")
TEMPLATE = "report.html.j2"
COMPARISON = "comparison.html"
_MAX_ROWS = 400
_MAX_PAIRS = 10
_OF_ONE_RUN = ("time", "command", "folder", "start_iteration", "class_names", "category_ids",
               "name", "project", "save_folder", "log_folder", "tensorboard", "sentences", "quiet",
               "objects_per_class")
"""Facts that differ from run to run, or that others say in fewer words."""


def build_report(folder: RunFolder) -> list[str]:
    """Draw the plots and write the page; returns lines for the user: what is missing, and where the
    page is.
    """
    run = read_run(folder)
    lines = []
    if plots.is_available():
        run["plots"] = plots.draw_plots(run["steps"], run["results"], run["classes"], run["matrix"])
        for name, png in run["plots"].items():
            folder.write_bytes(os.path.join("plots", name + ".png"), png)
    else:
        lines.append(_missing("matplotlib", "plots", folder))
    if importlib.util.find_spec("jinja2") is None:
        return lines + [_missing("jinja2", REPORT, folder)]
    folder.write_bytes(REPORT, _fill(dict(
        run, notes=lines, rows=run["results"][-_MAX_ROWS:], best=best_row(run["results"]),
        confusions=None if run["matrix"] is None else sum_up_matrix(*run["matrix"]),
        comparison=None)))
    return lines + [f"Report : {folder.file(REPORT)}"]


def _missing(package: str, what: str, folder: RunFolder) -> str:
    return (f"{package} is not installed: the run folder has no {what}; 'pip install {package}' "
            f"and 'python -m utils.report {shlex.quote(folder.path)}' make up for it")


def read_run(folder: RunFolder) -> dict[str, Any]:
    """All that the files of a run folder say; what is not there is empty."""
    evaluation = folder.read(SUMMARY)
    shown = evaluation.get("pictures", {}).get("shown", [])
    images = [(item, _read(folder, *item["file"].split("/"))) for item in shown]
    classes, matrix = (io.StringIO(_read(folder, name).decode("utf-8"))
                       for name in (PER_CLASS, MATRIX))
    return {
        "title": os.path.basename(os.path.abspath(folder.path)), "path": folder.path,
        "config": folder.read(CONFIG), "sessions": folder.sessions(),
        "steps": folder.training(), "results": folder.results(), "evaluation": evaluation,
        "plots": {}, "classes": list(csv.DictReader(classes)), "matrix": read_matrix(matrix),
        "images": [(item, jpeg) for item, jpeg in images if jpeg],
        "weights": [name for name in ("best", "last") if os.path.exists(folder.weights(name))]}


def read_matrix(lines: Iterable[str]) -> tuple[np.ndarray, list[str]] | None:
    """Counts and class names of a confusion_matrix.csv; None where there is none."""
    rows = list(csv.reader(lines))
    if not rows:
        return None
    return np.array([row[1:] for row in rows[1:]], np.int64), rows[0][1:-1]


def sum_up_matrix(counts: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Sums over a confusion matrix, and the most frequent pairs of different classes."""
    objects, found = int(counts[:-1].sum()), int(counts[:-1, :-1].sum())
    right = int(counts[:-1, :-1].trace())
    wrong = counts[:-1, :-1] - np.diag(counts.diagonal()[:-1])
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]
    return {
        "sums": {"objects": objects, "found, of the right class": right,
                 "found, of another class": found - right, "missed": objects - found,
                 "false or double": int(counts[-1, :-1].sum())},
        "worst": [(names[row], names[column], int(wrong[row, column]))
                  for row, column in zip(*np.unravel_index(order, wrong.shape))
                  if wrong[row, column]]}


def compare(folders: Sequence[RunFolder], path: str) -> list[str]:
    """Write a page with the curves of several runs, their scores and what differs between them;
    returns lines for the user, as `build_report`.
    """
    if importlib.util.find_spec("jinja2") is None:
        return ["jinja2 is not installed: the runs are not compared (pip install jinja2)"]
    above = os.path.commonpath([os.path.abspath(folder.path) for folder in folders])
    runs = {os.path.relpath(folder.path, above): read_run(folder) for folder in folders}
    facts = [_compared_facts(run) for run in runs.values()]
    rows = [(name, *(_plain(fact.get(name, "")) for fact in facts))
            for name in dict.fromkeys(name for fact in facts for name in fact)]
    curves = {name: (run["steps"], run["results"]) for name, run in runs.items()}
    write_whole(path, _fill({
        "title": " / ".join(runs), "path": above,
        "plots": plots.draw_comparison(curves) if plots.is_available() else {},
        "notes": [] if plots.is_available() else ["matplotlib is not installed: no curves"],
        "comparison": {"facts": [row for row in rows if len(set(row[1:])) > 1],
                       "runs": [(name, best_row(run["results"]) or {}, (run["steps"] or [{}])[-1])
                                for name, run in runs.items()]}}))
    return [f"Comparison : {path}"]


def _compared_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was: recipe, data, flags, machine and versions, by names for a table."""
    config, session = run["config"], dict((run["sessions"] or [{}])[-1])
    facts = dict(config.get("run", {}))
    fields = facts.pop("config", None) or config.get("set", {})
    packages = session.pop("packages", {})
    parts = [("", {"recipe": config.get("config")}), ("", fields), ("", config.get("flags", {})),
             ("", facts), ("", session), ("", packages)]
    parts += [(f"{split}: ", values) for split, values in config.get("data", {}).items()]
    return {f"{prefix}{name}": value for prefix, values in parts for name, value in values.items()
            if name not in _OF_ONE_RUN}


def _fill(values: Mapping[str, Any]) -> bytes:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.do"])
    environment.filters.update(plain=_plain, percent=_percent, decimals=_decimals,
                               data_uri=_data_uri, quoted=shlex.quote)
    try:
        page = environment.get_template(TEMPLATE).render(values)
    except jinja2.UndefinedError as error:
        raise LookupError(error) from error
    return page.encode("utf-8", "backslashreplace")


def _plain(value: Any) -> str:
    """A value of a JSON file as a reader wants it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"


def _decimals(value: Any, digits: int | None = 2) -> str:
    """A number to so many decimals; None leaves it as it is."""
    return "" if value is None else _plain(value) if digits is None else f"{value:.{digits}f}"


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(image).decode("ascii")


def _read(folder: RunFolder, *parts: str) -> bytes:
    """Bytes of a file of the folder itself; none where it cannot be read or lies elsewhere."""
    inside = os.path.realpath(folder.path) + os.sep
    try:
        path = os.path.realpath(folder.file(*parts))
        return read_whole(path) if path.startswith(inside) else b""
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return b""


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m utils.report", description=(
        "Draw the plots and the report of run folders from the files in them; of several, also a "
        "page that compares them."))
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="for example runs/yolact_base")
    parser.add_argument("--out", default=None, metavar="FILE", help=(
        "page that compares several runs; default: comparison.html in the folder that they share"))
    args, folders = parser.parse_args(argv), []
    for path in args.folders:
        folder = open_run_folder(path.rstrip(os.sep))
        if folder is None:
            raise UserError(f"'{path}' is no run folder (it has no config.yaml that train.py or "
                            "eval.py wrote); give one such as runs/yolact_base")
        folders.append(folder)
    if args.out is not None and len(folders) < 2:
        raise UserError(f"--out is {args.out}, but only a comparison of several runs is written "
                        "there; the page of one is in its own folder: leave --out out")
    if args.out and not args.out.lower().endswith((".html", ".htm")):
        raise UserError(f"--out is '{args.out}', expected the name of an .html file")
    for folder in folders:
        with damage_refused(folder.path):
            print_lines(build_report(folder))
    if len(folders) > 1:
        shared = os.path.commonpath([os.path.abspath(folder.path) for folder in folders])
        out = args.out or os.path.join(os.path.relpath(shared), COMPARISON)
        with damage_refused(shared):
            print_lines(compare(folders, out))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
