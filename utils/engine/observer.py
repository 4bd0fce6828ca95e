"""What a training shows of itself while it runs: log lines, speed, the progress bar.

Nothing here asks the device for anything between two log lines.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Sequence,
)

import torch

from data.batch import Batch
from utils.device import memory_reserved, synchronize
from utils.distributed.failures import FIRST_FACTOR, WatchedLoader, time_limit
from utils.engine.learner import Learner
from utils.engine.records import Report, StepRecords
from utils.progress import ProgressBar, duration, step_parts

UNHURRIED_STEPS = 10
"""After the start and after a pause; other processes may still be at what the pause was for."""


class Mark(NamedTuple):
    """A moment of a training."""

    steps: int
    seconds: float

    def seconds_per_step(self, since: Mark) -> float:
        """Mean of the steps between two moments; 0 where there are none."""
        steps = self.steps - since.steps
        return (self.seconds - since.seconds) / steps if steps > 0 else 0.0


class StepClock:
    """Counts steps, and the seconds that they take; `clock` is for tests."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._began = clock, clock()
        self.steps = 0

    def now(self) -> Mark:
        """Steps and seconds since the beginning, without pauses."""
        return Mark(self.steps, self._clock() - self._began)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        before = self._clock()
        yield
        self._began += self._clock() - before


def format_line(epoch: int, iteration: int, losses: Mapping[str, float], total: float, eta: str,
                seconds: float, fps: float, average_fps: float, rank: int) -> str:
    """One log line, byte for byte as ModelZoo's YOLACT prints it."""
    shown = " ".join(f"{name}: {value:.3f} |" for name, value in losses.items())
    return (f"[{epoch:3d}] {iteration:7d} || {shown} T: {total:.3f} || ETA: {eta} || timer: "
            f"{seconds:.3f} || fps: {fps:.3f} || avg_fps: {average_fps:.3f} || GPU: {rank}")


class Progress(NamedTuple):
    """What a log line says, and the values for the other records."""

    lines: List[str]
    values: Dict[str, Any]
    report: Report


class Observer:
    """Measures the loop: losses, mean and recent speed, waits for data; draws the progress bar.

    Args:
        loader: the batches; `watched` is to be iterated in its place.
        records: gets a row for each step.
        device: of this process.
        rank: of this process; the bar is drawn by rank 0.
        start: iteration that this session goes on from.
        max_iter: iteration at which the schedule ends.
        epoch_size: iterations in an epoch.
        images_per_step: of all cards.
        fps_start: steps of this session left out of the mean speed.
        loader_timeout: seconds that a batch may take; 0 waits for ever.
        step_timeout: seconds that a step may take; 0 waits for ever.
        quiet: no bar, and no log line among a progress's lines.
    """

    def __init__(self, loader: Iterable[Any], records: StepRecords, device: torch.device,
                 rank: int, start: int, max_iter: int, epoch_size: int, images_per_step: int,
                 fps_start: int, loader_timeout: float, step_timeout: float = 0,
                 quiet: bool = False) -> None:
        self.watched: WatchedLoader = WatchedLoader(loader, loader_timeout, rank)
        self._records, self._device, self._rank = records, device, rank
        self._start, self._max_iter, self._epoch_size = start, max_iter, epoch_size
        self._images, self._fps_start = images_per_step, fps_start
        self._clock = StepClock()
        self._first = self._last_line = self._clock.now()
        self._window = Mark(fps_start, self._first.seconds)
        self._bar = ProgressBar(max_iter, sys.stderr, beside=sys.stdout,
                                enabled=rank == 0 and not quiet)
        self._quiet = quiet
        self._first_waited = 0.0
        self._step_timeout, self._resumed_at = step_timeout, 0

    @property
    def images_per_second(self) -> float:
        """Mean as of the last log line; 0 where too few iterations were run to measure it.

        ModelZoo's definition: steps x global batch / wall time, with data loading and checkpoint
        saving inside; the first `fps_start` steps (compilation, warm-up) and validations are
        outside.
        """
        seconds = self._last_line.seconds_per_step(self._window)
        return self._images / seconds if seconds else 0.0

    def step_limit(self, iteration: int) -> ContextManager[None]:
        """Ends the process where a step takes too long: in a run of several processes all wait for
        one that hangs. The first ones, and those after a pause, may take longer.
        """
        limit = self._step_timeout
        if self._clock.steps - self._resumed_at < UNHURRIED_STEPS:
            limit *= FIRST_FACTOR
        return time_limit(limit, self._rank, f"iteration {iteration} was not done after {limit:g} "
                          "s (--step_timeout); a card or a process of this run hangs")

    def step(self, done: int, losses: Dict[str, torch.Tensor], micro_batches: Sequence[Batch],
             learner: Learner) -> None:
        """Count a finished step; the bar is drawn from what the host knows."""
        self._records.add(done - 1, losses, learner.optimizer.step_finite,
                          torch.cat([batch.image_ids for batch in micro_batches]),
                          learner.precision.used_scale)
        self._clock.steps += 1
        if self._bar.is_due:
            now = self._clock.now()
            waited = (self.watched.seconds - self._first_waited) / max(
                now.steps - self._first.steps, 1)
            self._bar.show(done, step_parts(
                self._max_iter - done, now.seconds_per_step(self._first), waited,
                memory_reserved(self._device)))
        if self._clock.steps == self._fps_start:
            synchronize(self._device)
            self._window = self._clock.now()

    def progress(self, done: int, lr: float) -> Progress:
        """Fetch the losses (this waits for the device) and put the log line together."""
        self._bar.clear()
        report = self._records.report()
        now, epoch = self._clock.now(), (done - 1) // self._epoch_size
        seconds, self._last_line = now.seconds_per_step(self._last_line), now
        fps, average = self._images / seconds if seconds else 0.0, self.images_per_second
        eta = duration((self._max_iter - done) * now.seconds_per_step(self._first))
        line = format_line(epoch, done, report.losses, report.total, eta, seconds, fps, average,
                           self._rank)
        values = {"epoch": epoch, "iteration": done, "lr": lr, "losses": report.losses,
                  "total": report.total, "skipped": self._records.total_skipped,
                  "seconds": seconds, "data_seconds": self.watched.mean_since_last(), "fps": fps,
                  "avg_fps": average, "memory": memory_reserved(self._device),
                  "loss_scale": report.scale}
        if done == self._start + 1:
            # It compiles and allocates, and says nothing of the others.
            self._first, self._first_waited = now, self.watched.seconds
        lines = [] if self._quiet else [line]
        return Progress(lines + [step.sentence() for step in report.skipped], values, report)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        self._bar.clear()
        synchronize(self._device)
        with self._clock.paused():
            yield
        self._resumed_at = self._clock.steps

    def finish(self) -> str:
        """Remove the bar; returns a sentence about the waits for data."""
        self._bar.clear()
        return self.watched.sentence()
