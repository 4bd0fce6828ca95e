"""Batches of images on their way through a network: stage times, host and device side by side."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Tuple, TypeVar

import cv2
import numpy as np
from torch import Tensor

from utils.progress import ImageProgress

T = TypeVar("T")

B = TypeVar("B", bound="ImageBatch")


@dataclass
class ImageBatch:
    """Images of the network's size, and what they were before; n <= B of them are real."""

    images: Tensor
    """uint8 `[B, 3, S, S]`, RGB; those from n on are black."""
    image_ids: List[int]
    """n COCO image ids."""
    sizes: List[Tuple[int, int]]
    """n heights and widths in pixels of the stored images."""


def to_network_input(image_bgr: np.ndarray, side: int) -> np.ndarray:
    """Resize `[h, w, 3]` BGR to planes `[3, side, side]` RGB, uint8; the aspect is not kept."""
    resized = cv2.resize(image_bgr, (side, side), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized[:, :, ::-1].transpose(2, 0, 1))


class StageTimes:
    """Wall time of the stages of a loop, from construction on.

    Args:
        synchronize: called at the end of each stage, so that work queued on the device is counted
            where it was queued; None leaves the device alone and the stages overlap.

    Attributes:
        seconds: by stage, in the order in which they first ended.
        images: finished; counted by the user of the object.
    """

    def __init__(self, synchronize: Optional[Callable[[], None]] = None) -> None:
        self._synchronize = synchronize
        self.seconds: Dict[str, float] = {}
        self.images = 0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        start = time.perf_counter()
        yield
        if self._synchronize is not None:
            self._synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def watch(self, name: str, source: Iterable[T]) -> Iterator[T]:
        """Iterate `source`, adding the time spent waiting for it to stage `name`."""
        iterator = iter(source)
        while True:
            with self.stage(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def images_per_second(self) -> float:
        """Images finished since the start over the time since then."""
        return self.images / max(time.perf_counter() - self._start, 1e-9)

    def sentence(self, stages: bool) -> str:
        """Speed since the start, with `stages` also the time of each stage per image."""
        text = (f"{self.images} images in {time.perf_counter() - self._start:.1f} s: "
                f"{self.images_per_second():.2f} images/s")
        if not stages:
            return text
        return text + "; ms per image: " + ", ".join(
            f"{name} {1000 * seconds / max(self.images, 1):.1f}"
            for name, seconds in self.seconds.items())


def run_pipelined(batches: Iterable[B], launch: Callable[[Tensor], T],
                  finish: Callable[[B, T], None], times: StageTimes,
                  progress: ImageProgress) -> None:
    """Finish each batch after the next one is launched: the device and the host work together.

    Args:
        batches: consumed once.
        launch: queues work for images `[B, 3, S, S]` and returns without waiting for it.
        finish: takes a batch and what `launch` returned for its images.
        times: counts the images; waiting for `batches` is its stage "loading".
        progress: shown after each batch.
    """
    before: Optional[Tuple[B, T]] = None

    def finish_before() -> None:
        if before is not None:
            finish(*before)
            times.images += len(before[0].image_ids)
            progress.show_images(times.images, times.images_per_second())

    for batch in times.watch("loading", batches):
        launched = launch(batch.images)
        finish_before()
        before = batch, launched
    finish_before()
