"""The best validation of a training so far, which decides on `best.pth` and on stopping early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional


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

    def state_dict(self) -> Dict[str, Any]:
        """Plain types, for the state of training."""
        return {"mask_ap": self.mask_ap, "box_ap": self.box_ap, "iteration": self.iteration,
                "since": self.since}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.mask_ap, self.box_ap = state["mask_ap"], state["box_ap"]
        self.iteration, self.since = int(state["iteration"]), int(state["since"])


def _value(score: Optional[float]) -> float:
    """A score to compare by: none, and one that is no number, are below all others."""
    return -1.0 if score is None or score != score else float(score)
