"""Which input side an iteration trains on, where a run takes several in turn."""

from __future__ import annotations

from typing import Sequence

import numpy as np

_SIDE_STREAM = 2 ** 32 - 2
"""Takes the place of an image's index where a side is drawn; see `data.loader`."""


class SideSchedule:
    """Side of the network's input by iteration: drawn anew every `interval` iterations.

    A pure function of the seed and the iteration, so that all processes agree and a resumed run
    goes on exactly. The device meets as many sets of shapes as there are sides.

    Args:
        sides: to choose from.
        interval: iterations that keep a side.
        seed: of the run.
    """

    def __init__(self, sides: Sequence[int], interval: int, seed: int) -> None:
        self.sides = tuple(sides)
        self.interval = interval
        self.seed = seed

    def __call__(self, iteration: int) -> int:
        """Side of `iteration`, counted from the start of the training."""
        stretch = iteration // self.interval
        rng = np.random.default_rng([self.seed, stretch, _SIDE_STREAM])
        return self.sides[int(rng.integers(len(self.sides)))]
