from __future__ import annotations

import torch

from data.config import get_config, list_configs
from layers.anchors import anchor_grid, make_priors


def test_order_is_level_row_column_scale_ratio():
    priors = anchor_grid((2, 1), ((10, 20), (40, 80)), (1, 4), input_size=100, square=False)
    assert priors.shape == (4 * 4 + 4, 4)
    expected = torch.tensor([[.25, .25, .1, .1], [.25, .25, .2, .05],
                             [.25, .25, .2, .2], [.25, .25, .4, .1]])
    assert torch.allclose(priors[:4], expected)
    assert torch.allclose(priors[4, :2], torch.tensor([.75, .25]))  # the next column
    assert torch.allclose(priors[8, :2], torch.tensor([.25, .75]))  # the next row
    assert torch.allclose(priors[16], torch.tensor([.5, .5, .4, .4]))  # the next level


def test_square_anchors_repeat_their_width():
    priors = anchor_grid((3,), ((24,),), (1, .5, 2), input_size=48, square=True)
    assert torch.equal(priors[:, 2], priors[:, 3])
    assert torch.allclose(priors[:3, 2], torch.tensor([.5, .5 * .5 ** .5, .5 * 2 ** .5]))


def test_number_of_priors_of_every_recipe():
    for name in list_configs():
        config = get_config(name)
        expected = sum(size * size for size in config.feature_sizes) * config.num_anchors
        assert make_priors(config).shape == (expected, 4)
