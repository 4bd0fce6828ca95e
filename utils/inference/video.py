"""Videos and cameras: reading what can be read, writing so that failures are noticed."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generator, Iterable, Iterator, NamedTuple, TypeVar

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import open_temporary
from utils.parsing import whole_number

T = TypeVar("T")

_END = object()
_EXACT_COUNTS = (".mp4", ".m4v", ".mov", ".avi")
"""Containers that know how many frames they have; elsewhere OpenCV estimates."""
_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
_DEFAULT_FPS = 25.0
_ATTEMPTS = 30
"""Reads in a row that may fail before the rest of a file is given up."""


def read_ahead(source: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Iterate `source` in a thread of its own, `depth` items ahead.

    An exception in the thread is raised where the items are read, at its place in their order.
    Closing the generator ends the thread.
    """
    iterator = iter(source)
    with ThreadPoolExecutor(1, "read_ahead") as reader:
        ahead = deque(reader.submit(next, iterator, _END) for _ in range(depth))
        while True:
            item: Any = ahead.popleft().result()
            if item is _END:
                return
            ahead.append(reader.submit(next, iterator, _END))
            yield item


class Frame(NamedTuple):
    """One frame that could be decoded."""

    image: np.ndarray
    """uint8 `[h, w, 3]`, BGR."""
    seconds: float
    """When it was read, on a clock of its own."""
    number: int
    """From 1 on; those that could not be decoded are counted, too."""


class VideoReader:
    """Iterate the frames of a file or camera; single-threaded.

    Frames that cannot be decoded are left out; the numbers of the others tell. `source` is the path
    of a file, an address of a stream, or the number of a camera.

    Attributes:
        fps: frames per second of the video.
        total: frames the container says it has; 0 if that is not known.
        is_camera: no end is to be expected.
        missing: after the end: frames at the end that the container has and nobody could read.

    Raises:
        UserError: there is no such file or camera, or it is not a video.
    """

    def __init__(self, source: str) -> None:
        self.source, self.missing = source, 0
        camera = whole_number(source)
        self.is_camera = camera is not None
        is_stream = self.is_camera or "://" in source
        if not is_stream and not os.path.isfile(source):
            found = "is no video file" if os.path.exists(source) else "was not found"
            raise UserError(f"--video: {os.path.abspath(source)} {found}")
        self._capture = cv2.VideoCapture(source if camera is None else camera)
        if not self._capture.isOpened():
            hint = "is not a video that OpenCV can read; it may be incomplete"
            if is_stream:
                hint = "cannot be opened; is the address right, reachable, and a video?"
            if self.is_camera:
                hint = ("cannot be opened; is it connected, free, and may this user read "
                        f"/dev/video{source}?")
            raise UserError(f"{'camera ' if self.is_camera else ''}{source} {hint}")
        if self.is_camera:
            self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # frames as they are, not as they were
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else _DEFAULT_FPS
        total = 0 if is_stream else self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.total = int(total) if 0 < total < 1e9 else 0
        # An estimate may be a little too high.
        is_exact = os.path.splitext(source)[1].lower() in _EXACT_COUNTS
        self._tolerance = 0 if is_exact else 2 + self.total // 50

    def __iter__(self) -> Iterator[Frame]:
        done, failed = 0, 0
        while True:
            read, image = self._capture.read()
            if read:
                # Only what is followed by a good frame was broken; else it is the end.
                done, failed = done + failed + 1, 0
                yield Frame(image, time.monotonic(), done)
                continue
            failed += 1
            if done + failed > self.total or failed > _ATTEMPTS:
                break
        if self.total - done > self._tolerance:
            self.missing = self.total - done

    def close(self) -> None:
        """Let go of the file or camera."""
        self._capture.release()


class VideoWriter:
    """Write a video file that holds all of its frames, or say that it does not.

    The frames, which are resized to `size` (width and height), go to a temporary file beside the
    target, which takes its name at the end.

    Raises:
        UserError: the ending is unknown or the file cannot be opened. Leaving the `with` block
            raises it when frames are missing in the file, as on a full disk.
    """

    def __init__(self, path: str, fps: float, size: tuple[int, int]) -> None:
        ending = os.path.splitext(path)[1].lower()
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"cannot write a video to '{path}': it is no regular file")
        if ending not in _CODECS:
            raise UserError(f"cannot write a video to '{path}'; its name must end in one of "
                            f"{', '.join(_CODECS)}")
        self.path, self.frames = path, 0
        self._size = size
        try:
            self._held = open_temporary(os.path.realpath(path), ending)
        except OSError as error:
            raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
        self._temporary = self._held.name
        self._writer = cv2.VideoWriter(self._temporary, cv2.VideoWriter.fourcc(*_CODECS[ending]),
                                       fps, size)
        if not self._writer.isOpened():
            os.unlink(self._temporary)
            raise UserError(f"OpenCV cannot write '{path}' ({size[0]}x{size[1]} at {fps:g} "
                            "frames/s)")

    def write(self, frame: np.ndarray, times: int = 1) -> None:
        """Append a frame, uint8 `[h, w, 3]` BGR, `times` times."""
        if frame.shape[1::-1] != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        for _ in range(times):
            self._writer.write(frame)
        self.frames += times

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Finish the file and check it; a file without frames is removed."""
        self._writer.release()
        self._held.close()
        if not self.frames:
            os.unlink(self._temporary)
            return
        found = self._count()
        try:
            os.replace(self._temporary, os.path.realpath(self.path))
        except OSError as error:
            os.unlink(self._temporary)
            raise UserError(f"cannot write '{self.path}': {error.strerror or error}") from error
        if found < self.frames:
            # OpenCV does not report failing writes.
            free = shutil.disk_usage(os.path.dirname(os.path.abspath(self.path))).free
            raise UserError(f"{self.path} holds {found} of {self.frames} frames; {free / 1e6:.0f} "
                            "MB are free on its disk")

    def _count(self) -> int:
        """Frames of the finished file; 0 where it cannot be read at all."""
        capture = cv2.VideoCapture(self._temporary)
        found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        # The index is written last and may count what never reached the disk.
        capture.set(cv2.CAP_PROP_POS_FRAMES, max(found - 1, 0))
        is_last_there = capture.read()[0]
        capture.release()
        return found if is_last_there else max(found - 1, 0)


class FrameOutput:
    """The drawn frames of a video in order, on their way into a file or a window.

    A frame that could not be decoded is replaced by the last one, so that the video keeps its
    length. From a camera a frame is written as often as the time since the last one demands.
    """

    def __init__(self, reader: VideoReader, target: str | None) -> None:
        self._reader, self._target = reader, target
        self._writer: VideoWriter | None = None
        self._last: np.ndarray | None = None
        self._start = 0.0
        self.left = False
        """Whether the user has closed the window."""

    def add(self, drawn: np.ndarray, frame: Frame, lost: int) -> None:
        """Write and show a frame, before which so many were lost."""
        if self._target is None:
            if not self.left:
                cv2.imshow("YOLACT", drawn)
                self.left = cv2.waitKey(1) & 0xFF in (27, ord("q"))  # Esc, too
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


def window_problem() -> str:
    """Why no window can be shown here; empty if one can."""
    gui = re.search(r"^\s*GUI:\s*(\S+)", cv2.getBuildInformation(), re.MULTILINE)
    if gui is not None and gui.group(1) == "NONE":
        return "this OpenCV was built without windows (opencv-python-headless)"
    if sys.platform.startswith("linux") and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display (DISPLAY is not set)"
    return ""
