"""What all plots share: the canvas, colours, letters.

Matplotlib is optional and used through its object interface on the Agg canvas alone: no display is
needed and no state of the process changes.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from typing import Any, Iterable, List, Sequence, Tuple

INSTALL = "pip install matplotlib"
MISSING = ("matplotlib is not installed: the run folder has no plots; '" + INSTALL + "' and "
           "'python -m utils.report {}' draw them afterwards")

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a4f9e", "#56b4e9")
"""Okabe and Ito's colours, told apart by the colour-blind; purple darker than theirs."""
INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
DPI = 110
_LONGEST_NAME = 26
_ELLIPSIS = "\u2026"
_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
          "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei",
          "SimHei", "PingFang SC", "Hiragino Sans GB", "Droid Sans Fallback", "AR PL UMing CN",
          "Unifont")
"""Fonts with Chinese letters and others, in the order in which they are tried."""


def is_available() -> bool:
    """Whether plots can be drawn at all."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1,
               ) -> Tuple[Any, List[Any]]:
    """An empty figure of inches, and its axes from left to right and down."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def style_axes(axes: Any, title: str, x_label: str = "", y_label: str = "",
               grid: str = "both") -> None:
    """The look of all plots: a light grid, no frame but the left and lower line."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=10)
    axes.set_xlabel(x_label, fontsize=9, color=MUTED)
    axes.set_ylabel(y_label, fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8.5, colors=MUTED, length=3)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color=GRID, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def to_png(figure: Any) -> bytes:
    """The figure as a PNG file, cut to what is drawn."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    return stream.getvalue()


class Letters:
    """Class names as a plot can show them.

    Names with letters that no installed font has are shown by their number; `missing` tells
    whether that happened.

    Args:
        names: all names of the plot.
    """

    def __init__(self, names: Sequence[str]) -> None:
        used = {letter for name in names for letter in _plain(name)}
        self.font = _best_font(used)
        glyphs = _glyphs(self.font)
        self._shown = {}
        self.missing = False
        for number, name in enumerate(names):
            text = _shorten(_plain(name))
            if not text or any(ord(letter) not in glyphs for letter in text):
                text, self.missing = f"class {number + 1}", True
            self._shown[name] = text.replace("$", r"\$")  # else a pair of them is a formula

    def __getitem__(self, name: str) -> str:
        """The text to draw for a name."""
        return self._shown[name]

    def apply(self, labels: Sequence[Any]) -> None:
        """Draw these texts in the font that has the most of the letters."""
        for label in labels:
            label.set_fontfamily(self.font)


def _plain(name: str) -> str:
    """Without line ends and other letters that move the pen."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME - 1] + _ELLIPSIS


def _best_font(letters: Iterable[str]) -> str:
    """The default font, unless another one has letters that it lacks."""
    from matplotlib import font_manager

    default = "DejaVu Sans"
    lacking = {ord(letter) for letter in letters} - _glyphs(default)
    if not lacking:
        return default
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    counts = {name: len(lacking & _glyphs(name)) for name in _FONTS if name in installed}
    best = max(counts, key=lambda name: counts[name]) if counts else default
    return best if counts.get(best) else default


@functools.lru_cache(maxsize=None)
def _glyphs(family: str) -> frozenset:
    """Code points that a font has."""
    from matplotlib import font_manager

    path = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return frozenset(font_manager.get_font(path).get_charmap())
