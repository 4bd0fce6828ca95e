"""Which images a flag means, and what a prediction leaves behind: drawings, cut-outs, JSON."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import IO, Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import write_whole
from utils.inference.pipeline import StageTimes
from utils.inference.prediction import Prediction

RESULTS = "results"


class Picture(NamedTuple):
    """One picture of a run."""

    source: str
    target: str
    """Picture file that is drawn."""
    image_id: int
    """Of the records in JSON."""


def split_pair(value: str) -> Tuple[str, Optional[str]]:
    """`in:out` -> both, or None for an output left out. Drives and addresses (://) stay whole."""
    source, separator, target = value.rpartition(":")
    is_drive = len(source) == 1 and source.isalpha() and target[:1] in ("\\", "/")
    if not separator or is_drive or target.startswith("//"):
        return value, None
    return source, target or None


def image_pair(value: str) -> Tuple[str, str]:
    """Paths of `--image=in.jpg[:out.png]`; the output is results/in.png if left out.

    Raises:
        UserError: both are the same file.
    """
    source, target = split_pair(value)
    if target is None:
        target = os.path.join(RESULTS, _stem(source) + ".png")
    _refuse_overwriting(source, target)
    return source, target


def video_pair(value: str) -> Tuple[str, Optional[str]]:
    """Source and output of `--video=in.mp4[:out.mp4]` or `--video=0[:out.mp4]`.

    A file's output is results/in.mp4 if left out; a camera's is None then.

    Raises:
        UserError: both are the same file.
    """
    source, target = split_pair(value)
    if source.isdigit():
        return source, target
    if target is None:
        target = os.path.join(RESULTS, _stem(source) + ".mp4")
    _refuse_overwriting(source, target)
    return source, target


def find_pictures(value: str, suffixes: Sequence[str]) -> Tuple[List[Picture], str, int]:
    """Resolve `--images=in_dir[:out_dir]`; `in_dir` may be a pattern such as `in/*.jpg`.

    Args:
        value: of the flag.
        suffixes: endings, in lower case, of files that are taken for pictures. Files without any
            ending are tried, too; hidden ones are not.

    Returns:
        The pictures in the order of their names, the output folder, and how many other files there
        were. Image ids are the numbers that the files' names are, as in COCO; if they are not all
        different numbers, 1, 2, 3, ...

    Raises:
        UserError: no such folder, no pictures in it, or both folders are the same.
    """
    source, target = split_pair(value)
    is_folder = os.path.isdir(source)
    folder = target or os.path.join(RESULTS, os.path.basename(os.path.normpath(
        source if is_folder else os.path.dirname(source) or ".")))
    paths = sorted(glob.glob(os.path.join(glob.escape(source), "*")) if is_folder
                   else glob.glob(source))
    if not paths and not is_folder:
        raise UserError(f"--images: no folder '{os.path.abspath(source)}', and no files that fit "
                        "it as a pattern; give a folder with pictures")
    files = [path for path in paths if os.path.isfile(path)]
    known = set(suffixes) | {""}
    chosen = [path for path in files if os.path.splitext(path)[1].lower() in known]
    if not chosen:
        raise UserError("--images: none of the {} files of '{}' is a picture (known: {})".format(
            len(files), source, " ".join(suffixes)))
    if any(os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder) for path in chosen):
        raise UserError("--images: '{}' is both the folder of the pictures and the output folder; "
                        "choose another output folder, e.g. --images={}:{}".format(
                            folder, source, os.path.join(RESULTS, "drawn")))
    names, ids = _output_names(chosen), _image_ids(chosen)
    pictures = [Picture(path, os.path.join(folder, name + ".png"), image_id)
                for path, name, image_id in zip(chosen, names, ids)]
    return pictures, folder, len(files) - len(chosen)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _output_names(paths: Sequence[str]) -> List[str]:
    """File names without their endings where that keeps them apart, else whole."""
    # Compared without case: some file systems do not know it.
    counts = Counter(_stem(path).lower() for path in paths)
    return [_stem(path) if counts[_stem(path).lower()] == 1 else os.path.basename(path)
            for path in paths]


def _image_ids(paths: Sequence[str]) -> List[int]:
    stems = [_stem(path) for path in paths]
    if all(stem.isdigit() and stem.isascii() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))


def _refuse_overwriting(source: str, target: str) -> None:
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"'{source}' is both input and output; choose another name for the output")


_SHOWN_FAILURES = 20
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


