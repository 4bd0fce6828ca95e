"""The plots of a run's report, as PNG files: curves, bars by class, confusion matrix.

Matplotlib is optional and used through its object interface alone: no display is needed and no
state of the process changes.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
from typing import Any, Mapping, Sequence

import numpy as np

from utils.run_folder import ITERATION, TOTAL, Row

BLUE, GREEN, INK, MUTED, GRID = "#0072b2", "#009e73", "#1f2328", "#656d76", "#d8dee4"
_COLORS = (BLUE, "#e69f00", GREEN, "#8a4f9e", "#d55e00", "#56b4e9", "#8c6d31", "#636363")
"""Mostly Okabe and Ito's, told apart by the colour-blind."""
_SCORES = {"mask_mAP": (GREEN, "-"), "mask_AP50": (GREEN, ":"), "box_mAP": (BLUE, "-"),
           "box_AP50": (BLUE, ":")}
_SIZE = (7.0, 3.9)
_MAX_BARS = 120
_MAX_NUMBERS = 25
_MAX_NAME = 26
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC",
          "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC",
          "Droid Sans Fallback", "Unifont")
"""Tried in this order for names of classes."""


def is_available() -> bool:
    """Whether plots can be drawn at all."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_plots(steps: Sequence[Row], results: Sequence[Row], classes: Sequence[Mapping[str, str]],
               matrix: tuple[np.ndarray, list[str]] | None) -> dict[str, bytes]:
    """PNG files by name, without those for which there are no numbers: of the rows of log.jsonl,
    results.csv and per_class.csv, and of the confusion matrix with the classes' names.
    """
    losses = {name[len("loss_"):]: (points(steps, name), color, "-") for name, color in zip(
        (name for name in (steps[-1] if steps else {}) if name.startswith("loss_")),
        itertools.cycle(_COLORS))}
    losses["total"] = points(steps, TOTAL), INK, "-"
    return _drawn(
        losses=_draw_lines("Losses", "mean of 100 steps", losses, may_be_log=True),
        learning_rate=_draw_lines("Learning rate", "", {"lr": (points(steps, "lr"), BLUE, "-")}),
        average_precision=_draw_lines(
            "Average precision on validation images", "percent",
            {name: (points(results, name), color, dashes)
             for name, (color, dashes) in _SCORES.items()}, best_of="mask_mAP"),
        class_ap=draw_class_bars(classes),
        confusion_matrix=None if matrix is None else draw_confusion(*matrix))


def draw_comparison(runs: Mapping[str, tuple[Sequence[Row], Sequence[Row]]]) -> dict[str, bytes]:
    """PNG files by name: total loss and mask mAP of several runs, from the rows of log.jsonl and of
    results.csv.
    """
    names, _ = drawable(list(runs))
    shown = [name if names.count(name) == 1 else f"{number} {name}"
             for number, name in enumerate(names, 1)]
    curves = list(zip(shown, runs.values(), itertools.cycle(_COLORS)))
    return _drawn(
        losses=_draw_lines("Loss", "mean of 100 steps", {
            name: (points(steps, TOTAL), color, "-") for name, (steps, _), color in curves},
            may_be_log=True),
        average_precision=_draw_lines("Mask mAP on validation images", "percent", {
            name: (points(results, "mask_mAP"), color, "-")
            for name, (_, results), color in curves}))


def _drawn(**plots: bytes | None) -> dict[str, bytes]:
    return {name: png for name, png in plots.items() if png is not None}


def points(rows: Sequence[Row], column: str) -> np.ndarray:
    """Iteration and value where there is one, `[n, 2]`."""
    return np.array([(row[ITERATION], row[column]) for row in rows
                     if row.get(column) is not None], np.float64).reshape(-1, 2)


def _draw_lines(title: str, unit: str, lines: Mapping[str, tuple[np.ndarray, str, str]],
                may_be_log: bool = False, best_of: str = "") -> bytes | None:
    """A curve for each line (points, colour, dashes) that has points; the highest point of the line
    `best_of` is named.

    None where no line has two: a single point is no curve, and tables have its value.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    lines = {name: line for name, line in lines.items() if len(line[0])}
    if max((len(line) for line, _, _ in lines.values()), default=0) < 2:
        return None
    figure, axes = _new_figure(*_SIZE)
    for name, (line, color, dashes) in lines.items():
        axes.plot(line[:, 0], line[:, 1], dashes, color=color, label=name.replace("_", " "),
                  linewidth=1.8 if name == "total" else 1.4,
                  marker="o" if len(line) <= 40 else "", markersize=3.5)
    values = np.concatenate([line for line, _, _ in lines.values()])[:, 1]
    if may_be_log and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(min(0.0, values.min()), 1.15 * max(values.max(), 1e-6))
    if best_of in lines:
        best = max(lines[best_of][0], key=lambda point: point[1])
        axes.plot(*best, marker="o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
        above = best[1] <= 0.12 * values.max()
        axes.annotate(f"best {best[1]:.2f}", best, xytext=(0, 9 if above else -16), fontsize=8.5,
                      color=INK, textcoords="offset points", ha="center")
    _style(axes, title, "iteration", unit)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(lines) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=6, fontsize=8.5,
                    frameon=False, labelcolor=INK)
    return _to_png(figure)


