"""Which images a flag means, and what a prediction leaves behind: drawings, cut-outs, JSON."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np

from data.image import SUFFIXES
from utils.errors import UserError
from utils.files import write_whole
from utils.inference.detector import StageTimes
from utils.inference.prediction import Prediction

RESULTS = "results"

_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


class ImageFile(NamedTuple):
    """One image of a run."""

    source: str
    target: str
    """File that is drawn."""
    image_id: int
    """Of the records in JSON."""


def split_pair(value: str) -> Tuple[str, Optional[str]]:
    """`in:out` -> both, or None for an output left out. Drives and addresses (://) stay whole."""
    source, separator, target = value.rpartition(":")
    is_drive = len(source) == 1 and source.isalpha() and target[:1] in ("\\", "/")
    if not separator or is_drive or target.startswith("//"):
        return value, None
    return source, target or None


def output_pair(value: str, ending: str) -> Tuple[str, str]:
    """Paths of `in.jpg[:out.png]`; an output left out is `results/in` with the ending.

    Raises:
        UserError: both are the same file.
    """
    source, target = split_pair(value)
    if target is None:
        target = os.path.join(RESULTS, _stem(source) + ending)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"'{source}' is both input and output; choose another name for the output")
    return source, target


def find_images(value: str) -> Tuple[List[ImageFile], str, int]:
    """Resolve `--images=in_dir[:out_dir]`; `in_dir` may be a pattern such as `in/*.jpg`.

    Taken are files with an image's ending or without any, but not hidden ones.

    Returns:
        The images in the order of their names, the output folder, and how many other files there
        were. Image ids are the numbers that the files' names are, as in COCO; if they are not all
        different numbers, 1, 2, 3, ...

    Raises:
        UserError: no such folder, no images in it, or both folders are the same.
    """
    source, target = split_pair(value)
    is_folder = os.path.isdir(source)
    folder = target or os.path.join(RESULTS, os.path.basename(os.path.abspath(
        source if is_folder else os.path.dirname(source))))
    paths = sorted(glob.glob(os.path.join(glob.escape(source), "*") if is_folder else source))
    if not paths and not is_folder:
        raise UserError(f"--images: no folder '{os.path.abspath(source)}', and no files that fit "
                        "it as a pattern; give a folder with images")
    files = [path for path in paths if os.path.isfile(path)]
    chosen = [path for path in files
              if os.path.splitext(path)[1].lower() in SUFFIXES + ("",)]
    if not chosen:
        raise UserError(f"--images: none of the {len(files)} files of '{source}' is an image "
                        f"(known: {' '.join(SUFFIXES)})")
    if any(os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder) for path in chosen):
        raise UserError(f"--images: '{folder}' is both the folder of the images and the output "
                        "folder; choose another output folder, e.g. "
                        f"--images={source}:{os.path.join(RESULTS, 'drawn')}")
    stems = [_stem(path) for path in chosen]
    # Compared without case: some file systems do not know it.
    counts = Counter(stem.lower() for stem in stems)
    ids = list(range(1, len(stems) + 1))
    if all(stem.isdigit() and stem.isascii() for stem in stems) and (
            len({int(stem) for stem in stems}) == len(stems)):
        ids = [int(stem) for stem in stems]
    # Endings stay where names without them would be the same.
    names = [stem if counts[stem.lower()] == 1 else os.path.basename(path)
             for stem, path in zip(stems, chosen)]
    images = [ImageFile(path, os.path.join(folder, name + ".png"), image_id)
              for path, name, image_id in zip(chosen, names, ids)]
    return images, folder, len(files) - len(chosen)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


@dataclass(frozen=True)
class PredictionOptions:
    """What is shown of the objects that were found, and what is written beside the drawings."""

    top_k: Optional[int] = 5
    """At most this many objects an image, best first; None for all."""
    score_threshold: float = 0.0
    masks: bool = True
    boxes: bool = True
    text: bool = True
    scores: bool = True
    speed: bool = False
    """Frames per second, written onto the frames of a video."""
    json: bool = False
    """Records in COCO's result format."""
    polygons: bool = False
    """Outlines instead of run lengths in them."""
    crops: bool = False
    """Each object cut out, with a transparent background."""
    benchmark: bool = False
    """Wait for the device after each stage, so that its time is its own."""
    show_progress: bool = True


