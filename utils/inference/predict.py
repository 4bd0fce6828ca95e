"""Run a predictor over images, a video or a camera: what eval.py does with --image and the like.

What fails on the way (an image that cannot be read, a broken frame, a full disk) is said, counted
and left out; the rest goes on.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, Callable, Deque, Iterable, Iterator, List, Optional, TextIO, Tuple

import numpy as np
from torch import Tensor

from utils.drawing import draw_corner_text
from utils.errors import UserError
from utils.inference.detector import PendingDetections
from utils.inference.outputs import (
    RESULTS,
    Failures,
    ImageFile,
    PredictionOptions,
    PredictionOutput,
    find_images,
    output_pair,
    split_pair,
    write_image,
)
from utils.inference.pipeline import ImageBatch, StageTimes, run_pipelined
from utils.inference.predictor import Predictor
from utils.inference.video import Frame, VideoReader, VideoWriter, Window, read_ahead
from utils.progress import ImageProgress

_PIXELS_IN_BATCH = 64_000_000
"""A batch is closed early when its images reach this: bounds the memory."""

EXIT_FAILURES = 1


@dataclass
class SourceBatch(ImageBatch):
    """Network input, and what it was made from."""

    entries: List[Any] = field(default_factory=list)
    """`ImageFile` or `Frame` of each, also of those that could not be read."""
    read: List[np.ndarray] = field(default_factory=list)
    """The images that could be read, as they were."""


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
        self.predictor, self.options, self.say, self.stream = predictor, options, say, stream
        self.failures = Failures(warn)
        self.times = StageTimes()

    def image(self, value: str) -> int:
        """`--image=IN[:OUT]`; an image that cannot be read or written is a `UserError`."""
        source, target = output_pair(value, ".png")
        stem = os.path.splitext(target)[0]
        output = self._start(stem + ".json", stem + "_crops")
        with self.times.stage("loading"):
            image = self.predictor.read(source)
        found = self.predictor.collect(self._launch(self.predictor.planes([image])), [image],
                                       self.times, [source])[0]
        drawn = output.draw(found, 1, os.path.basename(stem))
        with self.times.stage("writing"):
            write_image(target, drawn)
        self.times.images = 1
        return self._end(f"{output.objects} objects drawn in {target}", output,
                         speed=self.options.benchmark)

    def images(self, value: str) -> int:
        """`--images=FOLDER[:OUT]`."""
        files, folder, others = find_images(value, self.predictor.suffixes)
        self.say(f"{len(files)} images" + (f", {others} other files left out" if others else ""))
        output = self._start(os.path.join(folder, "predictions.json"),
                             os.path.join(folder, "crops"))
        progress = self._progress(len(files))

        def finish(batch: SourceBatch, pending: PendingDetections) -> None:
            found = self.predictor.collect(pending, batch.read, self.times,
                                           [file.source for file in batch.entries])
            for file, prediction in zip(batch.entries, found):
                output.write(prediction, file)

        with closing(read_ahead(_read_all(self.predictor.read, files))) as ahead:
            run_pipelined(self._batches(self._readable(ahead)), self._launch, finish, self.times,
                          progress)
        progress.finish_images(self.times.images, self.times.images_per_second())
        return self._end(f"{output.images} of {len(files)} images drawn in {folder}, "
                         f"{output.objects} objects", output)

    def video(self, value: str) -> int:
        """`--video=IN[:OUT]`: a file or a camera, into a file or, from a camera only, a window."""
        source, target = split_pair(value)
        if not source.isdigit():
            source, target = output_pair(value, ".mp4")
        with ExitStack() as stack:
            window = stack.enter_context(Window("YOLACT", source)) if target is None else None
            reader = VideoReader(source)
            stack.callback(reader.close)
            stem = os.path.splitext(target or os.path.join(RESULTS, "camera" + source))[0]
            output = self._start(stem + ".json", stem + "_crops")
            frames = _Frames(reader, output, self, target, window)
            progress = self._progress(reader.total)
            interrupted = False
            try:
                with closing(read_ahead(reader)) as ahead:
                    batches = self._batches(
                        (frame.image, frame) for frame in frames.until_left(ahead))
                    run_pipelined(batches, self._launch, frames.finish, self.times, progress)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                frames.close()
            if reader.missing:
                self.failures.report(UserError(
                    f"{source}: the last {reader.missing} of {reader.total} frames cannot be "
                    "read; the file may be incomplete"), reader.missing)
            progress.finish_images(self.times.images, self.times.images_per_second())
            place = "" if target is None or frames.is_incomplete else f" drawn in {target}"
            code = self._end(f"{self.times.images} frames{place}, {output.objects} objects", output)
            # Ctrl-C is how a recording ends.
            if interrupted and not reader.is_camera:
                raise KeyboardInterrupt
            return code

    def _start(self, json_path: str, crops_folder: str) -> PredictionOutput:
        """Start the clock and whatever is written beside the images."""
        if self.options.benchmark:
            self.predictor.warm_up()
        self.times = StageTimes(self.predictor.synchronize if self.options.benchmark else None)
        return PredictionOutput(self.options, self.failures, self.times, json_path, crops_folder)

    def _progress(self, total: int) -> ImageProgress:
        return ImageProgress(total, self.stream, enabled=self.options.show_progress,
                             failed=lambda: self.failures.count)

    def _launch(self, planes: Tensor) -> PendingDetections:
        return self.predictor.launch(planes, self.times)

    def _readable(self, read: Iterable[Tuple[Any, ImageFile]]) -> Iterator[Tuple[Any, ImageFile]]:
        for image, file in read:
            if isinstance(image, UserError):
                self.failures.report(image)
            else:
                yield image, file

    def _batches(self, images: Iterable[Tuple[Optional[np.ndarray], Any]]) -> Iterator[SourceBatch]:
        entries: List[Any] = []
        read: List[np.ndarray] = []
        for image, entry in images:
            entries.append(entry)
            if image is not None:
                read.append(image)
            if (len(entries) >= self.predictor.batch_size
                    or sum(image.size // 3 for image in read) > _PIXELS_IN_BATCH):
                yield self._batch(entries, read)
                entries, read = [], []
        if entries:
            yield self._batch(entries, read)

    def _batch(self, entries: List[Any], read: List[np.ndarray]) -> SourceBatch:
        return SourceBatch(self.predictor.planes(read), list(range(len(read))),
                           [(image.shape[0], image.shape[1]) for image in read], entries, read)

    def _end(self, sentence: str, output: PredictionOutput, speed: bool = True) -> int:
        """Write the JSON file and say what was done; returns the exit code."""
        records = output.close()
        self.say(sentence)
        if records is not None:
            self.say(records)
        if speed:
            self.say(self.times.sentence(stages=self.options.benchmark))
        if self.failures.count:
            self.say(f"{self.failures.count} failed")
            return EXIT_FAILURES
        return 0


def _read_all(read: Callable[[str], np.ndarray],
              files: Iterable[ImageFile]) -> Iterator[Tuple[Any, ImageFile]]:
    """Images as arrays, or the error that reading them gave."""
    for file in files:
        try:
            yield read(file.source), file
        except UserError as error:
            yield error, file


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
        self._left = False
        self.is_incomplete = False

    def until_left(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Pass frames on until the user leaves the window."""
        for frame in frames:
            if self._left:
                return
            yield frame

    def finish(self, batch: SourceBatch, pending: PendingDetections) -> None:
        """Draw the frames of a batch."""
        found = iter(self._run.predictor.collect(pending, batch.read, self._run.times))
        for frame in batch.entries:
            self._number += 1
            if frame.image is None:
                self._run.failures.report(UserError(f"{self._reader.source}: frame {self._number} "
                                                    "cannot be decoded"))
            else:
                self._last = self._output.draw(next(found), self._number, f"{self._number:06d}")
                self._write_speed(self._last)
            if self._last is not None:
                with self._run.times.stage("writing"):
                    self._show(self._last, frame.seconds)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self.is_incomplete = not self._run.failures.attempt(self._writer.close)

    def _write_speed(self, drawn: np.ndarray) -> None:
        self._ended.append(time.perf_counter())
        if self._run.options.speed and len(self._ended) > 1:
            spent = self._ended[-1] - self._ended[0]
            draw_corner_text(drawn, f"{(len(self._ended) - 1) / max(spent, 1e-9):.1f} fps")

    def _show(self, drawn: np.ndarray, seconds: float) -> None:
        if self._window is not None:
            self._left = self._left or not self._window.show(drawn)
        if self._target is None:
            return
        if self._writer is None:
            self._writer = VideoWriter(self._target, self._reader.fps, drawn.shape[1::-1])
            self._start = seconds
        times = 1
        if self._reader.is_camera:
            due = int(round((seconds - self._start) * self._reader.fps)) + 1
            times = max(due - self._writer.frames, 0)
        self._writer.write(drawn, times)
