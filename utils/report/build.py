"""The report of a run: plots and page, made from the files of the run folder alone."""

from __future__ import annotations

import csv
import io
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence

from utils.files import write_whole
from utils.report import confusion, figure, sections
from utils.report.class_bars import ClassAp, draw_class_bars
from utils.report.curves import draw_curves
from utils.report.evaluation import MATRIX, PER_CLASS, recorded_evaluation
from utils.report.html import page
from utils.run_folder import CONFIG, ENVIRONMENT, REPORT, RunFolder

PLOTS = "plots"


def build_report(folder: RunFolder) -> Optional[str]:
    """Draw the plots and write the page.

    Returns:
        A sentence where something is missing from it, else None.
    """
    contents = read_contents(folder)
    missing = None
    if figure.is_available():
        contents.plots.update(draw_plots(contents))
        for name, png in contents.plots.items():
            _write(folder.file(PLOTS, name + ".png"), png)
    else:
        missing = figure.MISSING.format(folder.path)
        contents.notes.append(missing)
    _write(folder.file(REPORT), page(contents.title, sections.body(contents)).encode("utf-8"))
    return missing


def read_contents(folder: RunFolder) -> sections.Contents:
    """All numbers of a run folder; what is not there is empty."""
    evaluation = recorded_evaluation(folder)
    matrix = _read(folder.file(MATRIX))
    return sections.Contents(
        title=os.path.basename(os.path.abspath(folder.path)), path=folder.path,
        config=folder.read(CONFIG), sessions=folder.read(ENVIRONMENT).get("sessions", []),
        results=folder.results.rows(), training=folder.training.rows(), evaluation=evaluation,
        classes=read_classes(_read(folder.file(PER_CLASS))),
        matrix=confusion.from_csv(matrix) if matrix else None,
        pictures=[(shown, picture) for shown, picture in (
            (shown, _read(folder.file(*shown["file"].split("/"))))
            for shown in evaluation.get("pictures", {}).get("shown", [])) if picture],
        weights=[name for name in ("best", "last") if os.path.exists(folder.weights(name))])


def draw_plots(contents: sections.Contents) -> Dict[str, bytes]:
    """PNG files by name, those for which there are numbers."""
    plots: Dict[str, Optional[bytes]] = dict(draw_curves(contents.training, contents.results))
    plots["class_ap"] = draw_class_bars(contents.classes)
    if contents.matrix is not None:
        plots["confusion_matrix"] = confusion.draw_confusion(*contents.matrix)
    return {name: png for name, png in plots.items() if png is not None}


def read_classes(data: Optional[bytes]) -> List[ClassAp]:
    """Rows of per_class.csv."""
    rows: Sequence[Mapping[str, Any]] = list(csv.DictReader(io.StringIO(
        (data or b"").decode("utf-8"))))
    return [ClassAp(row["name"], int(row["objects"]), _number(row["mask_AP"]),
                    _number(row["box_AP"])) for row in rows]


def _number(text: str) -> Optional[float]:
    return float(text) if text else None


def _read(path: str) -> Optional[bytes]:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return None


def _write(path: str, data: bytes) -> None:
    write_whole(path, lambda stream: stream.write(data))
