"""Factors on the confidence loss of each class's positives, from the configuration's setting."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple, Union

import numpy as np

from data.config import BALANCED
from utils.errors import UserError, nearest

LARGEST_FACTOR = 10.0
"""Balanced factors stay between this and its inverse: a class seen twice must not rule the loss."""

_SHOWN = 10


def class_factors(setting: Union[str, Tuple[Tuple[str, float], ...]], class_names: Sequence[str],
                  objects_per_class: Sequence[int]) -> Optional[List[float]]:
    """C factors, of the background (1) and of each class in order; None where all are 1.

    Args:
        setting: `Config.class_weights`.
        class_names: of the training data, without background.
        objects_per_class: their numbers of objects; `balanced` divides by them.

    Raises:
        UserError: the setting names a class that the data does not have.
    """
    if not setting:
        return None
    if setting == BALANCED:
        return [1.0] + balanced(objects_per_class)
    given = dict(pair for pair in setting if not isinstance(pair, str))
    for name in given:
        if name not in class_names:
            raise UserError("class_weights names '{}', which is no class of the training data{} "
                            "Its classes: {}{}".format(
                                name, nearest(name, class_names) or ".",
                                ", ".join(class_names[:_SHOWN]),
                                ", ..." if len(class_names) > _SHOWN else ""))
    return [1.0] + [float(given.get(name, 1.0)) for name in class_names]


def balanced(objects_per_class: Sequence[int]) -> List[float]:
    """Inverse frequency, so that the mean over all objects is 1 (but for the limit).

    A class without objects has 1.
    """
    counts = np.asarray(objects_per_class, np.float64)
    present = counts > 0
    factors = np.ones(len(counts))
    factors[present] = counts.sum() / (present.sum() * counts[present])
    return [float(value) for value in factors.clip(1 / LARGEST_FACTOR, LARGEST_FACTOR)]
