"""What happened in the last steps, kept on the device until a log line is due.

Asking the device for a loss in every step would stall it. Each step leaves one row in a ring on
the device; a log line fetches the ring with one small copy and reads everything from that.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

WINDOW = 100
"""Steps that the printed averages run over, as in the original."""


class SkippedStep(NamedTuple):
    """A step whose update was not applied, because a loss or a gradient was not finite."""

    iteration: int
    image_ids: Tuple[int, ...]
    losses: Dict[str, float]

    def sentence(self) -> str:
        """One line for the log; avoids the words that log readers search for."""
        values = ", ".join("{}: {}".format(key, value) for key, value in self.losses.items()
                           if not np.isfinite(value))
        return "iteration {}: {} not finite; update skipped on every card; image ids {}".format(
            self.iteration, "loss ({})".format(values) if values else "gradient",
            ", ".join(str(image_id) for image_id in self.image_ids))


class Report(NamedTuple):
    """What a log line says of the steps so far.

    `losses` and `total` are means over the last `WINDOW` steps that were applied (NaN if none was);
    `skipped` are the steps skipped since the last report; `in_a_row` is the longest run of skipped
    steps that touches the steps since the last report.
    """

    losses: Dict[str, float]
    total: float
    skipped: List[SkippedStep]
    in_a_row: int


class StepRecords:
    """Ring of the last `WINDOW` steps' losses and whether their update was applied."""

    def __init__(self) -> None:
        self._names: List[str] = []
        self._ring: Optional[Tensor] = None
        self._steps = 0
        self._since_report: Deque[Tuple[int, Tensor]] = deque(maxlen=WINDOW)
        self._run = 0
        self.total_skipped = 0

    def add(self, iteration: int, losses: Dict[str, Tensor], applied: Tensor,
            image_ids: Tensor) -> None:
        """Record a step without asking the device for anything.

        Args:
            iteration: number of the step.
            losses: 0-d tensors by name; the names must be the same in every step.
            applied: 0-d bool, False where the optimiser left the parameters alone.
            image_ids: `[B]` on the host.
        """
        row = torch.stack([value.detach().float() for value in losses.values()] + [applied.float()])
        if self._ring is None:
            self._names = list(losses)
            self._ring = torch.zeros(WINDOW, len(row), dtype=torch.float32, device=row.device)
        self._ring[self._steps % WINDOW].copy_(row)
        self._steps += 1
        self._since_report.append((iteration, image_ids))

    def report(self) -> Report:
        """Fetch the ring (this waits for the device) and sum up; at most `WINDOW` steps apart."""
        if self._ring is None:
            return Report({}, float("nan"), [], 0)
        ring = self._ring.cpu().numpy()
        first = max(0, self._steps - WINDOW)
        rows = ring[[step % WINDOW for step in range(first, self._steps)]]
        recent = rows[len(rows) - len(self._since_report):]

        skipped, longest = [], 0
        for (iteration, image_ids), row in zip(self._since_report, recent):
            self._run = 0 if row[-1] else self._run + 1
            longest = max(longest, self._run)
            if not row[-1]:
                losses = dict(zip(self._names, row[:-1].tolist()))
                skipped.append(SkippedStep(iteration, tuple(image_ids.tolist()), losses))
        self._since_report.clear()
        self.total_skipped += len(skipped)

        means = self._means(rows[rows[:, -1] > 0])
        return Report(means, sum(means.values()), skipped, longest)

    def _means(self, applied: np.ndarray) -> Dict[str, float]:
        if not len(applied):
            return {name: float("nan") for name in self._names}
        return dict(zip(self._names, applied[:, :-1].astype(np.float64).mean(axis=0).tolist()))

    def state_dict(self) -> Dict[str, object]:
        """Plain types and a CPU tensor, so that averages go on after a resume."""
        return {"names": self._names, "ring": None if self._ring is None else self._ring.cpu(),
                "steps": self._steps, "run": self._run, "total_skipped": self.total_skipped}

    def load_state_dict(self, state: Dict, device: torch.device) -> None:
        """Put back what `state_dict` returned."""
        self._names = list(state["names"])
        self._ring = None if state["ring"] is None else state["ring"].to(device)
        self._steps, self._run = state["steps"], state["run"]
        self.total_skipped = state["total_skipped"]


def total_of(losses: Dict[str, Tensor]) -> Tensor:
    """Sum of the weighted losses, a 0-d tensor."""
    values: Sequence[Tensor] = list(losses.values())
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
