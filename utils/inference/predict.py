"""Run a predictor over images, a video or a camera: what eval.py does with --image and the like.

What fails on the way (an image that cannot be read, a broken frame, a full disk) is said, counted
and left out; the rest goes on.
"""

from __future__ import annotations

import itertools
import os
from contextlib import closing
from typing import Callable, Iterable, Iterator, List, Optional, Sequence, TextIO, Tuple

import cv2
import numpy as np

from data.image import read_image
from utils.drawing import draw_corner_text
from utils.errors import UserError
from utils.files import refuse_unwritable, refuse_unwritable_file
from utils.inference.detector import Item, StageTimes
from utils.inference.outputs import (
    RESULTS,
    ImageFile,
    PredictionOptions,
    PredictionOutput,
    find_images,
    output_pair,
    split_pair,
)
from utils.inference.predictor import Predictor
from utils.inference.video import (
    Frame,
    VideoReader,
    VideoWriter,
    read_ahead,
    refuse_window,
    show_in_window,
)
from utils.parsing import whole_number
from utils.progress import ProgressBar

_PIXELS_IN_BATCH = 64_000_000
"""A batch is closed early when its images reach this: bounds the memory."""

EXIT_FAILURES = 1


class PredictionRun:
    """One run of a predictor.

    Args:
        predictor: finds the objects.
        options: what is shown and written.
        say: prints a line of the result.
        warn: prints a line about something that failed.
        stream: for progress.
    """

    def __init__(self, predictor: Predictor, options: PredictionOptions,
                 say: Callable[[str], None], warn: Callable[[str], None],
                 stream: TextIO) -> None:
        self.predictor, self.options = predictor, options
        self.say, self.warn, self.stream = say, warn, stream
        self.times = StageTimes()

    def image(self, value: str) -> int:
        """`--image=IN[:OUT]`; an image that cannot be read or written is a `UserError`."""
        source, target = output_pair(value, ".png")
        refuse_unwritable_file(target)
        output = self._start(os.path.splitext(target)[0], strict=True)
        self._draw_files([ImageFile(source, target, 1)], output)
        return self._end(f"{output.objects} objects drawn in {target}", output,
                         speed=self.options.benchmark)

    def images(self, value: str) -> int:
        """`--images=FOLDER[:OUT]`."""
        files, folder, others = find_images(value)
        self.say(f"{len(files)} images" + (f", {others} other files left out" if others else ""))
        refuse_unwritable(folder)
        output = self._start(os.path.join(folder, "predictions"), os.path.join(folder, "crops"))
        interrupted: Optional[KeyboardInterrupt] = None
        try:
            self._draw_files(files, output)
        except KeyboardInterrupt as stop:  # what was found so far is written
            interrupted = stop
        code = self._end(f"{output.images} of {len(files)} images drawn in {folder}, "
                         f"{output.objects} objects", output)
        if interrupted is not None:
            raise interrupted
        return code

    def video(self, value: str) -> int:
        """`--video=IN[:OUT]`: a file or a camera, into a file or, from a camera only, a window."""
        source, target = split_pair(value)
        if whole_number(source) is None:
            source, target = output_pair(value, ".mp4")
        if target is None:
            refuse_window(source)
        else:
            refuse_unwritable_file(target)
        with closing(VideoReader(source)) as reader:
            output = self._start(os.path.splitext(
                target or os.path.join(RESULTS, "camera" + source))[0])
            shown = _Frames(reader, target)
            interrupted: Optional[KeyboardInterrupt] = None
            try:
                self._draw_frames(reader, shown, output)
            except KeyboardInterrupt as stop:
                interrupted = stop
            finally:
                is_whole = output.attempt(shown.close)
            if not self.times.images and interrupted is None:
                raise UserError(f"{source}: no frame of it can be decoded; it may be incomplete, "
                                "or in a format that this OpenCV cannot read")
            if reader.missing:
                output.fail(UserError(
                    f"{source}: the last {reader.missing} of {reader.total} frames cannot be "
                    "read; the file may be incomplete"), reader.missing)
            place = f" drawn in {target}" if target is not None and is_whole else ""
            code = self._end(f"{self.times.images} frames{place}, {output.objects} objects", output)
            # Ctrl-C is how a recording ends.
            if interrupted is not None and not reader.is_camera:
                raise interrupted
            return code

    def _start(self, stem: str, crops_folder: str = "", strict: bool = False) -> PredictionOutput:
        """Start the clock and whatever is written beside the images."""
        if self.options.json:
            refuse_unwritable_file(stem + ".json")
        if self.options.benchmark:
            self.predictor.warm_up()
        self.times = StageTimes(self.predictor.synchronize if self.options.benchmark else None)
        return PredictionOutput(self.options, self.warn, self.times, stem + ".json",
                                crops_folder or stem + "_crops", strict)

    def _draw_files(self, files: Sequence[ImageFile], output: PredictionOutput) -> None:
        def readable() -> Iterator[Tuple[ImageFile, np.ndarray]]:
            for file in files:
                try:
                    yield file, read_image(file.source)
                except UserError as error:
                    output.fail(error)

        with closing(read_ahead(readable())) as ahead, closing(self.predictor.find(
                self._batches(ahead), self.times, self._progress(len(files)))) as found:
            for file, prediction in found:
                output.write(prediction, file)

    def _draw_frames(self, reader: VideoReader, shown: _Frames, output: PredictionOutput) -> None:
        """Draw until the end, or until the user leaves the window."""
        before = 0
        with closing(read_ahead(reader)) as ahead, closing(self.predictor.find(
                self._batches((frame, frame.image) for frame in itertools.takewhile(
                    lambda frame: not shown.left, ahead)),
                self.times, self._progress(reader.total))) as found:
            for frame, prediction in found:
                for lost in range(before + 1, frame.number):
                    output.fail(UserError(f"{reader.source}: frame {lost} cannot be decoded"))
                drawn = output.draw(prediction, frame.number, f"{frame.number:06d}")
                if self.options.speed:
                    draw_corner_text(drawn, f"{self.times.images_per_second():.1f} fps")
                with self.times.stage("writing"):
                    shown.add(drawn, frame, lost=frame.number - before - 1)
                before = frame.number

    def _progress(self, total: int) -> ProgressBar:
        return ProgressBar(total, self.stream, enabled=self.options.show_progress and total != 1)

    def _batches(self, items: Iterable[Tuple[Item, np.ndarray]]
                 ) -> Iterator[List[Tuple[Item, np.ndarray]]]:
        batch: List[Tuple[Item, np.ndarray]] = []
        pixels = 0
        for item, image in items:
            batch.append((item, image))
            pixels += image.size // 3
            if len(batch) >= self.predictor.batch_size or pixels > _PIXELS_IN_BATCH:
                yield batch
                batch, pixels = [], 0
        if batch:
            yield batch

    def _end(self, sentence: str, output: PredictionOutput, speed: bool = True) -> int:
        """Write the JSON file and say what was done; returns the exit code."""
        for line in [sentence] + output.close():
            self.say(line)
        if speed:
            self.say(self.times.sentence(stages=self.options.benchmark))
        if output.failed:
            self.say(f"{output.failed} failed")
            return EXIT_FAILURES
        return 0


