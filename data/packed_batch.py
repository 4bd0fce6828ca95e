"""A batch on its way to a device: the same arrays, with the masks as bits.

Masks are zeros and ones, and they are more than half of a batch. As bits they take an eighth of the
room in the workers' shared memory, in page-locked memory and on the bus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch

MASK_FIELDS = ("gt_masks", "semantic")
"""Fields of a `Batch` that travel as bits, along their last axis."""


def bit_values(device: Any = "cpu") -> Tensor:
    """uint8 `[8]`: the value of each bit of a byte, highest first. Make it once for a device."""
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)


@dataclass
class PackedBatch:
    """What `pack` returns.

    Attributes:
        plain: the fields of the batch that are not masks.
        bits: uint8 masks with eight pixels of a row in a byte, the last one filled with zeros.
        widths: pixels in a row of each mask field.
    """

    plain: Dict[str, Tensor]
    bits: Dict[str, Tensor]
    widths: Dict[str, int]

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """Copy every field to `device`."""
        return self._map(lambda field: field.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Copy every field into page-locked memory, from which copies run asynchronously."""
        return self._map(lambda field: field.pin_memory())

    def unpack(self, values: Tensor) -> Batch:
        """The `Batch`, on the device the fields are on; `values` are `bit_values` there."""
        masks = {}
        for name, packed in self.bits.items():
            pixels = (packed.unsqueeze(-1) & values).clamp(max=1).flatten(-2)
            masks[name] = pixels[..., :self.widths[name]]
        return Batch(**self.plain, **masks)

    @property
    def nbytes(self) -> int:
        """Bytes of all fields together."""
        return sum(self.field_bytes().values())

    def field_bytes(self) -> Dict[str, int]:
        """Bytes of each field."""
        return {name: value.numel() * value.element_size()
                for name, value in dict(self.plain, **self.bits).items()}

    def __len__(self) -> int:
        return len(self.plain["images"])

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        return PackedBatch({name: change(value) for name, value in self.plain.items()},
                           {name: change(value) for name, value in self.bits.items()}, self.widths)


def pack(batch: Batch) -> PackedBatch:
    """Pack a batch on the host; `PackedBatch.unpack` gives it back, equal to the bit."""
    fields = dict(vars(batch))
    masks = {name: fields.pop(name) for name in MASK_FIELDS}
    return PackedBatch(
        plain=fields,
        bits={name: torch.from_numpy(np.packbits(mask.numpy(), axis=-1))
              for name, mask in masks.items()},
        widths={name: mask.shape[-1] for name, mask in masks.items()})
