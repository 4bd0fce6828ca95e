"""What a training remembers: the last steps' losses, the steps skipped, the best validation.

The last decides on `best.pth` and on stopping early. All of it is in a checkpoint's state.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

WINDOW = 100
"""Steps that the printed averages run over, as in the original."""


class SkippedStep(NamedTuple):
    """A step whose update was not applied, because a loss or a gradient was not finite.

    `scale` is what the loss was multiplied by, None where it was not; `next_scale` is the lower
    scale that answers an overflow of the gradients, None where none can.
    """

    iteration: int
    image_ids: Tuple[int, ...]
    losses: Dict[str, float]
    scale: Optional[float] = None
    next_scale: Optional[float] = None

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
    """What a log line says of the steps so far.

    `losses` and `total` are means over the last `WINDOW` steps that were applied (NaN if none was);
    `skipped` are the steps skipped since the last report; `in_a_row` is the longest run of skipped
    steps that touches the steps since the last report, without those that a lower loss scale
    answers. `scale` is that of the last step, None without one.
    """

    losses: Dict[str, float]
    total: float
    skipped: List[SkippedStep]
    in_a_row: int
    scale: Optional[float] = None


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
        self._names: List[str] = []
        self._ring: Optional[Tensor] = None
        self._steps = 0
        self._since_report: Deque[Tuple[int, Tensor]] = deque(maxlen=WINDOW)
        self._run = 0
        self.total_skipped = 0

    def add(self, iteration: int, losses: Dict[str, Tensor], applied: Tensor,
            image_ids: Tensor, scale: Optional[Tensor] = None) -> None:
        """Record a step without asking the device for anything.

        Args:
            iteration: number of the step.
            losses: 0-d tensors by name; the names must be the same in every step.
            applied: 0-d bool, False where the optimiser left the parameters alone.
            image_ids: `[B]`; a report reads those of skipped steps.
            scale: 0-d, what the loss was multiplied by; in every step or in none.
        """
        values = [value.detach().float() for value in losses.values()]
        row = torch.stack(values + [applied.float()] + ([] if scale is None else [scale]))
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
                iteration, tuple(image_ids.tolist()), dict(zip(self._names, row.tolist())),
                scale[0] if scale else None,
                max(scale[0] / 2, self._scale_floor) if by_scale else None))
        self._since_report.clear()
        self.total_skipped += len(skipped)

        means = self._means(rows[rows[:, count] > 0])
        last_scale = float(rows[-1, count + 1]) if rows.shape[1] > count + 1 else None
        return Report(means, sum(means.values()), skipped, longest, last_scale)

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

    def _means(self, applied: np.ndarray) -> Dict[str, float]:
        if not len(applied):
            return {name: float("nan") for name in self._names}
        return dict(zip(self._names, applied.astype(np.float64).mean(axis=0).tolist()))

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


@dataclass
class BestScore:
    """Best average precision of masks over the validations of a training.

    Attributes:
        mask_ap: best average precision of masks, in [0, 1]; None before the first validation, and
            where no validation image had ground truth.
        box_ap: that of boxes in the same validation.
        iteration: steps done when the best validation ran.
        since: validations that have followed the best one, none of them better.
    """

    mask_ap: Optional[float] = None
    box_ap: Optional[float] = None
    iteration: int = 0
    since: int = 0

    def update(self, iteration: int, mask_ap: Optional[float], box_ap: Optional[float]) -> bool:
        """Take the scores of a validation; returns whether they are the best so far.

        The first validation is the best one whatever it scored; of equal ones the first stays.
        """
        if self.iteration and not _value(mask_ap) > _value(self.mask_ap):
            self.since += 1
            return False
        self.mask_ap, self.box_ap = mask_ap, box_ap
        self.iteration, self.since = int(iteration), 0
        return True

    def consider(self, iteration: int, mask_ap: float, box_ap: Optional[float]) -> None:
        """Take the scores that eval.py found for an iteration, if they are the best.

        They are rounded, as results.csv has them: an equal score is not a better one.
        """
        if iteration != self.iteration and mask_ap > _value(self.mask_ap) + 1e-6:
            self.mask_ap, self.box_ap, self.iteration = mask_ap, box_ap, iteration

    def state_dict(self) -> Dict[str, Any]:
        """Plain types, for the state of training."""
        return asdict(self)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for name in asdict(self):
            setattr(self, name, state[name])


def _value(score: Optional[float]) -> float:
    """A score to compare by: none, and one that is no number, are below all others."""
    return -1.0 if score is None or score != score else float(score)
