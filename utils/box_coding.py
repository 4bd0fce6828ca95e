"""SSD's box coding (Liu et al., 2016), once for NumPy arrays and tensors.

The network tells a box by its offset from a prior: the centre's in sizes of the prior, the size as
a logarithm, each divided by a variance. `data.matching` and `layers.box_ops` do not know each other
and agree here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Tuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = TypeVar("Array", np.ndarray, Tensor)

CENTER_VARIANCE = 0.1
SIZE_VARIANCE = 0.2


def encode_parts(center: Array, size: Array, priors_cxcywh: Array,
                 log: Callable[[Array], Array]) -> Tuple[Array, Array]:
    """Targets of boxes against priors `[.., 4]`.

    Args:
        center: `[.., 2]` cx cy of the boxes; `size` likewise their w h, above 0.
        size: see `center`.
        priors_cxcywh: cx cy w h, relative to the image as the boxes are.
        log: `numpy.log` or `torch.log`.

    Returns:
        `[.., 2]` offsets of the centre and `[.., 2]` of the size.
    """
    prior_center, prior_size = priors_cxcywh[..., :2], priors_cxcywh[..., 2:]
    return ((center - prior_center) / (prior_size * CENTER_VARIANCE),
            log(size / prior_size) / SIZE_VARIANCE)


def decode_parts(loc: Array, priors_cxcywh: Array,
                 exp: Callable[[Array], Array]) -> Tuple[Array, Array]:
    """Centre and size `[.., 2]` of the boxes that `loc` `[.., 4]` tells; undoes `encode_parts`."""
    prior_center, prior_size = priors_cxcywh[..., :2], priors_cxcywh[..., 2:]
    return (prior_center + loc[..., :2] * (prior_size * CENTER_VARIANCE),
            prior_size * exp(loc[..., 2:] * SIZE_VARIANCE))
