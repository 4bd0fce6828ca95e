"""Geometry of augmentation: pixels, boxes and masks move together."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data.augment import FILL_BGR, Augmenter, Distortion, Placement, draw_crop, turned
from data.coco import Sample
from data.config import get_config

WIDTH, HEIGHT, SIZE = 120, 80, 110
SQUARES = np.array([[20, 10, 50, 40], [70, 30, 110, 70], [5, 50, 35, 75]], np.float32)


def make_sample(squares=SQUARES, crowd=None, rle=False):
    """White squares on black; each is an object with its exact outline."""
    squares = np.asarray(squares, np.float32).reshape(-1, 4)
    image, segmentations = np.zeros((HEIGHT, WIDTH, 3), np.uint8), []
    for x1, y1, x2, y2 in squares:
        image[int(y1):int(y2), int(x1):int(x2)] = 255
        outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float32)
        flat = [outline.ravel().astype(float).tolist()]
        segmentations.append(coco_mask.merge(coco_mask.frPyObjects(flat, HEIGHT, WIDTH))
                             if rle else [outline])
    boxes = squares / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)
    crowd = np.zeros(len(squares), bool) if crowd is None else np.array(crowd, bool)
    return Sample(image_id=9, image=image, boxes=boxes, labels=np.arange(1, len(squares) + 1),
                  crowd=crowd, segmentations=segmentations)


def augmenter(**switches):
    defaults = dict.fromkeys(["photometric", "expand", "crop", "mirror"], False)
    return Augmenter(SIZE, **{**defaults, **switches})


def seeds(count):
    return [np.random.default_rng(seed) for seed in range(count)]


@pytest.mark.parametrize("rle", [False, True])
def test_masks_and_boxes_lie_on_their_pixels(rle):
    """Whatever the draw, the white pixels are the union of the masks of all objects."""
    sample, shapes = make_sample(rle=rle), set()
    for rng in seeds(60):
        result = augmenter(expand=True, crop=True, mirror=True)(sample, rng)
        shapes.add(len(result.boxes))
        white = (result.image > 127).all(2)
        if len(result.boxes) == len(SQUARES):
            union = result.masks.any(0)
            assert (white & union).sum() > 0.9 * max(white.sum(), union.sum())
        for box, mask in zip(result.boxes, result.masks):
            assert (white & (mask > 0)).sum() > 0.85 * mask.sum()
            x1, y1, x2, y2 = np.rint(box * SIZE).astype(int)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.array(found) - [x1, y1, x2, y2]).max() <= 1
    assert {1, 2, 3} <= shapes


def test_plain_resize_keeps_boxes():
    sample = make_sample()
    result = augmenter()(sample, np.random.default_rng(0))
    np.testing.assert_array_equal(result.boxes, sample.boxes)
    assert result.labels.tolist() == [1, 2, 3] and result.image_id == 9
    assert result.image.shape == (SIZE, SIZE, 3) and result.masks.shape == (3, SIZE, SIZE)
    assert result.boxes.dtype == np.float32 and result.masks.dtype == np.uint8


def test_mirror_is_the_flipped_result():
    sample = make_sample()
    whole = (0, 0, WIDTH, HEIGHT)
    plain, mirrored = (augmenter().render(sample, Placement(WIDTH, HEIGHT, 0, 0, whole, flag, SIZE),
                                          Distortion()) for flag in (False, True))
    np.testing.assert_array_equal(mirrored.image, plain.image[:, ::-1])
    differing = (mirrored.masks != plain.masks[:, :, ::-1]).mean()
    assert differing < 0.002
    np.testing.assert_allclose(mirrored.boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0],
                               plain.boxes, atol=1e-6)


def test_fill_is_neither_distorted_nor_part_of_the_image():
    sample = make_sample([])
    sample.image[:] = 200
    placement = Placement(WIDTH, HEIGHT, 60, 40, (0, 0, 2 * WIDTH, 2 * HEIGHT), False, SIZE)
    image = augmenter().render(sample, placement, Distortion(brightness=30.0)).image
    inside = slice(SIZE // 4 + 1, 3 * SIZE // 4 - 1)
    assert (image[inside, inside] == 230).all()
    outside = np.ones((SIZE, SIZE), bool)
    outside[SIZE // 4:-(SIZE // 4), SIZE // 4:-(SIZE // 4)] = False
    assert (image[outside] == FILL_BGR).all()


@pytest.mark.parametrize("crowd", [[], [True, True]])
def test_images_without_objects_pass(crowd):
    sample = make_sample(SQUARES[:len(crowd)], crowd)
    for rng in seeds(20):
        result = Augmenter(SIZE)(sample, rng)
        assert result.boxes.shape == (0, 4) and result.masks.shape == (0, SIZE, SIZE)
        assert result.labels.shape == (0,) and len(result.crowd_boxes) == len(crowd)


def test_crowds_do_not_make_a_crop_good():
    """Every crop holds the centre of an object that is no crowd."""
    sample = make_sample(crowd=[True, True, False])
    crowds = set()
    for rng in seeds(200):
        result = augmenter(crop=True)(sample, rng)
        assert result.labels.tolist() == [3]
        crowds.add(len(result.crowd_boxes))
    assert crowds == {0, 1, 2}


def test_degenerate_boxes_are_dropped():
    squares = np.concatenate([SQUARES, [[30, 30, 30, 60]]])
    result = augmenter()(make_sample(squares), np.random.default_rng(0))
    assert result.labels.tolist() == [1, 2, 3]


def test_objects_without_a_pixel_are_dropped():
    sample = make_sample()
    sample.segmentations[1] = [np.array([[50, 50], [50.1, 50], [50, 50.1]], np.float32)]
    result = augmenter()(sample, np.random.default_rng(0))
    assert result.labels.tolist() == [1, 3]
    assert len(result.masks) == len(result.boxes) == len(result.mask_extents) == 2


def test_same_seed_same_result():
    sample, whole = make_sample(), Augmenter(SIZE)
    first, second = (whole(sample, np.random.default_rng(4)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes, second.boxes)


@pytest.mark.parametrize("quarters", range(4))
def test_turned_is_the_rotated_result(quarters):
    sample = make_sample(crowd=[False, False, True])
    plain = augmenter()(sample, np.random.default_rng(0))
    result = turned(plain, quarters)
    np.testing.assert_array_equal(result.image, np.rot90(plain.image, quarters))
    np.testing.assert_array_equal(result.masks, np.rot90(plain.masks, quarters, axes=(1, 2)))
    assert result.boxes.dtype == np.float32 and result.labels.tolist() == plain.labels.tolist()
    for box, extent, mask in zip(result.boxes, result.mask_extents, result.masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(box * SIZE - around).max() <= 1
        assert (np.abs(extent - around) <= 1).all()
    x1, y1, x2, y2 = np.rint(result.crowd_boxes[0] * SIZE).astype(int)
    assert result.image[y1 + 1:y2 - 1, x1 + 1:x2 - 1].min() > 127


def test_rotation_draws_all_four():
    sample, plain = make_sample(), augmenter()(make_sample(), np.random.default_rng(0))
    images = {augmenter(rotate=True)(sample, rng).image.tobytes() for rng in seeds(40)}
    assert images == {np.ascontiguousarray(np.rot90(plain.image, k)).tobytes() for k in range(4)}


def test_switches_follow_the_recipe():
    shapes = Augmenter.from_config(get_config("yolact_shapes"))
    assert (shapes.photometric, shapes.expand, shapes.crop, shapes.mirror) == (
        False, False, False, True)
    base = Augmenter.from_config(get_config("yolact_base"))
    assert base.size == 550 and base.photometric and base.expand and base.crop and base.mirror
    assert not base.rotate
    assert Augmenter.from_config(get_config("yolact_base", augment_rotate=True)).rotate


def test_crops_keep_their_limits():
    rng, found = np.random.default_rng(0), []
    centres = np.array([[60.0, 40.0]])
    for _ in range(3000):
        crop = draw_crop(WIDTH, HEIGHT, centres, rng)
        found.append(crop)
        if crop is not None:
            x1, y1, x2, y2 = crop
            assert 0 <= x1 < 60 < x2 <= WIDTH and 0 <= y1 < 40 < y2 <= HEIGHT
            assert x2 - x1 >= 0.3 * WIDTH - 1 and y2 - y1 >= 0.3 * HEIGHT - 1
            assert 0.45 < (y2 - y1) / (x2 - x1) < 2.1
    assert abs(found.count(None) / len(found) - 1 / 6) < 0.03


def test_crop_gives_up_where_no_trial_can_hold_a_centre():
    assert draw_crop(WIDTH, HEIGHT, np.array([[-5.0, 10.0]]), np.random.default_rng(0)) is None
