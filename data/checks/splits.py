"""Findings between training and validation, and classes nothing can be learned of."""

from __future__ import annotations

import os
from typing import Dict, List, Optional

from data.checks.objects import some
from data.checks.statistics import SplitStatistics
from data.coco import CocoDataset


def class_findings(train: SplitStatistics, val: Optional[SplitStatistics]) -> List[str]:
    """Sentences about classes without training objects and classes that differ."""
    found = []
    learned = {name for name, count in zip(train.class_names, train.objects_per_class) if count}
    empty = [name for name in train.class_names if name not in learned]
    if empty:
        found.append("train: {} of {} classes {} no object: {}".format(
            len(empty), len(train.class_names), "has" if len(empty) == 1 else "have", some(empty)))
    if val is None:
        return found
    if set(val.class_names) != set(train.class_names):
        only = [sorted(set(one.class_names) - set(other.class_names))
                for one, other in ((train, val), (val, train))]
        found.append("train and val have different classes: only in train: {}; only in val: {}"
                     .format(some(only[0]) or "none", some(only[1]) or "none"))
    elif val.class_names != train.class_names:
        found.append("train and val have the same classes under different ids: {} in train, {} in "
                     "val; they are matched by name".format(
                         some(train.class_names), some(val.class_names)))
    unseen = [name for name, count in zip(val.class_names, val.objects_per_class)
              if count and name in train.class_names and name not in learned]
    if unseen:
        found.append("val: has objects of classes that train has none of: {}".format(some(unseen)))
    return found


def overlap_findings(train: CocoDataset, val: CocoDataset) -> List[str]:
    """Sentences about files that are in both: the same file, or one of its name and size."""
    places: Dict[str, List[int]] = {}
    for index in range(len(train)):
        places.setdefault(os.path.basename(train.image_info(index)[0]), []).append(index)
    shared = []
    for index in range(len(val)):
        name = val.image_info(index)[0]
        path = val.image_path(index)
        if any(_same(train.image_path(other), path)
               for other in places.get(os.path.basename(name), ())):
            shared.append(name)
    if not shared:
        return []
    return ["{} of the {} images of val are in train too: {}; scores on them say nothing".format(
        len(shared), len(val), some(shared))]


def _same(path: str, other: str) -> bool:
    if os.path.abspath(path) == os.path.abspath(other):
        return True
    try:
        return os.stat(path).st_size == os.stat(other).st_size
    except OSError:
        return False