class _Frames:
    """The drawn frames of a video in order, on their way into a file or a window.

    A frame that could not be decoded is replaced by the last one, so that the video keeps its
    length. From a camera a frame is written as often as the time since the last one demands.
    """

    def __init__(self, reader: VideoReader, target: Optional[str]) -> None:
        self._reader, self._target = reader, target
        self._writer: Optional[VideoWriter] = None
        self._last: Optional[np.ndarray] = None
        self._start = 0.0
        self.left = False
        """Whether the user has closed the window."""

    def add(self, drawn: np.ndarray, frame: Frame, lost: int) -> None:
        """Write and show a frame, before which so many were lost."""
        if self._target is None:
            self.left = self.left or not show_in_window(drawn)
            return
        if self._writer is None:
            self._writer = VideoWriter(self._target, self._reader.fps, drawn.shape[1::-1])
            self._start = frame.seconds
        times = 1
        if self._reader.is_camera:
            due = int(round((frame.seconds - self._start) * self._reader.fps)) + 1
            times = max(due - self._writer.frames, 0)
        elif self._last is not None:
            self._writer.write(self._last, lost)
        self._writer.write(drawn, times)
        self._last = drawn

    def close(self) -> None:
        """Finish the file; a `UserError` if it lacks frames."""
        if self._target is None:
            cv2.destroyAllWindows()
        if self._writer is not None:
            self._writer.close()
