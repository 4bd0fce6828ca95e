"""How closely the numbers of the device under test agree with the CPU's: the one place for it.

A test says how closely float32 agrees, and asks here for the bound of the card that it runs on. The
first Ascend 910 (910A) convolves, multiplies matrices, sorts, chooses and pools in float16,
whatever the type of the tensors, and writes its largest number for an infinity: its bounds are
about twice what the emulated one needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import pytest
import torch

from utils.device import saturates


class Bounds(NamedTuple):
    """Relative differences that a kind of card may have; 0 where a test's own bound holds."""

    product: float = 0.0
    """After a convolution or a matrix product, or a few of them."""
    network: float = 0.0
    """After a whole network, forward or backward."""
    chosen: float = 0.0
    """Of values that were sorted, chosen or pooled."""


FLOAT32 = Bounds()
FIRST_910 = Bounds(product=4e-3, network=5e-2, chosen=1e-3)


def _bounds() -> Bounds:
    """Those of the NPU in use; of other devices each test's own hold."""
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_initialized():
        return FLOAT32
    return FIRST_910 if saturates(torch.device("npu", npu.current_device())) else FLOAT32


def product(own: float) -> float:
    """`own`, a test's relative bound, or the card's after some products where that is larger."""
    return max(own, _bounds().product)


def network(own: float) -> float:
    """The same after a whole network."""
    return max(own, _bounds().network)


def chosen(own: float) -> float:
    """The same of values that were sorted, chosen or pooled."""
    return max(own, _bounds().chosen)


def of_small(values: torch.Tensor) -> float:
    """Norm of the difference of values that started at 0 and are only what they were moved by."""
    return 1e-4 * values.numel() ** 0.5 if _bounds() != FLOAT32 else 0.0


def in_order() -> bool:
    """Whether scores that float32 tells apart come in their order."""
    return _bounds() == FLOAT32


def skip_where_saturated() -> None:
    """Skip a test of infinities, of NaN or of bfloat16, which a first Ascend 910 does not have."""
    if _bounds() != FLOAT32:
        pytest.skip("this card has no infinities, no NaN and no bfloat16")


def assert_same_choice(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """The same rows in the same order; where scores lose theirs in any order, and one of twenty
    another.
    """
    if in_order():
        assert list(found) == list(wanted)
        return
    assert len(found) == len(wanted)
    assert len(set(found) & set(wanted)) >= 0.95 * len(wanted)
