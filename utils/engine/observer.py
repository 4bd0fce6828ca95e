"""What a training shows of itself while it runs: log lines, skipped steps, speed, the progress bar.

Nothing here asks the device for anything between two log lines.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from typing import Any, Callable, ContextManager, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from utils.device import memory_reserved, synchronize
from utils.distributed.failures import FIRST_FACTOR, WatchedLoader, time_limit
from utils.progress import ProgressBar, duration, step_parts

WINDOW = 100
"""Steps that the printed averages run over, as in the original."""
UNHURRIED_STEPS = 10
"""After the start and after a pause; other processes may still be at what the pause was for."""


class SkippedStep(NamedTuple):
    """A step whose update was not applied, because a loss or a gradient was not finite.

    `scale` is what the loss was multiplied by, None where it was not; `next_scale` is the lower
    scale that answers an overflow of the gradients, None where none can.
    """

    iteration: int
    image_ids: tuple[int, ...]
    losses: dict[str, float]
    scale: float | None = None
    next_scale: float | None = None

    def sentence(self) -> str:
        """One line for the log; avoids the words that log readers search for."""
        if self.scale is not None and self.next_scale is not None:
            return (f"iteration {self.iteration}: gradient overflow at scale {self.scale:g}, the "
                    f"scale is now {self.next_scale:g}; update skipped on every card")
        values = ", ".join(f"{key}: {value}" for key, value in self.losses.items()
                           if not np.isfinite(value))
        what = f"loss ({values})" if values else "gradient"
        if self.scale is not None and not values:
            what = f"gradient at loss scale {self.scale:g}"
        return (f"iteration {self.iteration}: {what} not finite; update skipped on every card; "
                f"image ids {', '.join(map(str, self.image_ids))}")


class Report(NamedTuple):
    """What a log line says of the steps so far."""

    losses: dict[str, float]
    """Means over the last `WINDOW` steps that were applied; NaN if none was."""
    total: float
    skipped: list[SkippedStep]
    """Since the last report."""
    in_a_row: int
    """Longest run of skipped steps that touches those since the last report, without steps that a
    lower loss scale answers."""
    scale: float | None = None
    """Of the last step."""


class StepRecords:
    """Ring of the last `WINDOW` steps' losses and whether their update was applied.

    Args:
        scale_floor: loss scale at which overflows of the gradients count as not finite.
        on_any_card: adds a tensor up over all cards. Called by `report`, on all cards or on none:
            only one card may have seen the loss that was not finite, but all have to stop alike.
    """

    def __init__(self, scale_floor: float = math.inf,
                 on_any_card: Callable[[Tensor], Tensor] = lambda flags: flags) -> None:
        self._scale_floor = scale_floor
        self._on_any_card = on_any_card
        self._names: list[str] = []
        # Rows one behind the other, the newest last: steps shift them, without any number that
        # changes from one to the next.
        self._ring: Tensor | None = None
        self._steps = 0
        self._since_report: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=WINDOW)
        self._run = 0
        self.total_skipped = 0

    def add(self, losses: dict[str, Tensor], applied: Tensor, scale: Tensor | None = None) -> None:
        """Queue the record of a step on the device; `count` follows.

        All are 0-d, without a gradient, and the same in every step: the losses by name, `applied`,
        0 where the optimiser left the parameters alone, and what the loss was multiplied by.
        """
        row = [value.float() for value in losses.values()] + [applied.float()]
        row += [] if scale is None else [scale]
        if self._ring is None:
            self._names = list(losses)
            self._ring = torch.zeros(WINDOW * len(row), device=applied.device)
        self._ring.copy_(torch.cat([self._ring[len(row):], torch.stack(row)]))

    def count(self, iteration: int, image_ids: tuple[int, ...]) -> None:
        """Count a step that was recorded, of number `iteration`, with its images."""
        self._steps += 1
        self._since_report.append((iteration, image_ids))

    def report(self) -> Report:
        """Fetch the ring (this waits for the device) and sum up; at most `WINDOW` steps apart."""
        if self._ring is None:
            return Report({}, float("nan"), [], 0)
        rows = self._ring.cpu().numpy().reshape(WINDOW, -1)[-min(self._steps, WINDOW):]
        recent = rows[len(rows) - len(self._since_report):]
        count = len(self._names)
        answered = self._answered(recent)

        skipped, longest = [], 0
        for (iteration, image_ids), row, by_scale in zip(self._since_report, recent, answered):
            applied, scale = bool(row[count]), row[count + 1:].tolist()
            if applied:
                self._run = 0
                continue
            self._run += not by_scale
            longest = max(longest, self._run)
            skipped.append(SkippedStep(
                iteration, image_ids, dict(zip(self._names, row.tolist())),
                scale[0] if scale else None,
                max(scale[0] / 2, self._scale_floor) if by_scale else None))
        self._since_report.clear()
        self.total_skipped += len(skipped)

        applied_rows = rows[rows[:, count] > 0, :count].astype(np.float64)
        none = np.full(count, np.nan)
        means = (applied_rows.mean(axis=0) if len(applied_rows) else none).tolist()
        last_scale = float(rows[-1, count + 1]) if rows.shape[1] > count + 1 else None
        return Report(dict(zip(self._names, means)), sum(means), skipped, longest, last_scale)

    def take_back(self, count: int) -> None:
        """Forget the last steps, which were skipped and reported: they come again."""
        assert self._ring is not None
        size = count * len(self._ring) // WINDOW
        self._ring.copy_(torch.cat([self._ring.new_zeros(size), self._ring[:-size]]))
        self._steps -= count
        self._run = max(0, self._run - count)
        self.total_skipped -= count

    def _answered(self, rows: np.ndarray) -> np.ndarray:
        """Which of the steps were skipped for an overflow that a lower scale answers, `[steps]`."""
        count = len(self._names)
        if rows.shape[1] == count + 1:
            return np.zeros(len(rows), bool)
        overflows = (rows[:, count] == 0) & (rows[:, count + 1] > self._scale_floor)
        if not overflows.any():  # the same on all cards, as verdict and scale are
            return overflows
        assert self._ring is not None
        bad_losses = torch.from_numpy(~np.isfinite(rows[:, :count]).all(axis=1)).float()
        on_any_card = self._on_any_card(bad_losses.to(self._ring.device)).cpu().numpy()
        return overflows & (on_any_card == 0)

    def state_dict(self) -> dict[str, object]:
        """Plain types and a CPU tensor, so that averages go on after a resume."""
        return {"names": self._names, "ring": self._turned(self._ring, self._steps),
                "steps": self._steps, "run": self._run, "total_skipped": self.total_skipped}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Put back what `state_dict` returned."""
        self._names = list(state["names"])
        self._steps, self._run = state["steps"], state["run"]
        ring = self._turned(state["ring"], -self._steps)
        self._ring = None if ring is None else ring.reshape(-1).to(device)
        self.total_skipped = state["total_skipped"]

    @staticmethod
    def _turned(ring: Tensor | None, steps: int) -> Tensor | None:
        """In files the row of step n is the n-th, modulo `WINDOW`."""
        return None if ring is None else ring.cpu().reshape(WINDOW, -1).roll(steps % WINDOW, 0)


