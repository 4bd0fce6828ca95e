"""What is wrong with a dataset, in sentences: its objects, its classes, its files, its splits."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from data.coco import CocoDataset, missing_hint
from data.image import read_header
from utils.errors import UserError, counted, some
from utils.files import read_whole

Splits = Mapping[str, CocoDataset]
"""Training data as `train` and, where there is any, validation data as `val`."""

Files = List[Tuple[str, str]]
"""Split and path of images."""

Progress = Callable[[int, int], None]

_SHOWN = 10
_SAME = 1e-4
"""Boxes whose corners differ by less, relative to the image, are the same."""
_MANY_CROWDS = 0.25
"""Share of crowds among the annotations above which they are hardly meant; nor are they where a
class has nothing else."""


def annotation_findings(splits: Splits) -> List[str]:
    """Sentences about the annotations of each split, and about the classes of both."""
    found = []
    for name, dataset in splits.items():
        texts = dataset.report.sentences()[1:] + _crowds(dataset) + _duplicates(dataset)
        found += [f"{name}: {text}" for text in texts]
    return found + _classes(splits)


def _crowds(dataset: CocoDataset) -> List[str]:
    packed, objects = dataset.annotations, dataset.report.objects_per_category
    crowds = np.bincount(packed.labels[packed.crowd], minlength=len(objects) + 1)[1:]
    only = [name for (name, count), hidden in zip(objects.items(), crowds) if hidden and not count]
    total = int(crowds.sum())
    if total <= _MANY_CROWDS * (total + dataset.report.objects) and not only:
        return []
    return [f"{total} of {total + dataset.report.objects} annotations have iscrowd 1"
            + (f" (all of {some(only)})" if only else "") + ", so they are neither learned nor "
            "scored; where they outline single objects (CVAT marks every brush mask so), set "
            "iscrowd to 0"]


def duplicates(dataset: CocoDataset) -> np.ndarray:
    """Objects (rows) that repeat the box and class of an earlier one in the same image."""
    packed = dataset.annotations
    rows = np.flatnonzero(~packed.crowd)
    corners = np.rint(packed.boxes[rows] / _SAME).astype(np.int64)
    keys = np.column_stack([packed.owners[rows], packed.labels[rows], corners])
    order = np.lexsort(keys.T[::-1])  # stable: the earlier of two equal ones stays first
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    return np.sort(rows[order[1:][same]])


def _duplicates(dataset: CocoDataset) -> List[str]:
    rows = duplicates(dataset)
    if not len(rows):
        return []
    images = np.unique(dataset.image_ids[dataset.annotations.owners[rows]])
    return [f"{counted(len(rows), 'object')} {'repeats' if len(rows) == 1 else 'repeat'} the box "
            f"and class of another in the same image: image id {some(images)}; each counts as a "
            "missed object in the score"]


def _classes(splits: Splits) -> List[str]:
    """Sentences about classes without objects and classes that differ."""
    counts = {split: dataset.report.objects_per_category for split, dataset in splits.items()}
    found = []
    for split, objects in counts.items():
        empty = [name for name, count in objects.items() if not count]
        if empty:
            found.append(f"{split}: {len(empty)} of {len(objects)} classes "
                         f"{'has' if len(empty) == 1 else 'have'} no object: {some(empty)}")
    if len(counts) < 2:
        return found
    train, val = counts["train"], counts["val"]
    if set(val) != set(train):
        only = [some(sorted(set(one) - set(other))) or "none"
                for one, other in ((train, val), (val, train))]
        found.append(f"train and val have different classes: only in train: {only[0]}; only in "
                     f"val: {only[1]}")
    elif list(val) != list(train):
        found.append("train and val have the same classes under different ids: "
                     f"{some(train)} in train, {some(val)} in val; they are matched by name")
    unseen = [name for name, count in val.items() if count and train.get(name) == 0]
    if unseen:
        found.append(f"val: has objects of classes that train has none of: {some(unseen)}")
    return found


def copy_findings(splits: Splits, same_name: bool = False) -> List[str]:
    """Sentences about images whose files are equal, within a split and between both.

    Only files of equal size are read; with `same_name`, only those of equal names too.
    """
    found, leaks = [], []
    groups = _equal_files(splits, (os.path.basename,) if same_name else ())
    for split in splits:
        copies: List[str] = []
        for files in groups:
            copies += [os.path.basename(path) for owner, path in files if owner == split][1:]
        if copies:
            found.append(f"{split}: {counted(len(copies), 'image')} of the same content as "
                         f"another: {some(copies)}")
    for files in groups:
        if len({split for split, _ in files}) > 1:
            leaks += [os.path.basename(path) for split, path in files if split == "val"]
    if leaks:
        found.append(f"{len(leaks)} of the {len(splits['val'])} images of val are in train too: "
                     f"{some(leaks)}; scores on them say nothing")
    return found


def _equal_files(splits: Splits, first: Tuple[Callable[[str], Any], ...]) -> List[Files]:
    """Groups of equal files: each property, cheap ones first, parts what the last left together."""
    groups: List[Files] = [[(split, dataset.image_path(index))
                            for split, dataset in splits.items() for index in range(len(dataset))]]
    for property_of in (*first, os.path.getsize, _digest):
        finer: List[Files] = []
        for files in groups:
            alike: Dict[Any, Files] = {}
            for split, path in files:
                with contextlib.suppress(OSError, ValueError):  # a name that no file can have
                    alike.setdefault(property_of(path), []).append((split, path))
            finer += [group for group in alike.values() if len(group) > 1]
        groups = finer
    return groups


def _digest(path: str) -> bytes:
    return hashlib.blake2b(read_whole(path), digest_size=16).digest()


def image_findings(splits: Splits, workers: int = 2,
                   progress: Optional[Progress] = None) -> List[str]:
    """Read every image: sentences about files that are missing or cannot be used."""
    found = []
    for name, dataset in splits.items():
        missing, problems = dataset.missing_images(), []
        there = sorted(set(range(len(dataset))) - set(missing))
        with ThreadPoolExecutor(workers) as pool:
            texts = pool.map(functools.partial(_problem_of, dataset), there)
            for done, text in enumerate(texts, 1):
                problems += [text] if text else []
                if progress is not None:
                    progress(done, len(there))
        if missing:
            names = [dataset.image_info(index)[0] for index in missing]
            found.append(f"{name}: {counted(len(names), 'image file')} missing: {some(names)}"
                         f"{missing_hint(dataset.images_dir, names[0])}")
        found += [f"{name}: {text}" for text in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            found.append(f"{name}: {len(problems) - _SHOWN} more images cannot be used")
    return found


def _problem_of(dataset: CocoDataset, index: int) -> str:
    """Why an image cannot be used; empty if it can."""
    try:
        dataset[index]
    except UserError as problem:
        return str(problem)
    return ""


def turned_notes(splits: Splits) -> List[str]:
    """A sentence about the images of each split that have an EXIF orientation.

    Headers alone are read. Files that cannot be read are left to those who report them.
    """
    notes = []
    for split, dataset in splits.items():
        turned, stored = [], []
        for index in range(len(dataset)):
            file_name, width, height = dataset.image_info(index)
            try:
                header = read_header(dataset.image_path(index))
            except (OSError, ValueError):
                continue
            if header.turned and (width, height) in header[:2]:
                turned.append(file_name)
                if header.annotated((width, height)) != header.shown:
                    stored.append(file_name)
        if turned:
            notes.append(f"{split}: {counted(len(turned), 'image')} with an EXIF orientation "
                         f"({some(turned)}), read upright as viewers show them" + (
                             f", but {len(stored)} ({some(stored)}) as stored, as the size in the "
                             "annotation file says" if stored else ""))
    return notes
