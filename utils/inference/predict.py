"""Run a predictor over images, a video or a camera: what eval.py does with --image and the like.

What fails on the way (an image that cannot be read, a broken frame, a full disk) is said, counted
and left out; the rest goes on.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence, TextIO

import cv2
import numpy as np

from data.image import SUFFIXES, read_image
from utils.drawing import draw_corner_text
from utils.errors import UserError
from utils.files import refuse_unwritable, refuse_unwritable_file, write_whole
from utils.inference.detector import Item, StageTimes
from utils.inference.predictor import Prediction, Predictor
from utils.inference.video import FrameOutput, VideoReader, read_ahead, window_problem
from utils.parsing import whole_number
from utils.progress import ProgressBar

RESULTS = "results"
EXIT_FAILURES = 1
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
_OUR_RECORDS = re.compile(rb'\[(\]\n|\{"image_id":\d+,"category_id":\d+,"category_name":)')
_PIXELS_IN_BATCH = 64_000_000
"""A batch is closed early when its images reach this: bounds the memory."""


class ImageFile(NamedTuple):
    """One image of a run."""

    source: str
    target: str
    """File that is drawn."""
    image_id: int
    """Of the records in JSON, as the name is."""
    name: str


@dataclass(frozen=True)
class PredictionOptions:
    """What is shown of the objects that were found, and what is written beside the drawings."""

    top_k: int | None = 5
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


class PredictionRun:
    """One run of a predictor; what fails in it is said and counted.

    `say` prints a line of the result, `warn` one about something that failed; `stream` is for
    progress.
    """

    def __init__(self, predictor: Predictor, options: PredictionOptions, say: Callable[[str], None],
                 warn: Callable[[str], None], stream: TextIO) -> None:
        self.predictor, self.options = predictor, options
        self.say, self.warn, self.stream = say, warn, stream
        self.times = StageTimes()
        self.objects = self.files = 0  # shown, and drawn, so far
        self._records: list[str] = []
        self._failures: list[UserError] = []  # a list, since images are read in another thread
        self._stem, self._crops_folder, self._strict = "", "", False

    def image(self, value: str) -> int:
        """`--image=IN[:OUT]`; an image that cannot be read or written is a `UserError`."""
        source, target = output_pair(value, ".png")
        if os.path.isdir(source):
            raise UserError(f"--image: '{source}' is a folder; --images takes one")
        refuse_unwritable_file(target)
        self._strict = True
        self._start(os.path.splitext(target)[0])
        self._draw_files([ImageFile(source, target, 1, os.path.basename(source))])
        return self._end(f"{self.objects} objects drawn in {target}", speed=self.options.benchmark)

    def images(self, value: str) -> int:
        """`--images=FOLDER[:OUT]`."""
        files, folder, others = find_images(value)
        self.say(f"{len(files)} images" + f", {others} other names left out" * bool(others))
        refuse_unwritable(folder)
        self._start(os.path.join(folder, "predictions"), os.path.join(folder, "crops"))
        interrupted = _interrupt_in(self._draw_files, files)
        code = self._end(f"{self.files} of {len(files)} images drawn in {folder}, "
                         f"{self.objects} objects")
        if interrupted is not None:  # what was found so far is written
            raise interrupted
        return code

    def video(self, value: str) -> int:
        """`--video=IN[:OUT]`: a file or a camera, into a file or, from a camera only, a window."""
        source, target = split_pair(value)
        if whole_number(source) is None:
            source, target = output_pair(value, ".mp4")
        if target is not None:
            refuse_unwritable_file(target)
        elif window_problem():
            raise UserError(f"no window can be shown: {window_problem()}; write to a file "
                            f"instead, e.g. --video={source}:out.mp4 (Ctrl-C ends it)")
        with closing(VideoReader(source)) as reader:
            self._start(os.path.splitext(target or os.path.join(RESULTS, "camera" + source))[0])
            shown = FrameOutput(reader, target)
            try:
                interrupted = _interrupt_in(self._draw_frames, reader, shown)
            finally:
                is_whole = self._attempt(shown.close)
            if not self.times.images and interrupted is None:
                raise UserError(f"{source}: no frame of it can be decoded; it may be incomplete, "
                                "or in a format that this OpenCV cannot read")
            if reader.missing:
                self._fail(UserError(
                    f"{source}: the last {reader.missing} of {reader.total} frames cannot be "
                    "read; the file may be incomplete"), reader.missing)
            place = f" drawn in {target}" if target is not None and is_whole else ""
            code = self._end(f"{self.times.images} frames{place}, {self.objects} objects")
            # Ctrl-C is how a recording ends.
            if interrupted is not None and not reader.is_camera:
                raise interrupted
            return code

    def _start(self, stem: str, crops_folder: str = "") -> None:
        """Start the clock and whatever is written beside the images."""
        self._stem, self._crops_folder = stem, crops_folder or stem + "_crops"
        if self.options.json:
            refuse_unwritable_file(stem + ".json")
            refuse_foreign_records(stem + ".json")
        if self.options.benchmark:
            self.predictor.warm_up()
        self.times = StageTimes(self.predictor.synchronize if self.options.benchmark else None)

    def _fail(self, error: UserError, times: int = 1) -> None:
        """Say what failed and count it `times` times; raise it where nothing may fail."""
        if self._strict:
            raise error
        self.warn(f"failed: {error}")
        self._failures += [error] * times

    def _attempt(self, action: Callable[..., Any], *given: Any) -> bool:
        """Whether `action(*given)` ended without a `UserError`, which is counted."""
        try:
            action(*given)
        except UserError as error:
            self._fail(error)
            return False
        return True

    def _draw_files(self, files: Sequence[ImageFile]) -> None:
        def readable() -> Iterator[tuple[ImageFile, np.ndarray]]:
            for file in files:
                try:
                    yield file, read_image(file.source)
                except UserError as error:
                    self._fail(error)

        with closing(read_ahead(readable())) as ahead, closing(self.predictor.find(
                self._batches(ahead), self.times, self._progress(len(files)))) as found:
            for file, prediction in found:
                drawn = self._draw(prediction, file.image_id, os.path.relpath(
                    os.path.splitext(file.target)[0], os.path.dirname(self._stem) or "."),
                    {"file_name": file.name})
                with self.times.stage("writing"):
                    self.files += self._attempt(write_image, file.target, drawn)

    def _draw_frames(self, reader: VideoReader, shown: FrameOutput) -> None:
        """Draw until the end, or until the user leaves the window."""
        before = 0
        with closing(read_ahead(reader)) as ahead, closing(self.predictor.find(
                self._batches((frame, frame.image) for frame in itertools.takewhile(
                    lambda frame: not shown.left, ahead)),
                self.times, self._progress(reader.total))) as found:
            for frame, prediction in found:
                for lost in range(before + 1, frame.number):
                    self._fail(UserError(f"{reader.source}: frame {lost} cannot be decoded"))
                drawn = self._draw(prediction, frame.number, f"{frame.number:06d}", {})
                if self.options.speed:
                    draw_corner_text(drawn, f"{self.times.images_per_second():.1f} fps")
                with self.times.stage("writing"):
                    shown.add(drawn, frame, lost=frame.number - before - 1)
                before = frame.number

    def _draw(self, prediction: Prediction, image_id: int, name: str,
              facts: dict[str, str]) -> np.ndarray:
        """Draw an image's objects and return it; `name` is of its cut-outs, `facts` go with the
        id into each record.
        """
        options = self.options
        shown = prediction.best(options.top_k, options.score_threshold)
        with self.times.stage("drawing"):
            drawn = shown.draw(None, 0, options.masks, options.boxes, options.text, options.scores)
        self.objects += len(shown)
        with self.times.stage("writing"):
            if options.crops:
                self._attempt(self._write_cut_outs, shown, name)
            if options.json:
                self._records += [
                    json.dumps(dict(record, **facts), separators=(",", ":"), ensure_ascii=False)
                    for record in shown.to_coco(image_id, options.polygons)]
        return drawn

    def _write_cut_outs(self, shown: Prediction, name: str) -> None:
        """Write each object as `<name>_<number>_<class>.png` with a transparent background."""
        for n, cut_out in shown.cut_outs():
            label = _NOT_IN_NAMES.sub("_", shown.class_names[n])
            write_image(os.path.join(self._crops_folder, f"{name}_{n + 1:02d}_{label}.png"),
                        cut_out)

    def _progress(self, total: int) -> ProgressBar:
        return ProgressBar(total, self.stream, enabled=self.options.show_progress and total != 1)

    def _batches(self, items: Iterable[tuple[Item, np.ndarray]]
                 ) -> Iterator[list[tuple[Item, np.ndarray]]]:
        batch: list[tuple[Item, np.ndarray]] = []
        pixels = 0
        for item, image in items:
            batch.append((item, image))
            pixels += image.size // 3
            if len(batch) >= self.predictor.batch_size or pixels > _PIXELS_IN_BATCH:
                yield batch
                batch, pixels = [], 0
        if batch:
            yield batch

    def _end(self, sentence: str, speed: bool = True) -> int:
        """Write the JSON file and say what was done; returns the exit code."""
        self.say(sentence)
        path, text = self._stem + ".json", "[" + ",\n".join(self._records) + "]\n"
        content = text.encode("utf-8", "backslashreplace")  # a name need not be text
        if self.options.json and self._attempt(write_whole, path, content):
            self.say(f"{len(self._records)} records in {path}")
        if speed:
            self.say(self.times.sentence(stages=self.options.benchmark))
        if self._failures:
            self.say(f"{len(self._failures)} failed")
        return EXIT_FAILURES if self._failures else 0


def _interrupt_in(action: Callable[..., None], *given: Any) -> KeyboardInterrupt | None:
    """The interrupt, if any, that has ended `action(*given)`."""
    try:
        action(*given)
    except KeyboardInterrupt as stop:
        return stop
    return None


def split_pair(value: str) -> tuple[str, str | None]:
    """`in:out` -> both, or None for an output left out. Addresses and what is there stay whole.

    Raises:
        UserError: there is no input.
    """
    source, separator, target = value.rpartition(":")
    if not separator or target.startswith("//") or os.path.exists(value):
        source, target = value, ""
    if not source:
        raise UserError(f"'{value}' names no input; expected IN or IN:OUT")
    return source, target or None


def output_pair(value: str, ending: str) -> tuple[str, str]:
    """Paths of `in.jpg[:out.png]`; an output left out is `results/in` with the ending.

    Raises:
        UserError: both are the same file.
    """
    source, target = split_pair(value)
    if target is None:
        target = os.path.join(RESULTS, os.path.splitext(os.path.basename(source))[0] + ending)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"'{source}' is both input and output; choose another name for the output")
    return source, target


def find_images(value: str) -> tuple[list[ImageFile], str, int]:
    """Resolve `--images=in_dir[:out_dir]`, where `image_files` are looked for in `in_dir`.

    Returns:
        The images in the order of their names, the output folder, and how many other files and
        folders there were. Image ids are the numbers that the files' names are, as in COCO; if
        they are not all different numbers, 1, 2, 3, ...

    Raises:
        UserError: no such folder, no images in it, or a folder would be read and written.
    """
    source, target = split_pair(value)
    chosen, others = image_files(source)
    # What comes from several folders stays in them: names may be the same.
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in chosen])
    folder = target or os.path.join(RESULTS, os.path.basename(common))
    names = [os.path.relpath(path, common) for path in chosen]
    stems = [os.path.splitext(name)[0] for name in names]
    ids = [int(stem) for stem in map(os.path.basename, stems) if stem.isdigit() and stem.isascii()]
    if len(set(ids)) < len(names):
        ids = list(range(1, len(names) + 1))
    # Endings stay where names without them would be the same, also on file systems without case.
    counts = Counter(stem.lower() for stem in stems)
    images = [ImageFile(path, os.path.join(folder, (
        stem if counts[stem.lower()] == 1 else name) + ".png"), number, name)
        for path, stem, number, name in zip(chosen, stems, ids, names)]
    if {os.path.realpath(os.path.dirname(image.target)) for image in images}.intersection(
            os.path.realpath(os.path.dirname(path)) for path in chosen):
        raise UserError(f"--images: '{folder}' is both the folder of the images and the output "
                        "folder; choose another output folder, e.g. "
                        f"'--images={source}:{os.path.join(RESULTS, 'drawn')}'")
    return images, folder, others


def image_files(source: str) -> tuple[list[str], int]:
    """Images that --images names: those of a folder, or of a pattern such as `in/**/*.jpg`.

    Taken are files with an image's ending or without any, but not hidden ones. Returns their paths
    in the order of their names, and how many other files and folders there were.

    Raises:
        UserError: no such folder, or no images in it.
    """
    is_folder = os.path.isdir(source)
    paths = sorted(glob.glob(os.path.join(glob.escape(source), "*") if is_folder else source,
                             recursive=True))
    if not paths and not is_folder:
        raise UserError(f"--images: no folder '{os.path.abspath(source)}', and no files that fit "
                        "it as a pattern; give a folder with images")
    files = [path for path in paths if os.path.isfile(path)]
    chosen = [path for path in files
              if os.path.splitext(path)[1].lower() in SUFFIXES + ("",)]
    if not chosen:
        below = f"; for those in its folders give '{source}/**'" if len(files) < len(paths) else ""
        raise UserError(f"--images: none of the {len(files)} files of '{source}' is an image "
                        f"(known: {' '.join(SUFFIXES)}){below}")
    return chosen, len(paths) - len(chosen)


def refuse_foreign_records(path: str) -> None:
    """Raise a `UserError` where records would replace a file that holds something else."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as stream:
        start = stream.read(100)
    if start and not _OUR_RECORDS.match(start):
        raise UserError(f"'{path}', where --output_json writes, is there and was not written by "
                        "it; it is not replaced: choose another output, or move it away")


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
    write_whole(path, data.data)
