"""Read every image as training will, and find files of the same content; results are kept."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from data.checks.memory import Memory
from data.checks.objects import some
from data.coco import CocoDataset
from data.missing_images import missing_hint
from utils.errors import UserError

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
            stamps[index] = "{} {} {} {}x{}".format(
                path, state.st_size, state.st_mtime_ns, width, height)
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
        found += ["{}: {}".format(self.name, text) for text in self.unreadable[:_SHOWN]]
        if len(self.unreadable) > _SHOWN:
            found.append("{}: {} more images cannot be used".format(
                self.name, len(self.unreadable) - _SHOWN))
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
