"""Checks that open the images of a dataset, and what is remembered of them."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from data.coco import CocoDataset, missing_hint
from data.image import read_header
from data.tools.statistics import SplitStatistics, some
from utils.errors import UserError
from utils.files import write_whole

_VERSION = 3


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/yolact`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "yolact"


def file_stamp(path: str) -> str:
    """Path, size and time of a file: another text as soon as the file changes."""
    state = os.stat(path)
    return f"{os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"


def file_state(path: str) -> str:
    """`file_stamp`, or '' for a file that is not there."""
    try:
        return file_stamp(path)
    except OSError:
        return ""


class Memory:
    """Texts by stamp, of one dataset.

    Args:
        name: what the dataset is known by, for example the path of its annotation file.
    """

    def __init__(self, name: str) -> None:
        digest = hashlib.sha1(os.path.abspath(name).encode("utf-8", "surrogatepass")).hexdigest()
        self.path = cache_folder() / f"check-{digest[:16]}.json"
        self._used: Dict[str, str] = {}
        self._known: Dict[str, str] = {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["version"] == _VERSION:
                self._known = {str(key): str(text) for key, text in content["known"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or not ours: everything is found out anew

    def recall(self, stamp: str) -> Optional[str]:
        """The text kept for `stamp`, or None."""
        if stamp in self._known:
            self._used[stamp] = self._known[stamp]
        return self._known.get(stamp)

    def keep(self, stamp: str, text: str) -> None:
        """Remember `text`."""
        self._known[stamp] = self._used[stamp] = text

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
    looked = "" if count == len(dataset) else f" ({count} were looked at)"
    return ["{}: {} image{} an EXIF orientation{}; read {}".format(
        name, total, " has" if total == 1 else "s have", looked,
        "; ".join(f"{how}: {len(found[key])} ({some(found[key])})"
                  for key, how in _HOW.items() if key in found))]


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
        found.append("train and val have the same classes under different ids: "
                     f"{some(train.class_names)} in train, {some(val.class_names)} in val; they "
                     "are matched by name")
    unseen = [name for name, count in zip(val.class_names, val.objects_per_class)
              if count and name in train.class_names and name not in learned]
    if unseen:
        found.append(f"val: has objects of classes that train has none of: {some(unseen)}")
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
    return [f"{len(shared)} of the {len(val)} images of val are in train too: {some(shared)}; "
            "scores on them say nothing"]


def _same(path: str, other: str) -> bool:
    if os.path.abspath(path) == os.path.abspath(other):
        return True
    try:
        return os.stat(path).st_size == os.stat(other).st_size
    except OSError:
        return False


_SHOWN = 10
Progress = Callable[[int, int], None]


class ImageCheck:
    """Outcome of reading the images of one split.

    Attributes:
        unreadable: a sentence for each image that cannot be read or has another size.
        missing: names of files that are not there.
        contents: size in bytes and path of each file that is there.
        unusable: paths of the files that are missing or cannot be read.
    """

    def __init__(self, name: str, dataset: CocoDataset, memory: Memory, workers: int = 2,
                 progress: Optional[Progress] = None) -> None:
        self.name = name
        self._folder = dataset.images_dir
        self.unreadable: List[str] = []
        self.missing: List[str] = []
        self.contents: List[Tuple[int, str]] = []
        self.unusable: List[str] = []
        stamps: Dict[int, str] = {}
        for index in range(len(dataset)):
            file_name, width, height = dataset.image_info(index)
            path = dataset.image_path(index)
            try:
                state = os.stat(path)
            except OSError:
                self.missing.append(file_name)
                self.unusable.append(path)
                continue
            self.contents.append((state.st_size, path))
            stamps[index] = f"{path} {state.st_size} {state.st_mtime_ns} {width}x{height}"
        self._read(dataset, stamps, memory, workers, progress or (lambda done, total: None))

    def _read(self, dataset: CocoDataset, stamps: Dict[int, str], memory: Memory, workers: int,
              progress: Progress) -> None:
        def verdict(index: int) -> str:
            try:
                dataset[index]
            except UserError as problem:
                return str(problem)
            return ""

        unknown = [index for index, stamp in stamps.items() if memory.recall(stamp) is None]
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            for done, (index, sentence) in enumerate(zip(unknown, pool.map(verdict, unknown)), 1):
                memory.keep(stamps[index], sentence)
                progress(done, len(unknown))
        for index, stamp in stamps.items():
            problem = memory.recall(stamp)
            if problem:
                self.unreadable.append(problem)
                self.unusable.append(dataset.image_path(index))

    def findings(self) -> List[str]:
        """Sentences about missing and unreadable files."""
        found = []
        if self.missing:
            found.append("{}: {} image file{} missing: {}{}".format(
                self.name, len(self.missing), " is" if len(self.missing) == 1 else "s are",
                some(self.missing), missing_hint(self._folder, self.missing[0])))
        found += [f"{self.name}: {text}" for text in self.unreadable[:_SHOWN]]
        if len(self.unreadable) > _SHOWN:
            found.append(f"{self.name}: {len(self.unreadable) - _SHOWN} more images cannot be used")
        return found


def content_findings(checks: Sequence[ImageCheck]) -> List[str]:
    """Sentences about files of the same content within and between splits."""
    groups = _same_content(checks)
    found = []
    within: Dict[str, List[str]] = {}
    between = []
    for group in groups:
        names = {name for name, _ in group}
        if len(names) > 1:
            between.append(" = ".join(os.path.basename(path) for _, path in group[:2]))
        for name in names:
            paths = [path for split, path in group if split == name]
            within.setdefault(name, []).extend(paths[1:])
    for name, paths in sorted(within.items()):
        if paths:
            found.append("{}: {} image{} of the same content as another: {}".format(
                name, len(paths), " is" if len(paths) == 1 else "s are",
                some([os.path.basename(path) for path in paths])))
    if between:
        found.append("{} image{} of val {} the content of one of train: {}; scores on them say "
                     "nothing".format(len(between), "" if len(between) == 1 else "s",
                                      "has" if len(between) == 1 else "have", some(between)))
    return found


def _same_content(checks: Sequence[ImageCheck]) -> List[List[Tuple[str, str]]]:
    """Groups of split name and path whose files are equal."""
    by_size: Dict[int, List[Tuple[str, str]]] = {}
    for check in checks:
        for size, path in check.contents:
            by_size.setdefault(size, []).append((check.name, path))
    by_content: Dict[bytes, List[Tuple[str, str]]] = {}
    for entries in by_size.values():
        if len(entries) > 1:  # only files of the same size are read
            for entry in entries:
                by_content.setdefault(_digest(entry[1]), []).append(entry)
    return [group for group in by_content.values() if len(group) > 1]


def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=16).digest()
    except OSError:
        return path.encode("utf-8", "surrogatepass")
