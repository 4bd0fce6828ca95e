"""Run a predictor over pictures, a video or a camera: what eval.py does with --image and the like.

What fails on the way (a picture that cannot be read, a broken frame, a full disk) is said, counted
and left out; the rest goes on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Deque, Iterable, Iterator, List, Optional, Tuple

import numpy as np

from utils.drawing import draw_corner_text
from utils.errors import UserError
from utils.inference.outputs import (
    DrawingChoice,
    Failures,
    Picture,
    PredictionOutput,
    find_pictures,
    image_pair,
    split_pair,
    video_pair,
    write_picture,
)
from utils.inference.pipeline import ImageBatch, StageTimes, run_pipelined
from utils.inference.video import Frame, Prefetch, VideoReader, VideoWriter, Window
from utils.progress import ImageProgress

if TYPE_CHECKING:
    from utils.inference.predictor import Predictor

_PIXELS_IN_BATCH = 64_000_000
"""A batch is closed early when its pictures reach this: bounds the memory."""

EXIT_FAILURES = 1


@dataclass
class PictureBatch(ImageBatch):
    """Network input, and what it was made from."""

    pictures: List[Optional[np.ndarray]] = field(default_factory=list)
    """In order, as read; None where there was nothing to read. The others are in `images`."""
    entries: List[Any] = field(default_factory=list)
    """A `Picture` or `Frame` for each of `pictures`."""


class _Progress(ImageProgress):
    """Counts what failed as done."""

    def __init__(self, total: int, stream: Any, enabled: bool, failures: Failures) -> None:
        super().__init__(total, stream, enabled=enabled)
        self._failures = failures

    def counted(self, done: int) -> int:
        return min(done + self._failures.count, self.total) if self.total else done


@dataclass
class PredictionRun:
    """One run as the command line asks for it.

    Attributes:
        predictor: finds the objects.
        args: as from `utils.inference.eval_flags`.
        say: prints a line of the result.
        warn: prints a line about something that failed.
        stream: for progress.
    """

    predictor: Predictor
    args: argparse.Namespace
    say: Callable[[str], None]
    warn: Callable[[str], None]
    stream: Any

    def __post_init__(self) -> None:
        args = self.args
        self.failures = Failures(self.warn)
        self.choice = DrawingChoice(args.top_k, args.score_threshold, args.display_masks,
                                    args.display_bboxes, args.display_text, args.display_scores)
        self.times = StageTimes()

    def start(self, json_path: str, crops_folder: str) -> PredictionOutput:
        """Start the clock and whatever is written beside the pictures."""
        if self.args.benchmark:
            self.predictor.warm_up()
        self.times = StageTimes(self.predictor.synchronize if self.args.benchmark else None)
        return PredictionOutput(
            self.choice, self.failures, self.times, json_path if self.args.output_json else None,
            self.args.json_masks == "polygon", crops_folder if self.args.crops else None)

    def image(self) -> int:
        """--image: one picture; one that cannot be read or written is a `UserError`."""
        source, target = image_pair(self.args.image)
        stem = os.path.splitext(target)[0]
        output = self.start(stem + ".json", stem + "_crops")
        with self.times.stage("loading"):
            picture = self.predictor.read(source)
        prediction = self.predictor.collect(
            self.predictor.launch(self.predictor.planes([picture]), self.times), [picture],
            self.times, [source])[0]
        shown = self.choice.select(prediction)
        with self.times.stage("drawing"):
            drawn = self.choice.draw(shown)
        with self.times.stage("writing"):
            write_picture(target, drawn)
        output.records(shown, 1, os.path.basename(stem))
        output.close()
        self.times.images = 1
        return self._end(f"{output.objects} objects drawn in {target}", output)

    def images(self) -> int:
        """--images: the pictures of a folder."""
        pictures, folder, others = find_pictures(self.args.images, self.predictor.suffixes)
        self.say("{} pictures{}".format(len(pictures), "" if not others else
                                        f", {others} other files left out"))
        output = self.start(os.path.join(folder, "predictions.json"),
                            os.path.join(folder, "crops"))
        progress = _Progress(len(pictures), self.stream, not self.args.no_bar, self.failures)

        def finish(batch: ImageBatch, launched: Any) -> None:
            assert isinstance(batch, PictureBatch)
            found = self.predictor.collect(launched, _present(batch), self.times,
                                           [entry.source for entry in batch.entries])
            for entry, prediction in zip(batch.entries, found):
                output.picture(prediction, entry.image_id, entry.target)

        with Prefetch(_read_all(self.predictor.read, pictures)) as read:
            batches = self._batches(self._readable(read))
            run_pipelined(batches, self._launch, finish, self.times, progress)
        progress.finish_images(self.times.images, self.times.images_per_second())
        output.close()
        return self._end(f"{output.pictures} of {len(pictures)} pictures drawn in {folder}, "
                         f"{output.objects} objects", output)

    def video(self) -> int:
        """--video: a file or a camera, into a file or, from a camera only, a window."""
        source, target = video_pair(self.args.video)
        with ExitStack() as stack:
            window = None
            if target is None:
                window = stack.enter_context(Window("YOLACT", source))
            reader = VideoReader(source)
            stem = os.path.splitext(target or os.path.join("results", "camera" + source))[0]
            output = self.start(stem + ".json", stem + "_crops")
            frames = _Frames(reader, output, self, target, window)
            progress = _Progress(reader.total, self.stream, not self.args.no_bar, self.failures)
            interrupted = False
            try:
                with Prefetch(reader, 2 if not reader.is_camera else 1, reader.is_camera) as ahead:
                    batches = self._batches(
                        (frame.image, frame) for frame in frames.until_left(ahead))
                    run_pipelined(batches, self._launch, frames.finish, self.times, progress)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                reader.close()
                frames.close()
                output.close()
            if reader.missing:
                self.failures.report(UserError(f"{source}: the last {reader.missing} of "
                                               f"{reader.total} frames cannot be read; the file "
                                               "may be incomplete"),
                                     reader.missing)
            progress.finish_images(self.times.images, self.times.images_per_second())
            place = ("" if target is None or frames.is_incomplete
                     else f" drawn in {target}")
            code = self._end(f"{self.times.images} frames{place}, {output.objects} objects", output)
            # Ctrl-C is how a recording ends.
            if interrupted and not reader.is_camera:
                raise KeyboardInterrupt
            return code

    def _launch(self, planes: Any) -> Any:
        return self.predictor.launch(planes, self.times)

    def _readable(self, read: Iterable[Tuple[Picture, Any]]) -> Iterator[Tuple[np.ndarray, Any]]:
        for entry, picture in read:
            if isinstance(picture, UserError):
                self.failures.report(picture)
            else:
                yield picture, entry

    def _batches(
            self, pictures: Iterable[Tuple[Optional[np.ndarray], Any]]) -> Iterator[PictureBatch]:
        waiting: List[Tuple[Optional[np.ndarray], Any]] = []
        pixels = 0
        for picture, entry in pictures:
            waiting.append((picture, entry))
            pixels += 0 if picture is None else picture.shape[0] * picture.shape[1]
            if len(waiting) >= self.predictor.batch_size or pixels > _PIXELS_IN_BATCH:
                yield self._batch(waiting)
                waiting, pixels = [], 0
        if waiting:
            yield self._batch(waiting)

    def _batch(self, waiting: List[Tuple[Optional[np.ndarray], Any]]) -> PictureBatch:
        pictures = [picture for picture, _ in waiting]
        present = [picture for picture in pictures if picture is not None]
        return PictureBatch(self.predictor.planes(present), list(range(len(present))),
                            [(picture.shape[0], picture.shape[1]) for picture in present],
                            pictures, [entry for _, entry in waiting])

    def _end(self, sentence: str, output: PredictionOutput) -> int:
        """Say what was done; returns the exit code."""
        self.say(sentence)
        if output.json is not None and not output.json.is_broken:
            self.say(f"{output.json.records} records in {output.json.path}")
        if self.args.images or self.args.video or self.args.benchmark:
            self.say(self.times.sentence(stages=self.args.benchmark))
        if self.failures.count:
            self.say(f"{self.failures.count} failed")
            return EXIT_FAILURES
        return 0


def predict(predictor: Predictor, args: argparse.Namespace, say: Callable[[str], None],
            warn: Callable[[str], None], stream: Any) -> int:
    """Do what --image, --images or --video asks for; returns the exit code."""
    run = PredictionRun(predictor, args, say, warn, stream)
    if args.image is not None:
        return run.image()
    return run.images() if args.images is not None else run.video()


def batch_size_of(args: argparse.Namespace) -> int:
    """How many pictures pass together."""
    if args.image is not None:
        return 1
    return int(args.video_multiframe if args.video is not None else args.batch_size)


def input_of(args: argparse.Namespace) -> Optional[str]:
    """What is predicted on instead of scoring a dataset: a path, or None.

    Raises:
        UserError: more than one of --image, --images and --video.
    """
    given = [name for name in ("image", "images", "video") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError("--{} and --{} exclude each other; give one of them".format(*given[:2]))
    return split_pair(getattr(args, given[0]))[0] if given else None


def _read_all(read: Callable[[str], np.ndarray],
              pictures: Iterable[Picture]) -> Iterator[Tuple[Picture, Any]]:
    """Pictures as arrays, or the error that reading them gave."""
    for picture in pictures:
        try:
            yield picture, read(picture.source)
        except UserError as error:
            yield picture, error


def _present(batch: PictureBatch) -> List[np.ndarray]:
    return [picture for picture in batch.pictures if picture is not None]


class _Frames:
    """Draws the frames of a video in order, into a file or a window.

    A frame that could not be decoded is replaced by the last one, so that the video keeps its
    length. From a camera a frame is written as often as the time since the last one demands.
    """

    def __init__(self, reader: VideoReader, output: PredictionOutput, run: PredictionRun,
                 target: Optional[str], window: Optional[Window]) -> None:
        self._reader, self._output, self._run = reader, output, run
        self._target, self._window = target, window
        self._writer: Optional[VideoWriter] = None
        self._last: Optional[np.ndarray] = None
        self._number = 0
        self._start = 0.0
        self._ended: Deque[float] = deque(maxlen=30)
        self.left = False
        self.is_incomplete = False

    def until_left(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Pass frames on until the user leaves the window."""
        for frame in frames:
            if self.left:
                return
            yield frame

    def finish(self, batch: ImageBatch, launched: Any) -> None:
        """Draw the frames of a batch."""
        assert isinstance(batch, PictureBatch)
        found = iter(self._run.predictor.collect(launched, _present(batch), self._run.times))
        for frame in batch.entries:
            self._number += 1
            if frame.image is None:
                self._run.failures.report(UserError(f"{self._reader.source}: frame {self._number} "
                                                    "cannot be decoded"))
                drawn = self._last
            else:
                drawn = self._output.frame(next(found), self._number)
                self._write_speed(drawn)
            if drawn is not None:
                with self._run.times.stage("writing"):
                    self._show(drawn, frame.seconds)
                self._last = drawn

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except UserError as error:
                self.is_incomplete = True
                self._run.failures.report(error)

    def _write_speed(self, drawn: np.ndarray) -> None:
        self._ended.append(time.perf_counter())
        if self._run.args.display_fps and len(self._ended) > 1:
            spent = self._ended[-1] - self._ended[0]
            draw_corner_text(drawn, f"{(len(self._ended) - 1) / max(spent, 1e-9):.1f} fps")

    def _show(self, drawn: np.ndarray, seconds: float) -> None:
        if self._window is not None:
            self.left = self.left or not self._window.show(drawn)
        if self._target is None:
            return
        if self._writer is None:
            self._writer = VideoWriter(self._target, self._reader.fps, drawn.shape[1::-1])
            self._start = seconds
        times = 1
        if self._reader.is_camera:
            due = int(round((seconds - self._start) * self._reader.fps)) + 1
            times = max(due - self._writer.frames, 0)
        try:
            self._writer.write(drawn, times)
        except UserError as error:
            self._run.failures.report(error)