class Mark(NamedTuple):
    """A moment of a training: steps since its beginning, and seconds without pauses."""

    steps: int
    seconds: float

    def seconds_per_step(self, since: Mark) -> float:
        """Mean of the steps between two moments; 0 where there are none."""
        steps = self.steps - since.steps
        return (self.seconds - since.seconds) / steps if steps > 0 else 0.0


def format_line(epoch: int, iteration: int, losses: Mapping[str, float], total: float, eta: str,
                seconds: float, fps: float, average_fps: float, rank: int) -> str:
    """One log line, byte for byte as ModelZoo's YOLACT prints it."""
    shown = " ".join(f"{name}: {value:.3f} |" for name, value in losses.items())
    return (f"[{epoch:3d}] {iteration:7d} || {shown} T: {total:.3f} || ETA: {eta} || timer: "
            f"{seconds:.3f} || fps: {fps:.3f} || avg_fps: {average_fps:.3f} || GPU: {rank}")


class Progress(NamedTuple):
    """What a log line says, and the values for the other records."""

    lines: list[str]
    values: dict[str, Any]
    report: Report


class Observer:
    """Measures the loop: losses, mean and recent speed, waits for data; draws the progress bar.

    Args:
        loader: the batches; `watched` is to be iterated in its place.
        records: has a row for each step.
        device, rank: of this process; the bar is drawn by rank 0.
        start, max_iter: iterations that this session goes on from and that the schedule ends at.
        epoch_size: iterations in an epoch.
        images_per_step: of all cards.
        fps_start: steps of this session left out of the mean speed.
        loader_timeout, step_timeout: seconds that a batch and a step may take; 0 waits for ever.
        quiet: no bar, and no log line among a progress's lines.
    """

    def __init__(self, loader: Iterable[Any], records: StepRecords, device: torch.device, rank: int,
                 start: int, max_iter: int, epoch_size: int, images_per_step: int, fps_start: int,
                 loader_timeout: float, step_timeout: float = 0, quiet: bool = False) -> None:
        self.watched: WatchedLoader = WatchedLoader(loader, loader_timeout, rank)
        self._records, self._device, self._rank = records, device, rank
        self._start, self._max_iter, self._epoch_size = start, max_iter, epoch_size
        self._images, self._fps_start = images_per_step, fps_start
        self._began, self._steps = time.perf_counter(), 0
        self._first = self._last_line = self._now()
        self._window = Mark(fps_start, self._first.seconds)
        self._bar = ProgressBar(max_iter, sys.stderr, beside=sys.stdout,
                                enabled=rank == 0 and not quiet)
        self._quiet = quiet
        self._first_waited = 0.0
        self._step_timeout, self._resumed_at = step_timeout, 0

    def _now(self) -> Mark:
        return Mark(self._steps, time.perf_counter() - self._began)

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
        if self._steps - self._resumed_at < UNHURRIED_STEPS:
            limit *= FIRST_FACTOR
        return time_limit(limit, self._rank, f"iteration {iteration} was not done after {limit:g} "
                          "s (--step_timeout); a card or a process of this run hangs")

    def step(self, done: int, micro_batches: Sequence[Batch]) -> None:
        """Count a finished step; the bar is drawn from what the host knows."""
        self._records.count(done - 1, tuple(
            number for batch in micro_batches for number in batch.image_ids.tolist()))
        self._steps += 1
        if self._bar.is_due:
            now = self._now()
            waited = (self.watched.seconds - self._first_waited) / max(
                now.steps - self._first.steps, 1)
            self._bar.show(done, step_parts(
                self._max_iter - done, now.seconds_per_step(self._first), waited,
                memory_reserved(self._device)))
        if self._steps == self._fps_start:
            synchronize(self._device)
            self._window = self._now()

    def progress(self, done: int, lr: float) -> Progress:
        """Fetch the losses (this waits for the device) and put the log line together."""
        self._bar.clear()
        report = self._records.report()
        now, epoch = self._now(), (done - 1) // self._epoch_size
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
        before = time.perf_counter()
        yield
        self._began += time.perf_counter() - before
        self._resumed_at = self._steps

    def finish(self) -> str:
        """Remove the bar; returns a sentence about the waits for data."""
        self._bar.clear()
        return self.watched.sentence()
