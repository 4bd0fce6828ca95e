"""Prior boxes: the anchors of every position of every pyramid level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from data.config import Config


def make_priors(config: Config) -> Tensor:
    """Priors of `config`: float32 `[P,4]` cx, cy, w, h relative to the input."""
    return anchor_grid(config.feature_sizes, config.pred_scales, config.pred_aspect_ratios,
                       config.max_size, config.use_square_anchors)


def anchor_grid(feature_sizes: Sequence[int], scales: Sequence[Sequence[float]],
                aspect_ratios: Sequence[float], input_size: int, square: bool) -> Tensor:
    """Anchors centred on the cells of each level.

    Args:
        feature_sizes: side of each level's feature map, finest first.
        scales: anchor sides in pixels for each level.
        aspect_ratios: width over height, the same for all levels.
        input_size: S, side of the network input in pixels.
        square: height := width. The original's base recipes have this by an oversight that
            published weights depend on.

    Returns:
        float32 `[P,4]` cx, cy, w, h relative to the input, by level, row, column, scale, ratio.
    """
    roots = np.sqrt(np.asarray(aspect_ratios, dtype=np.float64))
    levels = []
    for size, sides in zip(feature_sizes, scales):
        sides_column = np.asarray(sides, dtype=np.float64)[:, None]
        width = (sides_column * roots / input_size).ravel()
        height = width if square else (sides_column / roots / input_size).ravel()
        centers = (np.arange(size) + 0.5) / size
        grid = np.empty((size, size, width.size, 4))
        grid[..., 0] = centers[None, :, None]
        grid[..., 1] = centers[:, None, None]
        grid[..., 2] = width
        grid[..., 3] = height
        levels.append(grid.reshape(-1, 4))
    return torch.from_numpy(np.concatenate(levels).astype(np.float32))
