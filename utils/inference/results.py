"""Scores of an evaluation, as numbers and as the tables that are printed or written.

No printed line but the two rows of the table may contain the word "box" or "mask": the launchers,
and scripts that people have written around them, find these rows by those words.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

from utils.files import write_whole

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl",
              "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers: average precision and recall, over IoU .50:.95 where not named otherwise;
s, m, l are small, medium and large objects, AR1..AR100 the detections allowed per image."""

THRESHOLDS = tuple(range(50, 100, 5))
"""IoU thresholds of the table, in percent."""


@dataclass
class ClassScore:
    """Average precision of one class; None where the images hold no object of it."""

    category_id: int
    name: str
    objects: int
    ap: Optional[float]
    ap50: Optional[float]


@dataclass
class Scores:
    """All scores of one kind (boxes or masks), in [0, 1]; None where there is no ground truth."""

    statistics: Dict[str, Optional[float]]
    """The numbers of `STATISTICS`."""
    per_threshold: List[Optional[float]]
    """Average precision at each of `THRESHOLDS`."""
    per_class: List[ClassScore]
    """By category id."""

    @property
    def ap(self) -> Optional[float]:
        """Mean average precision over classes and IoU .50:.95."""
        return self.statistics["AP"]


@dataclass
class CocoResults:
    """The outcome of an evaluation."""

    box: Scores
    mask: Scores
    num_images: int
    notes: List[str] = field(default_factory=list)
    """Sentences for the user."""

    def table(self) -> str:
        """Average precision in percent over the IoU thresholds, in the original's layout."""
        heads = ["", "all "] + [f".{threshold} " for threshold in THRESHOLDS]
        rule = "-------+" * len(heads)
        rows = [_row([name, _percent(scores.ap)] + [_percent(ap) for ap in scores.per_threshold])
                for name, scores in (("box", self.box), ("mask", self.mask))]
        return "\n".join([_row(heads), rule] + rows + [rule])

    def statistics_table(self) -> str:
        """The twelve numbers of COCO, in percent."""
        lines = ["{:12s}".format("COCO") + "".join(f"{name:>7s}" for name in STATISTICS)]
        for name, scores in (("detection", self.box), ("segmentation", self.mask)):
            lines.append(f"{name:12s}" + "".join(
                f"{_percent(scores.statistics[key]):>7s}" for key in STATISTICS))
        return "\n".join(lines)

    def summary(self) -> Dict[str, Any]:
        """Plain types, for logs: the numbers of `STATISTICS` for box and mask, in [0, 1]."""
        return {"images": self.num_images, "box": dict(self.box.statistics),
                "mask": dict(self.mask.statistics)}

    def write_per_class(self, path: str) -> None:
        """Write average precision per class, in percent, as CSV; empty cells have no objects."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["category_id", "name", "objects", "box_AP", "box_AP50", "mask_AP",
                         "mask_AP50"])
        for box, mask in zip(self.box.per_class, self.mask.per_class):
            cells = [box.ap, box.ap50, mask.ap, mask.ap50]
            writer.writerow([box.category_id, box.name, box.objects] + [
                "" if value is None else f"{100 * value:.2f}" for value in cells])
        write_whole(path, lambda stream: stream.write(text.getvalue().encode("utf-8")))


def _row(cells: Sequence[str]) -> str:
    return "".join(f" {cell:>5s} |" for cell in cells)


def _percent(value: Optional[float]) -> str:
    """Five characters at most: 31.98, 100.0, or n/a where there is no ground truth."""
    if value is None:
        return "n/a"
    return ("{:.2f}" if 100 * value < 99.995 else "{:.1f}").format(100 * value)
