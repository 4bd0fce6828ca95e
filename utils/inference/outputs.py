"""Which images a flag means, and what a prediction leaves behind: drawings, cut-outs, JSON."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import write_whole
from utils.inference.pipeline import StageTimes
from utils.inference.prediction import Prediction

RESULTS = "results"

_SHOWN_FAILURES = 20
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


def find_images(value: str, suffixes: Sequence[str]) -> Tuple[List[ImageFile], str, int]:
    """Resolve `--images=in_dir[:out_dir]`; `in_dir` may be a pattern such as `in/*.jpg`.

    Args:
        value: of the flag.
        suffixes: endings, in lower case, of files that are taken for images. Files without any
            ending are tried, too; hidden ones are not.

    Returns:
        The images in the order of their names, the output folder, and how many other files there
        were. Image ids are the numbers that the files' names are, as in COCO; if they are not all
        different numbers, 1, 2, 3, ...

    Raises:
        UserError: no such folder, no images in it, or both folders are the same.
    """
    source, target = split_pair(value)
    is_folder = os.path.isdir(source)
    folder = target or os.path.join(RESULTS, os.path.basename(os.path.normpath(
        source if is_folder else os.path.dirname(source) or ".")))
    paths = sorted(glob.glob(os.path.join(glob.escape(source), "*") if is_folder else source))
    if not paths and not is_folder:
        raise UserError(f"--images: no folder '{os.path.abspath(source)}', and no files that fit "
                        "it as a pattern; give a folder with images")
    files = [path for path in paths if os.path.isfile(path)]
    known = set(suffixes) | {""}
    chosen = [path for path in files if os.path.splitext(path)[1].lower() in known]
    if not chosen:
        raise UserError(f"--images: none of the {len(files)} files of '{source}' is an image "
                        f"(known: {' '.join(suffixes)})")
    if any(os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder) for path in chosen):
        raise UserError(f"--images: '{folder}' is both the folder of the images and the output "
                        "folder; choose another output folder, e.g. "
                        f"--images={source}:{os.path.join(RESULTS, 'drawn')}")
    images = [ImageFile(path, os.path.join(folder, name + ".png"), image_id)
              for path, name, image_id in zip(chosen, _output_names(chosen), _image_ids(chosen))]
    return images, folder, len(files) - len(chosen)


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


class Failures:
    """Counts what failed and says the first ones through `say`; the run goes on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.count = 0

    def report(self, error: Exception, times: int = 1) -> None:
        """Count a failure `times` times."""
        if self.count < _SHOWN_FAILURES:
            self._say(f"failed: {error}")
        elif self.count == _SHOWN_FAILURES:
            self._say(f"failed: more than {_SHOWN_FAILURES}; the others are only counted")
        self.count += times

    def attempt(self, action: Callable[[], Any]) -> bool:
        """Whether `action` ended without a `UserError`, which is counted."""
        try:
            action()
        except UserError as error:
            self.report(error)
            return False
        return True


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
    """Draws and writes the predictions of a run.

    Args:
        options: what is shown and written.
        failures: gets what could not be written.
        times: of the stages "drawing" and "writing".
        json_path: of the records, written by `close`.
        crops_folder: of the cut-outs.

    Attributes:
        objects: shown so far.
        images: files drawn so far.
    """

    def __init__(self, options: PredictionOptions, failures: Failures, times: StageTimes,
                 json_path: str, crops_folder: str) -> None:
        self._options, self._failures, self._times = options, failures, times
        self._json_path, self._crops_folder = json_path, crops_folder
        self._records: List[str] = []
        self.objects = 0
        self.images = 0

    def draw(self, prediction: Prediction, image_id: int, name: str) -> np.ndarray:
        """Draw an image's objects and return it; `name` is that of the cut-outs."""
        options = self._options
        shown = prediction.best(options.top_k, options.score_threshold)
        with self._times.stage("drawing"):
            drawn = shown.draw(None, 0, options.masks, options.boxes, options.text, options.scores)
        self.objects += len(shown)
        with self._times.stage("writing"):
            if options.crops:
                self._failures.attempt(lambda: write_cut_outs(shown, self._crops_folder, name))
            if options.json:
                file = {} if shown.path is None else {"file_name": os.path.basename(shown.path)}
                self._records += [
                    json.dumps(dict(record, **file), separators=(",", ":"), ensure_ascii=False)
                    for record in shown.to_coco(image_id, options.polygons)]
        return drawn

    def write(self, prediction: Prediction, file: ImageFile) -> None:
        """Draw an image into its file; one that cannot be written is a failure."""
        drawn = self.draw(prediction, file.image_id, _stem(file.target))
        with self._times.stage("writing"):
            self.images += self._failures.attempt(lambda: write_image(file.target, drawn))

    def close(self) -> Optional[str]:
        """Write the JSON file; returns a sentence about it, None where there is none."""
        text = "[" + ",\n".join(self._records) + "]\n"
        if self._options.json and self._failures.attempt(lambda: write_whole(
                self._json_path, lambda stream: stream.write(text.encode("utf-8")))):
            return f"{len(self._records)} records in {self._json_path}"
        return None


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
