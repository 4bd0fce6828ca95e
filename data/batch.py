"""The static batch: what travels from the host to the device for a training step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, TypeVar, Union

import cv2
import numpy as np
import torch
from torch import Tensor

Device = Union[str, torch.device]
B = TypeVar("B", bound="Batch")

MASK_FIELDS = ("gt_masks", "semantic")
"""Fields of a `Batch` that travel as bits, along their last axis."""


@dataclass
class Batch:
    """Stacked arrays whose shapes follow from the configuration alone.

    B batch, G ground-truth slots, K mask samples, P priors, C classes with background, S input
    side. Large arrays of integers have a small type; 16 bits are none, since an Ascend 910A has
    no kernel that widens them. Slots not in use hold harmless values.

    Attributes:
        images: uint8 `[B, 3, S, S]`, RGB; the network normalises them.
        class_targets: int `[B, P]`, the label, 0 background, -1 neutral.
        box_targets: float32 `[B, P, 4]`, encoded against the priors at positives, 0 elsewhere.
        num_positives: int32 `[B]`.
        mask_index: int32 `[B, K]`, prior of each positive whose mask is trained.
        mask_gt: int32 `[B, K]`, its ground-truth slot.
        mask_valid: bool `[B, K]`.
        mask_scale: float32 `[B]`, positives / positives sampled; 1 without positives.
        gt_boxes: float32 `[B, G, 4]`, x1 y1 x2 y2 relative; 0 0 1 1 in empty slots.
        gt_labels: int32 `[B, G]`, 0 in empty slots.
        gt_masks: uint8 or, from a `PackedBatch`, bool `[B, G, h, w]` of 0 and 1.
        semantic: the same `[B, C-1, hs, ws]`, the union of each class's masks.
        image_ids: int64 `[B]`, COCO image ids; always on the host, where they are looked at.
    """

    images: Tensor
    class_targets: Tensor
    box_targets: Tensor
    num_positives: Tensor
    mask_index: Tensor
    mask_gt: Tensor
    mask_valid: Tensor
    mask_scale: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    gt_masks: Tensor
    semantic: Tensor
    image_ids: Tensor

    def to(self: B, device: Device, non_blocking: bool = False) -> B:
        """Copy every field but `image_ids` to `device`."""
        return self._map(lambda field: field if field is self.image_ids
                         else field.to(device, non_blocking=non_blocking))

    def take(self: B, other: B) -> B:
        """Copy the fields of `other` into the memory of this batch's, and return this batch."""
        for name, field in vars(other).items():
            if name != "image_ids":
                getattr(self, name).copy_(field, non_blocking=True)
        self.image_ids = other.image_ids
        return self

    def unpack(self, values: Tensor) -> Batch:
        """Return this batch; see `PackedBatch`."""
        return self

    def pin_memory(self: B) -> B:
        """Copy every field into page-locked memory, from which copies run asynchronously."""
        return self._map(Tensor.pin_memory)

    def __len__(self) -> int:
        return len(self.images)

    def _map(self: B, change: Callable[[Tensor], Tensor]) -> B:
        return type(self)(**{name: change(value) for name, value in vars(self).items()})


class PackedBatch(Batch):
    """A batch on its way to a device: eight pixels of a row of `MASK_FIELDS` are one byte.

    The last byte of a row is filled with zeros; the masks are square.
    """

    def unpack(self, values: Tensor) -> Batch:
        """The `Batch`, on the device the fields are on; `values` are `bit_values` there."""
        fields = dict(vars(self))
        for name in MASK_FIELDS:
            pixels = (fields[name].unsqueeze(-1) & values).ne(0).flatten(-2)
            fields[name] = pixels[..., :pixels.shape[-2]]
        return Batch(**fields)


def pack(batch: Batch) -> PackedBatch:
    """Pack a batch on the host; `PackedBatch.unpack` gives it back, its masks as bool."""
    fields = dict(vars(batch))
    for name in MASK_FIELDS:
        fields[name] = torch.from_numpy(np.packbits(fields[name].numpy(), axis=-1))
    return PackedBatch(**fields)


def bit_values(device: Device = "cpu") -> Tensor:
    """int32 `[8]`: the value of each bit of a byte, highest first. Make it once for a device.

    Of 32 bits, so that bytes are widened: the cores of an Ascend card know no bit arithmetic of 8.
    """
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.int32, device=device)


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack what `TargetMaker` returned for each image; lays the images out as RGB planes."""
    height, width = samples[0]["image"].shape[:2]
    images = np.empty((len(samples), 3, height, width), np.uint8)
    for planes, sample in zip(images, samples):
        cv2.split(sample["image"], [planes[2], planes[1], planes[0]])
    scalars = {"num_positives": np.int32, "mask_scale": np.float32, "image_ids": np.int64}
    arrays = {name: np.array([sample[name] for sample in samples], kind)
              for name, kind in scalars.items()}
    for field in dataclasses.fields(Batch):
        if field.name != "images" and field.name not in arrays:
            arrays[field.name] = np.stack([sample[field.name] for sample in samples])
    return Batch(images=torch.from_numpy(images),
                 **{name: torch.from_numpy(value) for name, value in arrays.items()})
