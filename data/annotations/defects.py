"""What an annotation file holds and what of it was dropped or repaired, in sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List

import numpy as np

DROPPED = {
    "no_outline": "no segmentation",
    "malformed_outline": "a malformed segmentation (expected polygons of at least 3 points as x, y "
                         "pairs, or an RLE with size and counts)",
    "rle_size": "an RLE whose size is not the image's",
    "malformed_box": "a bbox that is not four finite numbers",
    "degenerate_box": "a bbox of zero or negative size",
    "outside_box": "a bbox outside the image",
}
"""Defects for which an object is left out, in the order in which they are looked for."""

REPAIRED = {
    "removed_part": "a malformed polygon beside good ones (the good ones are kept)",
    "derived_box": "no bbox (it is taken from the segmentation)",
    "clipped_box": "a bbox more than 1 px beyond the image (it is clipped)",
}
"""Defects that the object survives."""

_EXAMPLES = 5


@dataclass
class Defect:
    """How often one defect occurs, and where first (annotation ids)."""

    count: int
    examples: List[int]


@dataclass
class AnnotationReport:
    """Counts of one annotation file."""

    file: str
    images: int
    annotations: int
    """Records in the file."""
    objects: int
    """Usable objects, crowds not counted."""
    crowds: int
    """Usable crowd regions."""
    empty_images: int
    """Images without a usable object or crowd; they take part as background."""
    objects_per_category: Dict[str, int]
    """Usable objects by category name, in the order of the classes."""
    defects: Dict[str, Defect]
    """By key of `DROPPED` and `REPAIRED`, only those that occur."""
    notes: List[str]
    """Sentences about what is legal but usually a mistake."""

    @property
    def dropped(self) -> int:
        """Annotations that are left out."""
        return sum(defect.count for key, defect in self.defects.items() if key in DROPPED)

    def sentences(self) -> List[str]:
        """One summary, then one sentence for each defect that occurred."""
        lost = ("nothing was dropped" if not self.dropped else
                f"{self.dropped} of {self.annotations} annotations were dropped")
        lines = [f"{self.file}: {self.images} images ({self.empty_images} without objects), "
                 f"{self.objects} objects of {len(self.objects_per_category)} categories, "
                 f"{self.crowds} crowd regions; {lost}"]
        for key, text in list(DROPPED.items()) + list(REPAIRED.items()):
            if key in self.defects:
                defect = self.defects[key]
                ids = ", ".join(str(number) for number in defect.examples)
                lines.append(f"{'dropped' if key in DROPPED else 'repaired'} {defect.count} "
                             f"annotation{'' if defect.count == 1 else 's'} with {text}: id {ids}"
                             f"{', ...' if defect.count > len(defect.examples) else ''}")
        return lines + self.notes


class DefectLog:
    """Collects defects while columns are validated.

    Args:
        file: path of the annotation file, for the sentences.
        annotation_ids: int64 `[n]` of every annotation.
    """

    def __init__(self, file: str, annotation_ids: np.ndarray) -> None:
        self.file = file
        self.annotation_ids = annotation_ids
        self.usable = np.ones(len(annotation_ids), bool)
        self.defects: Dict[str, Defect] = {}

    def drop(self, key: str, wrong: np.ndarray) -> None:
        """Leave out the still usable annotations marked by bool `wrong [n]`."""
        self.repair(key, wrong)
        self.usable &= ~wrong

    def repair(self, key: str, repaired: np.ndarray) -> None:
        """Count the still usable annotations marked by bool `repaired [n]`."""
        rows = np.flatnonzero(repaired & self.usable)
        if len(rows):
            known = self.defects.get(key, Defect(0, []))
            examples = known.examples + self.annotation_ids[rows].tolist()
            self.defects[key] = Defect(known.count + len(rows), sorted(examples)[:_EXAMPLES])
