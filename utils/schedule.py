"""Learning rate as a function of the iteration, and its scaling to another total batch."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Sequence

if TYPE_CHECKING:
    from data.config import Config


@dataclass(frozen=True)
class LearningRate:
    """Warm-up, then steps or half a cosine: `learning_rate(iteration)` with iterations from 0.

    A pure function of the iteration, so a resumed run needs no state. During warm-up (iterations
    below `warmup_until`) it grows linearly from `warmup_init`; iteration `warmup_until` is the
    first at the full rate. A step takes effect at its own iteration: from iteration `lr_steps[n]`
    on the rate is `base_lr * gamma ** (n + 1)`.
    """

    base_lr: float
    """After warm-up."""
    max_iter: int
    """Iterations of the whole run, where the cosine ends."""
    schedule: str = "step"
    """`step` or `cosine`."""
    lr_steps: Sequence[int] = ()
    """Iterations of the steps, ascending."""
    gamma: float = 0.1
    """Factor of each step."""
    warmup_init: float = 0.0
    """Rate at iteration 0."""
    warmup_until: int = 0
    """Iterations of warm-up; 0 for none."""
    final_factor: float = 0.0
    """The cosine ends at this fraction of `base_lr`."""

    @classmethod
    def from_config(cls, config: Config, total_batch: int, autoscale: bool = True,
                    epoch_size: int = 0) -> LearningRate:
        """Schedule of a recipe for `total_batch` images an iteration on all cards.

        With `autoscale` the rate grows with the batch and iterations shrink (rounded down), so that
        the number of images seen stays. Warm-up, its length and its first rate, stays as it is.

        A length in epochs, of `epoch_size` iterations each, replaces that in iterations: the rate's
        steps keep their places in proportion. The warm-up keeps its iterations, for it is the
        network that needs them, but takes a tenth of the run at most.
        """
        lr, max_iter, lr_steps = config.lr, config.max_iter, config.lr_steps
        warmup_until = config.lr_warmup_until
        if autoscale:
            lr *= total_batch / config.batch_size
        if config.epochs:
            max_iter = config.epochs * epoch_size
            lr_steps = tuple(step * max_iter // config.max_iter for step in lr_steps)
            warmup_until = min(warmup_until, max_iter // 10)
        elif autoscale:
            max_iter = max(1, max_iter * config.batch_size // total_batch)
            lr_steps = tuple(step * config.batch_size // total_batch for step in lr_steps)
        return cls(lr, max_iter, schedule=config.schedule, lr_steps=lr_steps, gamma=config.gamma,
                   warmup_init=config.lr_warmup_init, warmup_until=warmup_until,
                   final_factor=config.lr_final_factor)

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

    def state_dict(self) -> dict[str, Any]:
        """All arguments as plain types: a resumed run compares them with its own."""
        return dict(vars(self), lr_steps=list(self.lr_steps))