class PredictionOutput:
    """Draws and writes the predictions of a run; what fails is said and counted.

    Args:
        options: what is shown and written.
        warn: prints a line about something that failed.
        times: of the stages "drawing" and "writing".
        json_path: of the records, written by `close`.
        crops_folder: of the cut-outs.
        strict: what fails ends the run.

    Attributes:
        objects: shown so far.
        images: files drawn so far.
    """

    def __init__(self, options: PredictionOptions, warn: Callable[[str], None],
                 times: StageTimes, json_path: str, crops_folder: str,
                 strict: bool = False) -> None:
        self._options, self._warn, self._times, self._strict = options, warn, times, strict
        self._json_path, self._crops_folder = json_path, crops_folder
        self._records: List[str] = []
        self._failures: List[UserError] = []  # a list, since images are read in another thread
        self.objects = self.images = 0

    def fail(self, error: UserError, times: int = 1) -> None:
        """Say what failed and count it `times` times; raise it where nothing may fail."""
        if self._strict:
            raise error
        self._warn(f"failed: {error}")
        self._failures += [error] * times

    @property
    def failed(self) -> int:
        """Images, frames and files that failed so far."""
        return len(self._failures)

    def attempt(self, action: Callable[[], Any]) -> bool:
        """Whether `action` ended without a `UserError`, which is counted."""
        try:
            action()
        except UserError as error:
            self.fail(error)
            return False
        return True

    def draw(self, prediction: Prediction, image_id: int, name: str,
             source: Optional[str] = None) -> np.ndarray:
        """Draw an image's objects and return it.

        Args:
            prediction: what was found.
            image_id: of the records.
            name: of the cut-outs.
            source: file of the image, if there is one.
        """
        options = self._options
        shown = prediction.best(options.top_k, options.score_threshold)
        with self._times.stage("drawing"):
            drawn = shown.draw(None, 0, options.masks, options.boxes, options.text, options.scores)
        self.objects += len(shown)
        with self._times.stage("writing"):
            if options.crops:
                self.attempt(lambda: write_cut_outs(shown, self._crops_folder, name))
            if options.json:
                file = {} if source is None else {"file_name": os.path.basename(source)}
                self._records += [
                    json.dumps(dict(record, **file), separators=(",", ":"), ensure_ascii=False)
                    for record in shown.to_coco(image_id, options.polygons)]
        return drawn

    def write(self, prediction: Prediction, file: ImageFile) -> None:
        """Draw an image into its file; one that cannot be written is a failure."""
        drawn = self.draw(prediction, file.image_id, _stem(file.target), file.source)
        with self._times.stage("writing"):
            self.images += self.attempt(lambda: write_image(file.target, drawn))

    def close(self) -> List[str]:
        """Write the JSON file; returns sentences about it."""
        text = "[" + ",\n".join(self._records) + "]\n"
        if self._options.json and self.attempt(lambda: write_whole(
                self._json_path, lambda stream: stream.write(text.encode("utf-8")))):
            return [f"{len(self._records)} records in {self._json_path}"]
        return []


def write_image(path: str, image: np.ndarray) -> None:
    """Encode an image as its name says (PNG without an ending) and write it whole.

    Raises:
        UserError: OpenCV does not know the ending, or the file cannot be written.
    """
    ending = os.path.splitext(path)[1] or ".png"
    try:
        written, data = cv2.imencode(ending, image)
    except cv2.error:
        written = False
    if not written:
        raise UserError(f"cannot write '{path}': OpenCV does not write {ending} files of "
                        f"{image.shape[1]}x{image.shape[0]} pixels; try .png")
    write_whole(path, lambda stream: stream.write(data.data))


def write_cut_outs(shown: Prediction, folder: str, name: str) -> None:
    """Write each object as `<name>_<number>_<class>.png` with a transparent background."""
    for n, cut_out in shown.cut_outs():
        label = _NOT_IN_NAMES.sub("_", shown.class_names[n])
        write_image(os.path.join(folder, f"{name}_{n + 1:02d}_{label}.png"), cut_out)
