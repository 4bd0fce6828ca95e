"""Curves over the iterations: losses, learning rate, average precision."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

from utils.report.figure import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    new_figure,
    style_axes,
    to_png,
)
from utils.run_tables import Row, numbers

LOSS_NAMES = {"loss_total": ("total", INK), "loss_B": ("B  boxes", BLUE),
              "loss_C": ("C  classes", ORANGE), "loss_M": ("M  masks", GREEN),
              "loss_S": ("S  semantic", PURPLE), "loss_I": ("I  mask IoU", RED)}
SCORE_NAMES = {"mask_mAP": ("mask mAP", GREEN, "-"), "mask_AP50": ("mask AP50", GREEN, ":"),
               "box_mAP": ("box mAP", BLUE, "-"), "box_AP50": ("box AP50", SKY, ":")}
_WIDTH, _HEIGHT = 7.0, 3.9
_MOST_POINTS = 1500
_FEW_POINTS = 40

Point = Tuple[float, float]


def draw_curves(training: Sequence[Row], results: Sequence[Row]) -> Dict[str, bytes]:
    """PNG files by name, without those for which there are no numbers.

    Args:
        training: rows of `training.csv`.
        results: rows of `results.csv`; stand in for the former where there are none.
    """
    steps = training or results
    drawn = {"losses": _losses(steps), "learning_rate": _learning_rate(steps),
             "average_precision": _average_precision(results)}
    return {name: png for name, png in drawn.items() if png is not None}


def _losses(rows: Sequence[Row]) -> Optional[bytes]:
    lines = {column: points_of(rows, column) for column in LOSS_NAMES}
    if not any(lines.values()):
        return None
    figure, (axes,) = new_figure(_WIDTH, _HEIGHT)
    for column, points in lines.items():
        name, color = LOSS_NAMES[column]
        if points:
            _plot(axes, points, name, color, "-", 1.8 if column == "loss_total" else 1.2)
    low, high = axes.get_ylim()
    values = [value for points in lines.values() for _, value in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        _plain_numbers(axes)
    else:
        axes.set_ylim(min(0.0, low), high)
    style_axes(axes, "Losses", "iteration", "mean of 100 steps")
    _finish(axes)
    return to_png(figure)


def _learning_rate(rows: Sequence[Row]) -> Optional[bytes]:
    points = points_of(rows, "lr")
    if not points:
        return None
    figure, (axes,) = new_figure(_WIDTH, _HEIGHT)
    _plot(axes, points, "learning rate", BLUE, "-", 1.6)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    style_axes(axes, "Learning rate", "iteration")
    axes.yaxis.get_offset_text().set(fontsize=8, color=MUTED)
    _finish(axes, legend=False)
    return to_png(figure)


def _average_precision(rows: Sequence[Row]) -> Optional[bytes]:
    lines = {column: points_of(rows, column) for column in SCORE_NAMES}
    if not any(lines.values()):
        return None
    figure, (axes,) = new_figure(_WIDTH, _HEIGHT)
    for column, points in lines.items():
        name, color, dashes = SCORE_NAMES[column]
        if points:
            _plot(axes, points, name, color, dashes, 1.8)
    top = max((value for points in lines.values() for _, value in points), default=0)
    best = max(lines["mask_mAP"], key=lambda point: point[1], default=None)
    if best is not None:
        axes.plot(*best, marker="o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
        below = best[1] > 0.12 * top  # of the four curves it is the lowest
        axes.annotate(f"best {best[1]:.2f}", best, xytext=(0, -16 if below else 9),
                      fontsize=8.5, color=INK, textcoords="offset points", ha="center")
    axes.set_ylim(0, max(1.0, top * 1.15))
    style_axes(axes, "Average precision on validation images", "iteration", "percent")
    _finish(axes)
    return to_png(figure)


def points_of(rows: Sequence[Row], column: str) -> List[Point]:
    """Iteration and value where there is one; of many rows a mean of neighbours."""
    found = [(int(row["iteration"]), value)
             for row, value in zip(rows, numbers(rows, column)) if value is not None]
    if len(found) <= _MOST_POINTS:
        return [(float(iteration), value) for iteration, value in found]
    size = -(-len(found) // _MOST_POINTS)
    return [_mean(found[start:start + size]) for start in range(0, len(found), size)]


def _mean(points: Sequence[Tuple[int, float]]) -> Point:
    return (sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points))


def _plot(axes: Any, points: Sequence[Point], name: str, color: str, dashes: str,
          width: float) -> None:
    marker = {"marker": "o", "markersize": 3.5} if len(points) <= _FEW_POINTS else {}
    axes.plot([x for x, _ in points], [y for _, y in points], dashes, color=color, label=name,
              linewidth=width, solid_capstyle="round", **marker)


def _finish(axes: Any, legend: bool = True) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = axes.dataLim.intervalx
    if low == high:  # a single point: no iterations beside it
        axes.set_xlim(low - max(1, low / 2), high + max(1, high / 2))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    if legend:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=6, fontsize=8.5,
                    frameon=False, labelcolor=INK, columnspacing=1.4, handlelength=1.7)


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """`1500` as it is, `20k`, `800k`, `1.2M`."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 10000 else f"{value:g}"