def draw_class_bars(classes: Sequence[Mapping[str, str]]) -> bytes | None:
    """Average precision by class, the best masks first; None without classes.

    `mask_AP` and `box_AP` are in percent, '' where no image has an object. Bars are masks, strokes
    are boxes; of very many classes the best and the worst are shown.
    """
    if not classes:
        return None
    texts, font = drawable([item["name"] for item in classes])
    bars = sorted(((item["mask_AP"], item["box_AP"], text) for item, text in zip(classes, texts)),
                  key=lambda bar: -float(bar[0] or -1))
    title = "Average precision by class"
    if len(bars) > _MAX_BARS:
        title += f": the best and the worst {_MAX_BARS // 2} of {len(bars)}"
        bars = bars[:_MAX_BARS // 2] + bars[-(_MAX_BARS // 2):]
    figure, axes = _new_figure(_SIZE[0], 1.1 + 0.19 * len(bars))
    place = np.arange(len(bars))
    masks = np.array([float(bar[0] or 0) for bar in bars])
    boxes = np.array([float(bar[1] or "nan") for bar in bars])
    axes.barh(place, masks, height=0.68, color=GREEN, label="mask AP")
    axes.vlines(boxes, place - 0.34, place + 0.34, color=BLUE, linewidth=2, label="box AP")
    ends = np.fmax(masks, boxes)
    top = max(1.0, float(ends.max()))
    for row, (mask, _, _) in enumerate(bars):
        axes.text(ends[row] + 0.015 * top, row, f"{float(mask):.1f}" if mask else "no objects",
                  fontsize=7.5, color=MUTED, va="center")
    _style(axes, title, "percent", "", grid="x")
    axes.set_yticks(place)
    axes.set_yticklabels([text for _, _, text in bars], fontfamily=font)
    axes.tick_params(axis="y", labelsize=8, labelcolor=INK, length=0)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * top)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncol=2, fontsize=8.5, frameon=False)
    return _to_png(figure)


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """The confusion matrix of n classes; colours are shares of a row, numbers are counts.

    `counts` is `[n + 1, n + 1]`: rows are objects and columns detections, background last.
    """
    texts, font = drawable(list(names) + ["background"])
    size = len(texts)
    side = float(np.clip(2.2 + 0.42 * size, 4.2, 6.4 if size <= 40 else 11.0))
    figure, axes = _new_figure(1.12 * side, side)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    _style(axes, "Confusion matrix", "detection", "object", grid="")
    ticks = range(size) if size <= _MAX_BARS else []
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xticklabels([texts[n] for n in ticks], rotation=90, fontfamily=font)
    axes.set_yticklabels([texts[n] for n in ticks], fontfamily=font)
    axes.tick_params(labelsize=8.5 if size <= 30 else max(4.0, 480.0 / size), colors=INK, length=0)
    if size <= _MAX_NUMBERS:
        for row, column in zip(*np.nonzero(counts)):
            axes.text(column, row, str(counts[row, column]), ha="center", va="center",
                      fontsize=float(np.clip(11 - 0.3 * size, 4.5, 9)),
                      color="white" if shares[row, column] > 0.55 else INK)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.03)
    bar.set_label("share of the row", fontsize=8.5, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=2)
    bar.outline.set_visible(False)
    return _to_png(figure)


def drawable(names: Sequence[str]) -> tuple[list[str], str]:
    """Names as a plot can show them, and the font for them.

    The font is the first installed one that has the most of the letters; a name with letters that
    it lacks is shown by its number.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    plain = [" ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
             for name in names]
    needed = set(map(ord, "".join(plain)))
    installed = {entry.name for entry in fontManager.ttflist}
    files = {font: findfont(FontProperties(family=[font])) for font in _FONTS if font in installed}
    letters = {font: needed.intersection(get_font(path).get_charmap())
               for font, path in files.items()}
    font = max(letters, key=lambda name: len(letters[name]))
    texts = []
    for number, name in enumerate(plain, 1):
        if not name or not letters[font].issuperset(map(ord, name)):
            name = f"class {number}"
        shown = name if len(name) <= _MAX_NAME else name[:_MAX_NAME - 2] + ".."
        texts.append(shown.replace("$", r"\$"))  # else a pair of them is a formula
    return texts, font


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure of inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _style(axes: Any, title: str, x_label: str, y_label: str, grid: str = "both") -> None:
    """The look of all plots: a light grid, no frame but the left and lower line."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=10)
    axes.set_xlabel(x_label, fontsize=9, color=MUTED)
    axes.set_ylabel(y_label, fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8.5, colors=MUTED, length=3)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color=GRID, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(bool(grid) and side in ("left", "bottom"))
        spine.set_color(GRID)


def _to_png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight", pad_inches=0.12)
    return stream.getvalue()
