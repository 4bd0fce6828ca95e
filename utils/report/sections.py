"""The sections of a run's report, from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from utils.report import confusion, html
from utils.report.class_bars import ClassAp
from utils.run_folder import CONFIG, best_row
from utils.run_tables import Row

_PERCENT = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_RESULT_HEADS = (("iteration", "iteration"), ("epoch", "epoch"), ("lr", "learning rate"),
                 ("loss_total", "loss"), ("images_per_second", "images/s"),
                 ("box_mAP", "box mAP"), ("box_AP50", "box AP50"), ("mask_mAP", "mask mAP"),
                 ("mask_AP50", "mask AP50"), ("mask_AP75", "mask AP75"))
_MOST_ROWS = 400


@dataclass
class Contents:
    """What is known of a run; see `utils.report.build.read_contents`."""

    title: str
    path: str
    config: Dict[str, Any]
    sessions: List[Dict[str, Any]]
    results: List[Row]
    training: List[Row]
    evaluation: Dict[str, Any]
    classes: List[ClassAp]
    matrix: Optional[Tuple[np.ndarray, List[str]]]
    pictures: List[Tuple[Dict[str, Any], bytes]]
    weights: List[str]
    plots: Dict[str, bytes] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)


def body(contents: Contents) -> str:
    """The whole page below its head."""
    parts = [("training", "Training", _training(contents)),
             ("scores", "Scores", _scores(contents)),
             ("classes", "Classes", _classes(contents)),
             ("confusion", "Confusion matrix", _confusion(contents)),
             ("pictures", "Validation pictures", _pictures(contents)),
             ("data", "Data", _data(contents)),
             ("configuration", "Configuration", _configuration(contents)),
             ("environment", "Environment", _environment(contents)),
             ("next", "What to type next", _commands(contents))]
    shown = [(name, title, content) for name, title, content in parts if content]
    links = "".join(f'<a href="#{name}">{html.escape(title)}</a>'
                    for name, title, _ in shown)
    return "\n".join([_header(contents), f"<nav>{links}</nav>", _figures(contents)] + [
        html.paragraph(note, "note") for note in contents.notes] + [
        html.section(name, title, content) for name, title, content in shown])


def _header(contents: Contents) -> str:
    config = contents.config.get("config", {})
    known = [config.get("name"), _progress(contents)]
    if contents.sessions:
        known += [contents.sessions[-1].get("device"), "started " + str(
            contents.sessions[0].get("time"))]
    return "<header><h1>{}</h1>{}</header>".format(
        html.escape(contents.title),
        html.paragraph(" \u00b7 ".join(str(part) for part in known if part), "muted"))


def _progress(contents: Contents) -> str:
    rows = contents.training or contents.results
    if not rows:
        return "" if contents.evaluation else "no steps yet"
    done, last = int(rows[-1]["iteration"]), contents.config.get("run", {}).get("max_iter")
    if last is None:
        return f"iteration {done}"
    state = "trained to the end: " if done >= last else ""
    return f"{state}iteration {done} of {last}"


def _figures(contents: Contents) -> str:
    """The numbers that everybody asks for first."""
    best, evaluation = best_row(contents.results), contents.evaluation
    figures = []
    if best is not None:
        figures += [html.key_figure(_cell(best, "mask_mAP", 2), "best mask mAP, percent", "best"),
                    html.key_figure(_cell(best, "box_mAP", 2) or "n/a", "box mAP there"),
                    html.key_figure(best["iteration"], "iteration of the best")]
    elif evaluation:
        figures += [html.key_figure(_percent(evaluation["mask"]["AP"]), "mask mAP, percent",
                                    "best"),
                    html.key_figure(_percent(evaluation["box"]["AP"]), "box mAP, percent")]
    for column, name, digits in (("loss_total", "loss, mean of 100 steps", 3),
                                 ("images_per_second", "images/s in training", 2)):
        values = [row for row in contents.training or contents.results if row.get(column)]
        if values:
            figures.append(html.key_figure(_cell(values[-1], column, digits), name))
    run = contents.config.get("run", {})
    if run:
        figures.append(html.key_figure(str(len(run.get("class_names", []))), "classes"))
    return html.grid("figures", figures)


def _training(contents: Contents) -> str:
    plots = [html.card(html.image(contents.plots.get(name), text, "plot")) for name, text in (
        ("losses", "Curves of the losses over the iterations"),
        ("average_precision", "Curves of the average precisions over the iterations"),
        ("learning_rate", "Curve of the learning rate over the iterations"))]
    rows = contents.results[-_MOST_ROWS:]
    best = best_row(rows)
    cells = [[_round(row.get(column), column) for column, _ in _RESULT_HEADS] for row in rows]
    table = html.table([name for _, name in _RESULT_HEADS], cells, 0,
                       best=None if best is None else rows.index(dict(best)), tall=len(rows) > 14)
    return html.grid("plots", plots + [html.card(table, "Epochs and validations (results.csv)",
                                                 "wide")])


def _scores(contents: Contents) -> str:
    evaluation = contents.evaluation
    if not evaluation:
        return html.paragraph(
            "Nothing has been evaluated yet: train with --validation_epoch=1, or run eval.py on "
            "the weights of this folder.", "muted")
    what = "{} on {} of {} images of {}, {}".format(
        evaluation["weights"], evaluation["images"], evaluation["images_in_file"],
        evaluation["annotations"], evaluation["time"])
    if evaluation.get("iteration") is not None:
        what = "Iteration {}: ".format(evaluation["iteration"]) + what
    summary = html.table(
        [""] + list(_PERCENT),
        [[kind] + [_percent(evaluation[kind][name]) for name in _PERCENT]
         for kind in ("box", "mask")])
    thresholds = list(evaluation["mask"]["per_threshold"])
    by_iou = html.table(
        ["IoU"] + [f"0.{name}" for name in thresholds],
        [[kind] + [_percent(evaluation[kind]["per_threshold"][name]) for name in thresholds]
         for kind in ("box", "mask")])
    notes = [html.paragraph(note, "note") for note in evaluation.get("notes", [])]
    return "\n".join([html.paragraph(what, "muted")] + notes + [
        html.card(summary, "COCO's average precision and recall, percent"), "<br>",
        html.card(by_iou, "Average precision at each IoU threshold, percent")])


def _classes(contents: Contents) -> str:
    if not contents.classes:
        return ""
    rows = [[number, item.name, item.objects, _decimals(item.mask), _decimals(item.box)]
            for number, item in enumerate(contents.classes, 1)]
    table = html.table(["", "class", "objects", "mask AP", "box AP"], rows, numbers_from=2,
                       tall=len(rows) > 14)
    plot = html.image(contents.plots.get("class_ap"), "Bars of the average precision of each class",
                      "plot")
    kind = "wide" if len(rows) > 30 else ""
    return html.grid("plots", [html.card(plot, "", kind),
                               html.card(table, "In the order of the annotation file", kind)])


def _confusion(contents: Contents) -> str:
    if contents.matrix is None:
        return ""
    counts, names = contents.matrix
    rule = contents.evaluation.get("confusion_matrix", {})
    text = ("Detections with a score of at least {} are matched to objects of any class where "
            "their masks have an IoU of at least {}, the highest score first, each once. Rows are "
            "objects, columns detections; the last column holds objects that were missed, the last "
            "row false and double detections. Counts: evaluation/confusion_matrix.csv".format(
                rule.get("score_threshold", confusion.SCORE_THRESHOLD),
                rule.get("iou_threshold", confusion.IOU_THRESHOLD)))
    plot = html.image(contents.plots.get("confusion_matrix"), "Confusion matrix of the classes",
                      "plot")
    worst = html.table(
        ["object", "taken for", "times"],
        [[names[row], names[column], count]
         for row, column, count in confusion.worst_confusions(counts)], numbers_from=2)
    objects, found = int(counts[:-1].sum()), int(counts[:-1, :-1].trace())
    sums = html.pairs([
        ("objects", objects), ("found, of the right class", found),
        ("found, of another class", int(counts[:-1, :-1].sum()) - found),
        ("missed", int(counts[:-1, -1].sum())),
        ("false or double", int(counts[-1, :-1].sum()))])
    return html.paragraph(text, "muted") + html.grid("plots", [
        html.card(plot, "", "wide" if len(names) > 40 else ""),
        html.card(sums + "<br>" + worst, "In numbers")])


def _pictures(contents: Contents) -> str:
    if not contents.pictures:
        return ""
    threshold = contents.evaluation.get("pictures", {}).get("score_threshold")
    text = f"Ground truth beside prediction; detections with a score of at least {threshold}."
    return html.paragraph(text, "muted") + html.grid("pictures", [
        html.card(html.image(
            data, "Ground truth and prediction of image {}".format(shown["image_id"]), "",
            "{} (image {}): {} object{}, {} detection{}".format(
                shown["image"], shown["image_id"], shown["objects"], _plural(shown["objects"]),
                shown["detections"], _plural(shown["detections"]))))
        for shown, data in contents.pictures])


def _data(contents: Contents) -> str:
    data = contents.config.get("data", {})
    splits = [(name, data[name]) for name in ("train", "val") if data.get(name)]
    if not splits:
        return ""
    cards = []
    for name, split in splits:
        values = [(key.replace("_", " "), value) for key, value in split.items()
                  if key not in ("objects_per_class", "sentences") and value is not None]
        notes = "".join(html.paragraph(sentence) for sentence in split.get("sentences", []))
        cards.append(html.card(html.pairs(values) + notes,
                               {"train": "Training", "val": "Validation"}[name]))
    columns = [split.get("objects_per_class", {}) for _, split in splits]
    rows = [[key] + [column.get(key, 0) for column in columns] for key in columns[0]]
    table = html.table(["class"] + ["objects in " + name for name, _ in splits], rows,
                       tall=len(rows) > 14)
    return html.grid("plots", cards + [html.card(table, "Objects of each class")])


def _configuration(contents: Contents) -> str:
    values = contents.config
    changed = [str(name) for name in values.get("changed", [])]
    run = html.card(html.pairs((key.replace("_", " "), value) for key, value in
                               values.get("run", {}).items() if key not in (
                                   "class_names", "category_ids")), "This training")
    config = html.card(html.pairs(values.get("config", {}).items(), changed),
                       "Recipe; what differs from the released one stands out")
    flags = html.card(html.details("All flags", html.pairs(values.get("flags", {}).items())))
    return html.grid("plots", [run + flags, config])


def _environment(contents: Contents) -> str:
    cards = []
    for number, session in enumerate(contents.sessions, 1):
        values = [(key.replace("_", " "), value) for key, value in session.items()
                  if value is not None and key != "command"]
        cards.append(html.card(html.pairs(values) + html.code(session.get("command", "")),
                               f"Session {number} of {len(contents.sessions)}"))
    return html.grid("plots", cards[-1:]) + html.details(
        "Earlier sessions", html.grid("plots", cards[:-1]))


def _commands(contents: Contents) -> str:
    if not contents.weights:
        return ""
    weights = f"{contents.path}/weights/{contents.weights[0]}.pth"
    flags: Mapping[str, Any] = contents.config.get("flags", {})
    data = flags.get("data")
    lines = ["# find things in an image",
             f"python eval.py --trained_model={weights} --score_threshold=0.3 "
             "--image=in.jpg:out.png"]
    if data:
        lines += ["# score again", f"python eval.py --trained_model={weights} --val_data={data}"]
    if flags:
        lines += ["# train the same again", f"python train.py --rerun={contents.path}/{CONFIG}"]
    return html.code("\n".join(lines))


def _percent(value: Optional[float]) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"


def _decimals(value: Optional[float]) -> Optional[str]:
    return None if value is None else f"{value:.2f}"


def _cell(row: Mapping[str, str], column: str, digits: int) -> str:
    text = row.get(column) or ""
    return "{:.{}f}".format(float(text), digits) if text else ""


def _round(text: Optional[str], column: str) -> Optional[str]:
    if not text or column in ("iteration", "epoch"):
        return text or None
    return ("{:.3g}" if column == "lr" else "{:.2f}").format(float(text))


def _plural(count: int) -> str:
    return "" if count == 1 else "s"
