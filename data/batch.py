"""The static batch: what travels from the host to the device for a training step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Dict, List

import cv2
import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """Stacked arrays whose shapes follow from the configuration alone.

    B batch, G ground-truth slots, K mask samples, P priors, C classes with background, S input
    side. Integers have the smallest type that holds them. Slots not in use hold harmless values.

    Attributes:
        images: uint8 `[B, 3, S, S]`, RGB; the network normalises them.
        class_targets: int `[B, P]`, the label, 0 background, -1 neutral.
        box_targets: float32 `[B, P, 4]`, encoded against the priors at positives, 0 elsewhere.
        num_positives: int32 `[B]`.
        mask_index: int `[B, K]`, prior of each positive whose mask is trained.
        mask_gt: int `[B, K]`, its ground-truth slot.
        mask_valid: bool `[B, K]`.
        mask_scale: float32 `[B]`, positives / positives sampled; 1 without positives.
        gt_boxes: float32 `[B, G, 4]`, x1 y1 x2 y2 relative; 0 0 1 1 in empty slots.
        gt_labels: int `[B, G]`, 0 in empty slots.
        gt_masks: uint8 `[B, G, h, w]` of 0 and 1.
        semantic: uint8 `[B, C-1, hs, ws]` of 0 and 1, the union of each class's masks.
        image_ids: int64 `[B]`, COCO image ids.
    """

    images: torch.Tensor
    class_targets: torch.Tensor
    box_targets: torch.Tensor
    num_positives: torch.Tensor
    mask_index: torch.Tensor
    mask_gt: torch.Tensor
    mask_valid: torch.Tensor
    mask_scale: torch.Tensor
    gt_boxes: torch.Tensor
    gt_labels: torch.Tensor
    gt_masks: torch.Tensor
    semantic: torch.Tensor
    image_ids: torch.Tensor

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        """Copy every field to `device`."""
        return self._map(lambda field: field.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy every field into page-locked memory, from which copies run asynchronously."""
        return self._map(lambda field: field.pin_memory())

    @property
    def nbytes(self) -> int:
        """Bytes of all fields together."""
        return sum(size for size in self.field_bytes().values())

    def field_bytes(self) -> Dict[str, int]:
        """Bytes of each field."""
        return {name: value.numel() * value.element_size() for name, value in self._fields()}

    def __len__(self) -> int:
        return len(self.images)

    def _fields(self) -> List[Any]:
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(**{name: change(value) for name, value in self._fields()})


def collate(samples: List[Dict[str, Any]]) -> Batch:
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
