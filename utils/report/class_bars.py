"""Average precision of each class as bars."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence

from utils.report.figure import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    Letters,
    new_figure,
    style_axes,
    to_png,
)

MOST_CLASSES = 120
"""Of more than these the best and the worst are shown."""
_IN_ONE_COLUMN = 30
_INCHES_A_BAR = 0.21
_WIDTH = 7.0


class ClassAp(NamedTuple):
    """Average precision of one class in percent; None where no image has an object of it."""

    name: str
    objects: int
    mask: Optional[float]
    box: Optional[float]


def draw_class_bars(classes: Sequence[ClassAp]) -> Optional[bytes]:
    """A PNG with the classes from the best masks to the worst; None without classes.

    Bars are average precisions of masks, strokes those of boxes.
    """
    if not classes:
        return None
    letters = Letters([item.name for item in classes])
    ordered = sorted(classes, key=lambda item: -1.0 if _absent(item.mask) else item.mask or 0.0,
                     reverse=True)
    title = "Average precision by class"
    if len(ordered) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        title += f": the best and the worst {half} of {len(ordered)}"
        ordered = ordered[:half] + ordered[-half:]
    columns = 1 if len(ordered) <= _IN_ONE_COLUMN else 2
    in_column = -(-len(ordered) // columns)
    figure, all_axes = new_figure(_WIDTH if columns == 1 else 1.45 * _WIDTH,
                                  1.1 + _INCHES_A_BAR * in_column, 1, columns)
    top = max([value for item in ordered for value in (item.mask, item.box)
               if not _absent(value) and value is not None] + [1.0])
    for number, axes in enumerate(all_axes):
        part = ordered[number * in_column:(number + 1) * in_column]
        _draw_column(axes, part, letters, in_column, top)
        style_axes(axes, title if number == 0 else " ", "percent", grid="x")
        axes.tick_params(axis="y", labelsize=8, length=0)
        for label in axes.get_yticklabels():
            label.set_color(INK)
        letters.apply(axes.get_yticklabels())
    _add_legend(figure, all_axes[0], letters.missing)
    figure.subplots_adjust(wspace=0.55)
    return to_png(figure)


def _draw_column(axes: Any, part: Sequence[ClassAp], letters: Letters, rows: int,
                 top: float) -> None:
    places: List[int] = list(range(len(part)))
    for place, item in zip(places, part):
        if _absent(item.mask):
            axes.text(top * 0.01, place, "no objects", fontsize=7.5, color=MUTED, va="center")
            continue
        value = item.mask or 0.0
        axes.barh(place, value, height=0.68, color=GREEN)
        if not _absent(item.box):
            axes.plot([item.box, item.box], [place - 0.34, place + 0.34], color=BLUE, linewidth=2)
        end = max(value, 0.0 if _absent(item.box) else item.box or 0.0)
        axes.text(end + top * 0.015, place, f"{value:.1f}", fontsize=7.5, color=MUTED,
                  va="center")
    axes.set_yticks(places)
    axes.set_yticklabels([letters[item.name] for item in part])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, top * 1.12)


def _add_legend(figure: Any, axes: Any, names_missing: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=GREEN, label="mask AP"),
               Line2D([], [], color=BLUE, linewidth=2, label="box AP")]
    if names_missing:
        handles.append(Patch(color=GRID, label="'class 3': its name has letters that no font "
                                               "here has; see the table"))
    height = figure.get_size_inches()[1]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.5 / (height - 1.0)),
                ncol=len(handles), fontsize=8.5, frameon=False, borderaxespad=0, labelcolor=INK)


def _absent(value: Optional[float]) -> bool:
    return value is None or value != value
