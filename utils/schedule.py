"""Learning rate as a function of the iteration, and its scaling to another total batch."""

from __future__ import annotations

import bisect
import math
from typing import Any, Dict, NamedTuple, Sequence, Tuple


class Scaled(NamedTuple):
    """Learning rate and iterations for a total batch other than the recipe's."""

    lr: float
    max_iter: int
    lr_steps: Tuple[int, ...]


def autoscaled(lr: float, max_iter: int, lr_steps: Sequence[int], batch_size: int,
               total_batch: int) -> Scaled:
    """Scale a recipe given for `batch_size` to `total_batch` images an iteration over all cards.

    The learning rate grows with the batch, iterations shrink (rounded down), so that the number of
    images seen stays. Warm-up, its length and its first learning rate, stays as it is.
    """
    if total_batch < 1:
        raise ValueError(f"total_batch is {total_batch}, expected at least 1")
    factor = total_batch / batch_size
    return Scaled(lr * factor, max(1, max_iter * batch_size // total_batch),
                  tuple(step * batch_size // total_batch for step in lr_steps))


class LearningRate:
    """Warm-up, then steps or half a cosine: `learning_rate(iteration)` with iterations from 0.

    A pure function of the iteration, so a resumed run needs no state. During warm-up (iterations
    below `warmup_until`) it grows linearly from `warmup_init`; iteration `warmup_until` is the
    first at the full rate. A step takes effect at its own iteration: from iteration `lr_steps[n]`
    on the rate is `base_lr * gamma ** (n + 1)`.

    Args:
        base_lr: rate after warm-up.
        max_iter: iterations of the whole run, where the cosine ends.
        schedule: "step" or "cosine".
        lr_steps: iterations of the steps, ascending.
        gamma: factor of each step.
        warmup_init: rate at iteration 0.
        warmup_until: iterations of warm-up; 0 for none.
        final_factor: the cosine ends at this fraction of `base_lr`.

    Raises:
        ValueError: unknown schedule, or steps that do not ascend.
    """

    def __init__(self, base_lr: float, max_iter: int, schedule: str = "step",
                 lr_steps: Sequence[int] = (), gamma: float = 0.1, warmup_init: float = 0.0,
                 warmup_until: int = 0, final_factor: float = 0.0) -> None:
        if schedule not in ("step", "cosine"):
            raise ValueError(f"schedule is {schedule!r}, expected 'step' or 'cosine'")
        if list(lr_steps) != sorted(lr_steps):
            raise ValueError(f"lr_steps do not ascend: {list(lr_steps)}")
        self.base_lr = base_lr
        self.max_iter = max_iter
        self.schedule = schedule
        self.lr_steps = tuple(lr_steps)
        self.gamma = gamma
        self.warmup_init = warmup_init
        self.warmup_until = warmup_until
        self.final_factor = final_factor

    @classmethod
    def from_config(cls, config: Any, total_batch: int, autoscale: bool = True) -> LearningRate:
        """Schedule of a `data.config.Config` for `total_batch` images an iteration on all cards.

        With `autoscale`, rate and iterations are scaled from `config.batch_size` to it.
        """
        scaled = Scaled(config.lr, config.max_iter, tuple(config.lr_steps))
        if autoscale:
            scaled = autoscaled(*scaled, batch_size=config.batch_size, total_batch=total_batch)
        return cls(scaled.lr, scaled.max_iter, schedule=config.schedule, lr_steps=scaled.lr_steps,
                   gamma=config.gamma, warmup_init=config.lr_warmup_init,
                   warmup_until=config.lr_warmup_until, final_factor=config.lr_final_factor)

    def __call__(self, iteration: int) -> float:
        """Learning rate of `iteration`, counted from 0."""
        if iteration < self.warmup_until:
            progress = iteration / self.warmup_until
            return self.warmup_init + (self.base_lr - self.warmup_init) * progress
        if self.schedule == "step":
            return self.base_lr * self.gamma ** bisect.bisect_right(self.lr_steps, iteration)
        length = max(1, self.max_iter - self.warmup_until)
        progress = min(1.0, (iteration - self.warmup_until) / length)
        final = self.base_lr * self.final_factor
        return final + (self.base_lr - final) * 0.5 * (1 + math.cos(math.pi * progress))

    def state_dict(self) -> Dict[str, Any]:
        """All arguments as plain types: a resumed run compares them with its own."""
        state = dict(vars(self))
        state["lr_steps"] = list(self.lr_steps)
        return state
