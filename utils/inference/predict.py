"""Run a predictor over images, a video or a camera: what eval.py does with --image and the like.

What fails on the way (an image that cannot be read, a broken frame, a full disk) is said, counted
and left out; the rest goes on.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import ExitStack, closing
from typing import Any, Callable, Deque, Iterable, Iterator, List, Optional, TextIO, Tuple, Union

import numpy as np
from torch import Tensor

from data.image import read_image
from utils.drawing import draw_corner_text
from utils.errors import UserError
from utils.inference.detector import PendingDetections, StageTimes, run_pipelined
from utils.inference.outputs import (
    RESULTS,
    ImageFile,
    PredictionOptions,
    PredictionOutput,
    find_images,
    output_pair,
    split_pair,
    write_image,
)
from utils.inference.predictor import Predictor
from utils.inference.video import Frame, VideoReader, VideoWriter, Window, read_ahead
from utils.progress import ProgressBar

_PIXELS_IN_BATCH = 64_000_000
"""A batch is closed early when its images reach this: bounds the memory."""

EXIT_FAILURES = 1

Item = Tuple[Any, Optional[np.ndarray]]
"""`ImageFile` or `Frame`, and its image; None for a frame that cannot be decoded."""


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
        stem = os.path.splitext(target)[0]
        output = self._start(stem)
        with self.times.stage("loading"):
            image = read_image(source)
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
        files, folder, others = find_images(value)
        self.say(f"{len(files)} images" + (f", {others} other files left out" if others else ""))
        output = self._start(os.path.join(folder, "predictions"), os.path.join(folder, "crops"))

        def finish(items: List[Item], pending: PendingDetections) -> None:
            images = [image for _, image in items if image is not None]
            found = self.predictor.collect(pending, images, self.times,
                                           [file.source for file, _ in items])
            for (file, _), prediction in zip(items, found):
                output.write(prediction, file)
            self.times.images += len(items)

        def readable(read: Iterable[Tuple[ImageFile, Union[np.ndarray, UserError]]]
                     ) -> Iterator[Item]:
            for file, image in read:
                if isinstance(image, UserError):
                    output.fail(image)
                else:
                    yield file, image

        with closing(read_ahead(_read_all(files))) as ahead:
            run_pipelined(self._batches(readable(ahead)), self._launch, finish, self.times,
                          self._progress(len(files)))
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
            output = self._start(os.path.splitext(
                target or os.path.join(RESULTS, "camera" + source))[0])
            frames = _Frames(reader, output, self, target, window)
            interrupted = False
            try:
                with closing(read_ahead(reader)) as ahead:
                    run_pipelined(self._batches(frames.until_left(ahead)), self._launch,
                                  frames.finish, self.times, self._progress(reader.total))
            except KeyboardInterrupt:
                interrupted = True
            finally:
                is_whole = frames.close()
            if reader.missing:
                output.fail(UserError(
                    f"{source}: the last {reader.missing} of {reader.total} frames cannot be "
                    "read; the file may be incomplete"), reader.missing)
            place = f" drawn in {target}" if target is not None and is_whole else ""
            code = self._end(f"{self.times.images} frames{place}, {output.objects} objects", output)
            # Ctrl-C is how a recording ends.
            if interrupted and not reader.is_camera:
                raise KeyboardInterrupt
            return code

    def _start(self, stem: str, crops_folder: str = "") -> PredictionOutput:
        """Start the clock and whatever is written beside the images."""
        if self.options.benchmark:
            self.predictor.warm_up()
        self.times = StageTimes(self.predictor.synchronize if self.options.benchmark else None)
        return PredictionOutput(self.options, self.warn, self.times, stem + ".json",
                                crops_folder or stem + "_crops")

    def _progress(self, total: int) -> ProgressBar:
        return ProgressBar(total, self.stream, enabled=self.options.show_progress)

    def _launch(self, planes: Tensor) -> PendingDetections:
        return self.predictor.launch(planes, self.times)

    def _batches(self, items: Iterable[Item]) -> Iterator[Tuple[Tensor, List[Item]]]:
        batch: List[Item] = []
        pixels = 0
        for item in items:
            batch.append(item)
            pixels += 0 if item[1] is None else item[1].size // 3
            if len(batch) >= self.predictor.batch_size or pixels > _PIXELS_IN_BATCH:
                yield self._batch(batch)
                batch, pixels = [], 0
        if batch:
            yield self._batch(batch)

    def _batch(self, items: List[Item]) -> Tuple[Tensor, List[Item]]:
        return self.predictor.planes([image for _, image in items if image is not None]), items

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


def _read_all(files: Iterable[ImageFile]
              ) -> Iterator[Tuple[ImageFile, Union[np.ndarray, UserError]]]:
    """Images as arrays, or the error that reading them gave."""
    for file in files:
        try:
            yield file, read_image(file.source)
        except UserError as error:
            yield file, error


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

    def until_left(self, frames: Iterable[Frame]) -> Iterator[Item]:
        """Pass frames on until the user leaves the window."""
        for frame in frames:
            if self._left:
                return
            yield frame, frame.image

    def finish(self, items: List[Item], pending: PendingDetections) -> None:
        """Draw the frames of a batch."""
        images = [image for _, image in items if image is not None]
        found = iter(self._run.predictor.collect(pending, images, self._run.times))
        for frame, image in items:
            self._number += 1
            if image is None:
                self._output.fail(UserError(f"{self._reader.source}: frame {self._number} cannot "
                                            "be decoded"))
            else:
                self._last = self._output.draw(next(found), self._number, f"{self._number:06d}")
                self._write_speed(self._last)
            if self._last is not None:
                with self._run.times.stage("writing"):
                    self._show(self._last, frame.seconds)
        self._run.times.images += len(images)

    def close(self) -> bool:
        """Finish the file; False if it lacks frames."""
        return self._writer is None or self._output.attempt(self._writer.close)

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
