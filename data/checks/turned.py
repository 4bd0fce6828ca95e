"""Say which images have an EXIF orientation, and how they are read."""

from __future__ import annotations

from typing import Dict, List, Optional

import numpy as np

from data.checks.objects import some
from data.coco import CocoDataset
from data.image_file import read_header

_HOW = {
    "shown": "turned, as their sizes in the annotation file say",
    "stored": "as stored, as their sizes in the annotation file say",
    "either": "turned, as viewers show them (square, mirrored or upside down: the size does not "
              "tell)",
}


def turned_notes(name: str, dataset: CocoDataset, limit: Optional[int] = None) -> List[str]:
    """A sentence about the images of a split with an EXIF orientation; none without any.

    Headers alone are read. Files that cannot be read are left to those who report them.

    Args:
        name: of the split.
        dataset: the split.
        limit: look at no more images than this, evenly spread; None for all.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    found: Dict[str, List[str]] = {}
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        file_name, width, height = dataset.image_info(index)
        try:
            header = read_header(dataset.image_path(index))
        except (OSError, ValueError):
            continue
        if header.turned and (width, height) in (header.stored, header.shown):
            how = ("either" if header.stored == header.shown else
                   "stored" if (width, height) == header.stored else "shown")
            found.setdefault(how, []).append(file_name)
    total = sum(map(len, found.values()))
    if not total:
        return []
    looked = "" if count == len(dataset) else " ({} were looked at)".format(count)
    return ["{}: {} image{} an EXIF orientation{}; read {}".format(
        name, total, " has" if total == 1 else "s have", looked,
        "; ".join("{}: {} ({})".format(how, len(found[key]), some(found[key]))
                  for key, how in _HOW.items() if key in found))]
