"""The static batch: layout, types, moving, packing, size."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from data.augment import AugmentedSample
from data.batch import MASK_FIELDS, Batch, PackedBatch, bit_values, collate, pack
from data.config import get_config
from data.targets import TargetMaker
from layers.anchors import make_priors

SHAPES = {
    "images": (2, 3, 550, 550), "class_targets": (2, 19248), "box_targets": (2, 19248, 4),
    "num_positives": (2,), "mask_index": (2, 100), "mask_gt": (2, 100), "mask_valid": (2, 100),
    "mask_scale": (2,), "gt_boxes": (2, 48, 4), "gt_labels": (2, 48),
    "gt_masks": (2, 48, 138, 138), "semantic": (2, 80, 69, 69), "image_ids": (2,),
}


@pytest.fixture(scope="module")
def samples():
    config = get_config("yolact_base")
    maker = TargetMaker(make_priors(config).numpy(), config.num_classes, 48, config.masks_to_train,
                        config.max_size, config.proto_size, config.semantic_size)
    rng, result = np.random.default_rng(0), []
    for image_id, count in ((2 ** 40, 0), (7, 3)):
        image = rng.integers(0, 256, (550, 550, 3)).astype(np.uint8)
        boxes = np.tile(np.array([0.2, 0.3, 0.6, 0.8], np.float32), (count, 1))
        masks = rng.integers(0, 2, (count, 550, 550)).astype(np.uint8)
        sample = AugmentedSample(image, boxes, np.arange(1, count + 1), masks,
                                 np.zeros((0, 4), np.float32), image_id,
                                 np.tile([0, 0, 550, 550], (count, 1)))
        result.append(maker(sample, rng))
    return result


@pytest.fixture(scope="module")
def batch(samples):
    return collate(samples)


def test_fields_and_shapes(batch):
    assert [field.name for field in dataclasses.fields(Batch)] == list(SHAPES)
    assert {name: tuple(value.shape) for name, value in vars(batch).items()} == SHAPES
    assert len(batch) == 2


def test_types(batch):
    kinds = {name: value.dtype for name, value in vars(batch).items()}
    for name in ("images", "gt_masks", "semantic"):
        assert kinds[name] == torch.uint8
    for name in ("box_targets", "mask_scale", "gt_boxes"):
        assert kinds[name] == torch.float32
    assert kinds["class_targets"] == torch.int8
    for name in ("gt_labels", "mask_gt", "mask_index", "num_positives"):
        assert kinds[name] == torch.int32
    assert kinds["mask_valid"] == torch.bool and kinds["image_ids"] == torch.int64


def test_images_are_rgb_planes(samples, batch):
    for image, sample in zip(batch.images, samples):
        np.testing.assert_array_equal(image.numpy(), sample["image"][:, :, ::-1].transpose(2, 0, 1))


def test_rows_are_the_samples(samples, batch):
    assert batch.image_ids.tolist() == [2 ** 40, 7]
    for row, sample in enumerate(samples):
        for name in set(SHAPES) - {"images"}:
            np.testing.assert_array_equal(getattr(batch, name)[row].numpy(), sample[name])


def field_bytes(batch):
    return [value.numel() * value.element_size() for value in vars(batch).values()]


def test_bytes_per_image(batch):
    """At 550 px with 48 slots: a fifth of what float images and full-size masks would take."""
    assert sum(field_bytes(batch)) == 2 * 2531584
    assert sum(field_bytes(pack(batch))) == 2 * 1405504


def test_moves_to_a_device(batch, device):
    moved = batch.to(device, non_blocking=True)
    for name, value in vars(moved).items():
        assert value.device.type == ("cpu" if name == "image_ids" else device.type), name
        assert torch.equal(value.cpu(), getattr(batch, name))


def test_survives_the_way_between_processes(batch):
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.images, batch.images) and torch.equal(again.semantic, batch.semantic)


def test_masks_travel_as_bits_and_arrive_as_they_were(batch, device):
    before = batch.gt_masks.clone()
    packed = pack(batch)
    assert len(packed) == 2 and torch.equal(batch.gt_masks, before)
    arrived = packed.to(device).unpack(bit_values(device))
    for name, sent in vars(batch).items():
        found = getattr(arrived, name).cpu()
        assert found.dtype == (torch.bool if name in MASK_FIELDS else sent.dtype), name
        assert torch.equal(found.to(sent.dtype), sent), name


def test_what_is_packed_stays_packed_on_the_way(batch):
    packed = pack(batch)
    for moved in (packed.to("cpu"), pickle.loads(pickle.dumps(packed))):
        assert isinstance(moved, PackedBatch) and field_bytes(moved) == field_bytes(packed)
