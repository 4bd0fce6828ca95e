"""What a training shows of itself while it runs: log lines, speed, the progress bar.

Nothing here asks the device for anything between two log lines.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Sequence

import torch

from data.batch import Batch
from utils.device import memory_reserved, synchronize
from utils.distributed.failures import WatchedLoader
from utils.engine.learner import Learner
from utils.engine.log import StepTimer, Throughput, format_line
from utils.engine.records import Report, StepRecords
from utils.progress import ProgressBar, StepPace


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
    """

    def __init__(self, loader: Iterable[Any], records: StepRecords, device: torch.device,
                 rank: int, start: int, max_iter: int, epoch_size: int, images_per_step: int,
                 fps_start: int, loader_timeout: float) -> None:
        self.watched: WatchedLoader = WatchedLoader(loader, loader_timeout, rank)
        self._records, self._device, self._rank = records, device, rank
        self._start, self._max_iter, self._epoch_size = start, max_iter, epoch_size
        self._throughput = Throughput(images_per_step, fps_start)
        self._timer = StepTimer()
        self._bar = ProgressBar(max_iter, sys.stderr, beside=sys.stdout, enabled=rank == 0)
        self._pace = StepPace(start)
        if fps_start == 0:
            self._throughput.start()

    @property
    def images_per_second(self) -> float:
        """Mean; 0 where too few iterations were run to measure it."""
        return self._throughput.average()

    def step(self, done: int, losses: Dict[str, torch.Tensor], micro_batches: Sequence[Batch],
             learner: Learner) -> None:
        """Count a finished step; the bar is drawn from what the host knows."""
        self._records.add(done - 1, losses, learner.optimizer.step_finite,
                          torch.cat([batch.image_ids for batch in micro_batches]),
                          learner.precision.used_scale)
        self._throughput.step()
        self._timer.step()
        if self._bar.is_due:
            self._bar.show(done, self._pace.parts(done, self._max_iter, self.watched.seconds,
                                                  memory_reserved(self._device)))
        if self._throughput.at_edge:
            synchronize(self._device)
            self._throughput.start()

    def progress(self, done: int, lr: float) -> Progress:
        """Fetch the losses (this waits for the device) and put the log line together."""
        self._bar.clear()
        report = self._records.report()
        self._timer.update()
        epoch, seconds = (done - 1) // self._epoch_size, self._timer.recent
        fps = self._throughput.images_per_step / seconds if seconds else 0.0
        average = self._throughput.average()
        line = format_line(epoch, done, report.losses, report.total,
                           self._timer.eta(self._max_iter - done), seconds, fps, average,
                           self._rank)
        values = {"epoch": epoch, "iteration": done, "lr": lr, "losses": report.losses,
                  "total": report.total, "skipped": self._records.total_skipped,
                  "seconds": seconds, "data_seconds": self.watched.mean_since_last(), "fps": fps,
                  "avg_fps": average, "memory": memory_reserved(self._device),
                  "loss_scale": report.scale}
        if done == self._start + 1:
            # It compiles and allocates, and says nothing of the others.
            self._timer.restart()
            self._pace = StepPace(done, self.watched.seconds)
        return Progress([line] + [step.sentence() for step in report.skipped], values, report)

    @contextlib.contextmanager
    def stopped(self, done: int) -> Iterator[None]:
        """Leave out the time spent inside."""
        self._bar.clear()
        synchronize(self._device)
        self._throughput.pause()
        yield
        self._throughput.resume()
        self._timer.skip()
        self._pace.restart(done, self.watched.seconds)

    def finish(self) -> str:
        """Remove the bar; returns a sentence about the waits for data."""
        self._bar.clear()
        return self.watched.sentence()
