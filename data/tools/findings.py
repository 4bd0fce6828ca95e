"""What is wrong with a dataset, in sentences: its objects, its classes, its files, its splits."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from data.coco import CocoDataset, missing_hint
from data.image import read_header
from utils.errors import UserError
from utils.files import write_whole

Progress = Callable[[int, int], None]

_VERSION = 4
_EXAMPLES = 5
_SHOWN = 10
_SAME = 1e-4
"""Boxes whose corners differ by less, relative to the image, are the same."""
_MANY_CROWDS = 0.25
"""Share of crowds among the annotations above which they are hardly meant."""


def some(values: Iterable[Any]) -> str:
    """The first few of them, for a sentence."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:_EXAMPLES]) + (", ..." if len(texts) > _EXAMPLES else "")


def counted(number: int, noun: str, verb: str = "") -> str:
    """`1 image is` or `3 images are`, for a sentence."""
    verbs = {"is": "are", "has": "have", "repeats": "repeat"}
    text = f"{number} {noun}" + ("" if number == 1 else "s")
    return text + (f" {verb if number == 1 else verbs[verb]}" if verb else "")


def file_state(path: str) -> str:
    """Path, size and time of a file: another text as soon as the file changes; '' for none."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return ""
    return f"{os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"


class FindingsCache:
    """What was found out about a dataset, as texts by key, in the user's cache folder.

    Args:
        name: what the dataset is known by, for example the path of its annotation file.
    """

    def __init__(self, name: str) -> None:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        digest = hashlib.sha1(os.path.abspath(name).encode("utf-8", "surrogatepass")).hexdigest()
        self.path = Path(root) / "yolact" / f"check-{digest[:16]}.json"
        self._used: Dict[str, str] = {}
        self._known: Dict[str, str] = {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["version"] == _VERSION:
                self._known = {str(key): str(text) for key, text in content["known"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or not ours: everything is found out anew

    def recall(self, key: str) -> Optional[str]:
        """The text kept for `key`, or None."""
        if key in self._known:
            self._used[key] = self._known[key]
        return self._known.get(key)

    def keep(self, key: str, text: str) -> None:
        """Remember `text`."""
        self._known[key] = self._used[key] = text

    def save(self, forget: bool = False) -> bool:
        """Write it; `forget` drops what was neither asked for nor new.

        Returns False where the cache folder cannot be written.
        """
        text = json.dumps({"version": _VERSION, "known": self._used if forget else self._known})
        try:
            write_whole(str(self.path), lambda stream: stream.write(text.encode("utf-8")))
        except UserError:
            return False
        return True


def annotation_findings(splits: Mapping[str, CocoDataset]) -> List[str]:
    """Sentences about the annotations of each split, and about the classes of both."""
    found = []
    for name, dataset in splits.items():
        found += [f"{name}: {text}" for text in dataset.report.sentences()[1:]]
        found += [f"{name}: {text}" for text in _crowds(dataset) + _duplicates(dataset)]
    return found + _classes(splits)


def _crowds(dataset: CocoDataset) -> List[str]:
    crowds, objects = dataset.report.crowds, dataset.report.objects
    if crowds <= _MANY_CROWDS * (crowds + objects):
        return []
    return [f"{crowds} of {crowds + objects} annotations have iscrowd 1, so they are neither "
            "learned nor scored; where they outline single objects (CVAT marks every brush mask "
            "so), set iscrowd to 0"]


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
    return [f"{counted(len(rows), 'object', 'repeats')} the box and class of another in the same "
            f"image: image id {some(images)}; each counts as a missed object in the score"]


def _classes(splits: Mapping[str, CocoDataset]) -> List[str]:
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


def overlap_findings(train: CocoDataset, val: CocoDataset) -> List[str]:
    """Sentences about files that are in both, under one name; only those are read."""
    places: Dict[str, List[int]] = {}
    for index in range(len(train)):
        places.setdefault(os.path.basename(train.image_info(index)[0]), []).append(index)
    shared = []
    for index in range(len(val)):
        name = val.image_info(index)[0]
        others = [train.image_path(other) for other in places.get(os.path.basename(name), ())]
        if any(_same_file(other, val.image_path(index)) for other in others):
            shared.append(name)
    if not shared:
        return []
    return [f"{len(shared)} of the {len(val)} images of val are in train too: {some(shared)}; "
            "scores on them say nothing"]


def _same_file(path: str, other: str) -> bool:
    if os.path.abspath(path) == os.path.abspath(other):
        return True
    try:
        return os.stat(path).st_size == os.stat(other).st_size and _digest(path) == _digest(other)
    except (OSError, ValueError):
        return False


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def image_findings(splits: Mapping[str, CocoDataset], cache: FindingsCache, workers: int = 2,
                   progress: Optional[Progress] = None) -> Tuple[List[str], List[str]]:
    """Read every image that the cache does not know as it is now.

    Returns:
        Sentences about files that are missing, cannot be read or repeat another's content, and the
        paths of the files that the sentences are about.
    """
    found, concerned = [], []
    by_size: Dict[int, List[Tuple[str, str]]] = {}
    for name, dataset in splits.items():
        paths = [dataset.image_path(index) for index in range(len(dataset))]
        keys = {index: f"{state} {dataset.image_info(index)[1:]}"
                for index, state in enumerate(map(file_state, paths)) if state}
        missing = [index for index in range(len(paths)) if index not in keys]
        if missing:
            names = [dataset.image_info(index)[0] for index in missing]
            found.append(f"{name}: {counted(len(names), 'image file', 'is')} missing: "
                         f"{some(names)}{missing_hint(dataset.images_dir, names[0])}")
        _read_images(dataset, keys, cache, workers, progress)
        problems = {index: cache.recall(key) for index, key in keys.items() if cache.recall(key)}
        found += [f"{name}: {text}" for text in list(problems.values())[:_SHOWN]]
        if len(problems) > _SHOWN:
            found.append(f"{name}: {len(problems) - _SHOWN} more images cannot be used")
        concerned += [paths[index] for index in missing + list(problems)]
        for index in sorted(set(keys) - set(problems)):
            by_size.setdefault(os.path.getsize(paths[index]), []).append((name, paths[index]))
    copies = _copies(by_size)
    return (found + _copy_findings(copies),
            concerned + [path for group in copies for _, path in group])


def _read_images(dataset: CocoDataset, keys: Mapping[int, str], cache: FindingsCache,
                 workers: int, progress: Optional[Progress]) -> None:
    """Keep what is wrong with each image, '' for nothing, under its key."""
    def problem_of(index: int) -> str:
        try:
            dataset[index]
        except UserError as problem:
            return str(problem)
        return ""

    unknown = [index for index, key in keys.items() if cache.recall(key) is None]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for done, (index, text) in enumerate(zip(unknown, pool.map(problem_of, unknown)), 1):
            cache.keep(keys[index], text)
            if progress is not None:
                progress(done, len(unknown))


def _copies(by_size: Mapping[int, Sequence[Tuple[str, str]]]) -> List[List[Tuple[str, str]]]:
    """Groups of split and path whose files are equal; only files of the same size are read."""
    groups: Dict[str, List[Tuple[str, str]]] = {}
    for entries in by_size.values():
        for entry in entries if len(entries) > 1 else ():
            groups.setdefault(_digest(entry[1]), []).append(entry)
    return [group for group in groups.values() if len(group) > 1]


def _copy_findings(copies: Sequence[Sequence[Tuple[str, str]]]) -> List[str]:
    repeated: Dict[str, List[str]] = {}
    between = []
    for group in copies:
        splits = sorted({split for split, _ in group})
        if len(splits) > 1:
            between.append(" = ".join(os.path.basename(path) for _, path in group[:2]))
        for split in splits:
            names = [os.path.basename(path) for owner, path in group if owner == split]
            repeated.setdefault(split, []).extend(names[1:])
    found = [f"{split}: {counted(len(names), 'image', 'is')} of the same content as another: "
             f"{some(names)}" for split, names in sorted(repeated.items()) if names]
    if between:
        found.append(f"{counted(len(between), 'image')} of val "
                     f"{'has' if len(between) == 1 else 'have'} the content of one of train: "
                     f"{some(between)}; scores on them say nothing")
    return found


_HOW = {
    "shown": "turned, as their sizes in the annotation file say",
    "stored": "as stored, as their sizes in the annotation file say",
    "either": "turned, as viewers show them (square, mirrored or upside down: the size does not "
              "tell)",
}


def turned_notes(splits: Mapping[str, CocoDataset]) -> List[str]:
    """A sentence about the images of each split that have an EXIF orientation.

    Headers alone are read. Files that cannot be read are left to those who report them.
    """
    notes = []
    for split, dataset in splits.items():
        found: Dict[str, List[str]] = {}
        for index in range(len(dataset)):
            file_name, width, height = dataset.image_info(index)
            try:
                header = read_header(dataset.image_path(index))
            except (OSError, ValueError):
                continue
            if header.turned and (width, height) in (header.stored, header.shown):
                how = ("either" if header.stored == header.shown else
                       "stored" if (width, height) == header.stored else "shown")
                found.setdefault(how, []).append(file_name)
        if found:
            total = counted(sum(map(len, found.values())), "image", "has")
            kinds = "; ".join(f"{how}: {len(found[key])} ({some(found[key])})"
                              for key, how in _HOW.items() if key in found)
            notes.append(f"{split}: {total} an EXIF orientation; read {kinds}")
    return notes