class Failures:
    """Count what failed and say the first ones; the run goes on.

    Args:
        say: takes a sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.count = 0

    def report(self, error: Exception, times: int = 1) -> None:
        """Count a failure `times` times."""
        self.count += times
        if self.count - times < _SHOWN_FAILURES:
            self._say(f"failed: {error}")
        elif self.count - times == _SHOWN_FAILURES:
            self._say(f"failed: more than {_SHOWN_FAILURES}; the others are only counted")


class JsonList:
    """A JSON file with a list that grows record by record and takes its name at the end.

    Raises:
        UserError: the file cannot be written; only the first time, then records are dropped.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.records = 0
        self._temporary = f"{path}.{os.getpid()}.tmp"
        self._file: Optional[IO[str]] = None
        self.is_broken = False

    def extend(self, records: List[Dict[str, Any]]) -> None:
        """Append records."""
        if self.is_broken:
            return
        try:
            file = self._open()
            for record in records:
                file.write((",\n" if self.records else "[") + json.dumps(
                    record, separators=(",", ":"), ensure_ascii=False))
                self.records += 1
            file.flush()
        except OSError as error:
            raise self._give_up(error) from None

    def close(self) -> None:
        """Finish the file; without records it is an empty list."""
        if self.is_broken:
            return
        try:
            file = self._open()
            file.write("]\n" if self.records else "[]\n")
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._give_up(error) from None

    def _open(self) -> IO[str]:
        if self._file is None:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            self._file = open(self._temporary, "w", encoding="utf-8")  # noqa: SIM115
        return self._file

    def _give_up(self, error: OSError) -> UserError:
        self.is_broken = True
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            pass  # what is buffered still finds no place
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)
        return UserError(f"cannot write '{self.path}': {error.strerror or error}; it is left out")


@dataclass(frozen=True)
class DrawingChoice:
    """Which objects are shown, and what of them."""

    top_k: Optional[int] = 5
    score_threshold: float = 0.0
    masks: bool = True
    boxes: bool = True
    text: bool = True
    scores: bool = True

    def select(self, prediction: Prediction) -> Prediction:
        """The objects that are drawn, cut out and recorded."""
        return prediction.best(self.top_k, self.score_threshold)

    def draw(self, prediction: Prediction) -> np.ndarray:
        """Draw all objects of `prediction`."""
        return prediction.draw(None, 0, self.masks, self.boxes, self.text, self.scores)


class PredictionOutput:
    """Draw and write the predictions of a run.

    Args:
        choice: what is shown.
        failures: gets what could not be written.
        times: of the stages "drawing" and "writing".
        json_path: file for records in COCO's result format, or None.
        polygons: outlines instead of run lengths in it.
        crops_folder: for cut-outs, or None.
    """

    def __init__(self, choice: DrawingChoice, failures: Failures, times: StageTimes,
                 json_path: Optional[str] = None, polygons: bool = False,
                 crops_folder: Optional[str] = None) -> None:
        self.choice = choice
        self.failures = failures
        self.times = times
        self.objects = 0
        self.pictures = 0
        self.json = None if json_path is None else JsonList(json_path)
        self._polygons = polygons
        self._crops_folder = crops_folder

    def picture(self, prediction: Prediction, image_id: int, target: str) -> None:
        """Write a drawn picture and whatever else was asked for."""
        shown = self.choice.select(prediction)
        with self.times.stage("drawing"):
            drawn = self.choice.draw(shown)
        with self.times.stage("writing"):
            self.pictures += self._try(lambda: write_picture(target, drawn))
        self.records(shown, image_id, os.path.splitext(os.path.basename(target))[0])

    def frame(self, prediction: Prediction, number: int) -> np.ndarray:
        """Draw a video's frame and return it; write whatever else was asked for."""
        shown = self.choice.select(prediction)
        with self.times.stage("drawing"):
            drawn = self.choice.draw(shown)
        self.records(shown, number, f"{number:06d}")
        return drawn

    def records(self, shown: Prediction, image_id: int, name: str) -> None:
        """Write the cut-outs and records of one picture."""
        self.objects += len(shown)
        with self.times.stage("writing"):
            if self._crops_folder is not None:
                folder = self._crops_folder
                self._try(lambda: write_cut_outs(shown, folder, name))
            if self.json is not None:
                found = shown.to_coco(image_id, self._polygons)
                file = {} if shown.path is None else {"file_name": os.path.basename(shown.path)}
                json_file = self.json
                self._try(lambda: json_file.extend([dict(record, **file) for record in found]))

    def close(self) -> None:
        """Finish the JSON file."""
        if self.json is not None:
            self._try(self.json.close)

    def _try(self, write: Callable[[], Any]) -> bool:
        try:
            write()
        except UserError as error:
            self.failures.report(error)
            return False
        return True


def write_picture(path: str, picture: np.ndarray) -> None:
    """Encode a picture as its name says (PNG without an ending) and write it whole.

    Raises:
        UserError: OpenCV does not know the ending, or the file cannot be written.
    """
    ending = os.path.splitext(path)[1] or ".png"
    try:
        written, data = cv2.imencode(ending, picture)
    except cv2.error:
        written = False
    if not written:
        raise UserError(f"cannot write '{path}': OpenCV does not write {ending} files of "
                        f"{picture.shape[1]}x{picture.shape[0]} pixels; try .png")
    write_whole(path, lambda stream: stream.write(data.data))


def write_cut_outs(shown: Prediction, folder: str, name: str) -> None:
    """Write each object as `<name>_<number>_<class>.png` with a transparent background."""
    for n, cut_out in shown.cut_outs():
        label = _NOT_IN_NAMES.sub("_", shown.class_names[n])
        write_picture(os.path.join(folder, f"{name}_{n + 1:02d}_{label}.png"), cut_out)
