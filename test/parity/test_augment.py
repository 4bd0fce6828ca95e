"""Augmentation against the numbers recorded from the original: by seed, and as a distribution."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data.augment import Augmenter, Distortion, Placement, distort
from data.coco import Sample
from helpers import augment_reference as reference

SIZE = 138
FIELDS = ["n_boxes", "mean_box_area", "img_mean", "img_std", "mask_frac"]
LARGEST_Z = 3.5


@pytest.fixture(scope="module")
def recorded(golden):
    values = golden("augment")
    values["masks"] = unpack(values, "masks")
    return values


@pytest.fixture(scope="module")
def sample(recorded):
    masks = [coco_mask.encode(np.asfortranarray(mask)) for mask in recorded["masks"]]
    return Sample(image_id=1, image=recorded["img"], boxes=recorded["boxes"].astype(np.float32),
                  labels=np.arange(6), crowd=np.zeros(6, bool), segmentations=masks)


def unpack(values, name):
    shape = values[name + "_shape"]
    return np.unpackbits(values[name + "_packed"])[:np.prod(shape)].reshape(shape)


def normalised(image):
    return (image.astype(np.float32) - reference.MEAN_BGR) / reference.STD_BGR


def pixels(sample):
    height, width = sample.image.shape[:2]
    return width, height, sample.boxes * np.array([width, height, width, height])


def in_crop(sample, placement):
    """Boxes of the objects kept, in pixels of the crop, before it is resized."""
    result = Augmenter(SIZE).render(sample, placement, Distortion())
    x1, y1, x2, y2 = placement.crop
    return result.boxes * np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1]), result


# Fixed operations and replayed seeds

def test_plain_resize(recorded, sample):
    plain = Augmenter(SIZE, photometric=False, expand=False, crop=False, mirror=False)
    result = plain(sample, np.random.default_rng(0))
    rgb = normalised(result.image)[:, :, ::-1]
    np.testing.assert_allclose(rgb[::2, ::2], recorded["base_resnet"], atol=1.0 / 57)
    np.testing.assert_allclose(result.image[::3, ::3], recorded["resize_img"], atol=1.0)
    np.testing.assert_allclose(result.boxes * SIZE, recorded["resize_boxes"], atol=1e-4)
    expected = unpack(recorded, "resize_masks")
    agree = (result.masks & expected).sum((1, 2)) / (result.masks | expected).sum((1, 2))
    assert agree.min() > 0.97


@pytest.mark.parametrize("seed", range(4))
def test_distortion(recorded, seed):
    distortion = reference.draw_distortion(np.random.RandomState(seed))
    exact = reference.distort(recorded["img"], distortion)[::4, ::4]
    np.testing.assert_allclose(exact, recorded[f"photo{seed}_img"], atol=0.02)
    ours = distort(recorded["img"], distortion)[::4, ::4]
    error = ours - np.clip(exact, 0, 255)
    assert abs(error.mean()) < 0.4 and np.abs(error).mean() < 1.5


@pytest.mark.parametrize("seed", range(4))
def test_expansion(recorded, sample, seed):
    width, height, _ = pixels(sample)
    left, top, *canvas = reference.draw_expansion(np.random.RandomState(seed), width, height)
    placement = Placement(width, height, left, top, (0, 0, canvas[0], canvas[1]), False, SIZE)
    assert canvas[::-1] == recorded[f"expand{seed}_shape"][:2].tolist()
    boxes, _ = in_crop(sample, placement)
    np.testing.assert_allclose(boxes, recorded[f"expand{seed}_boxes"], atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_crop(recorded, sample, seed):
    width, height, boxes = pixels(sample)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    crop = reference.draw_crop(np.random.RandomState(seed), width, height, centres)
    boxes, result = in_crop(sample, Placement(width, height, 0, 0, crop, False, SIZE))
    np.testing.assert_allclose(boxes, recorded[f"crop{seed}_boxes"], atol=1e-4)
    area = (crop[2] - crop[0]) * (crop[3] - crop[1])
    sums = result.masks.mean((1, 2)) * area
    np.testing.assert_allclose(sums, recorded[f"crop{seed}_masksums"], rtol=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_mirror(recorded, sample, seed):
    width, height, _ = pixels(sample)
    mirror = bool(np.random.RandomState(seed).randint(2))
    boxes, _ = in_crop(sample, Placement(width, height, 0, 0, (0, 0, width, height), mirror, SIZE))
    np.testing.assert_allclose(boxes, recorded[f"mirror{seed}_boxes"], atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_whole(recorded, sample, seed):
    width, height, boxes = pixels(sample)
    draws = reference.draw(np.random.RandomState(seed), width, height, boxes, SIZE)
    result = Augmenter(SIZE).render(sample, draws[1], draws[0])
    name = f"ssd{seed}_"
    np.testing.assert_allclose(result.boxes, recorded[name + "boxes"], atol=1e-5)
    np.testing.assert_allclose(result.masks.sum((1, 2)), recorded[name + "masksums"], rtol=0.05)
    exact, _ = reference.render(sample.image, recorded["masks"], *draws)
    rgb = normalised(exact)[:, :, ::-1]
    np.testing.assert_allclose(rgb[::4, ::4], recorded[name + "img"], atol=1e-3)
    error = np.abs(result.image - np.clip(exact, 0, 255))
    assert error.mean() < 2.0, error.mean()


# Distributions

def z_scores(ours, mean, std, count):
    error = np.sqrt(std ** 2 / count + ours.var(0) / len(ours))
    return dict(zip(FIELDS, (ours.mean(0) - mean) / error))


def recorded_z(recorded, ours):
    columns = [recorded["dist_fields"].tolist().index(field) for field in FIELDS]
    return z_scores(ours, recorded["dist_mean"][columns], recorded["dist_std"][columns], 1500)


def measures(boxes, image, masks):
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).mean()
    image = normalised(image)
    return [len(boxes), area, image.mean(), image.std(), masks.mean()]


@pytest.fixture(scope="module")
def ours(sample):
    augmenter, rows = Augmenter(SIZE), []
    for index in range(1500):
        result = augmenter(sample, np.random.default_rng([7, index]))
        rows.append(measures(result.boxes, result.image, result.masks))
    return np.array(rows)


@pytest.fixture(scope="module")
def replayed(recorded, sample):
    """The plain reference, with values that leave 0..255 as they are, and saturated."""
    r, (width, height, boxes), free, saturated = np.random.RandomState(11), pixels(sample), [], []
    for _ in range(1500):
        distortion, placement = reference.draw(r, width, height, boxes, SIZE)
        image, masks = reference.render(sample.image, recorded["masks"], distortion, placement)
        corner = np.array([placement.left, placement.top] * 2)
        x1, y1, x2, y2 = placement.crop
        moved = boxes + corner
        centres = (moved[:, :2] + moved[:, 2:]) / 2
        kept = ((centres > [x1, y1]) & (centres < [x2, y2])).all(1)
        moved = (np.clip(moved, [x1, y1] * 2, [x2, y2] * 2) - [x1, y1] * 2)[kept]
        moved = moved / np.array([x2 - x1, y2 - y1] * 2)
        free.append(measures(moved, image, masks[kept]))
        saturated.append(measures(moved, np.clip(image, 0, 255), masks[kept]))
    return np.array(free), np.array(saturated)


def test_distribution_equals_the_original(recorded, ours):
    z = recorded_z(recorded, ours)
    # The original's pixels may leave 0..255 and ours saturate there, which narrows them a little;
    # the two tests below hold that nothing else does.
    assert z.pop("img_std") < 1.0
    assert max(abs(value) for value in z.values()) < LARGEST_Z, z


def test_reference_has_the_original_distribution(recorded, replayed):
    z = recorded_z(recorded, replayed[0])
    assert max(abs(value) for value in z.values()) < LARGEST_Z, z


def test_distribution_equals_the_saturated_reference(replayed, ours):
    saturated = replayed[1]
    z = z_scores(ours, saturated.mean(0), saturated.std(0), len(saturated))
    assert max(abs(value) for value in z.values()) < LARGEST_Z, z


def placement_facts(placement, centres):
    x1, y1, x2, y2 = placement.crop
    moved = centres + [placement.left, placement.top]
    kept = ((moved > [x1, y1]) & (moved < [x2, y2])).all(1).sum()
    expanded = placement.left + placement.top > 0
    return [kept, expanded, placement.left / placement.width, placement.top / placement.height,
            (x2 - x1) / placement.width, (y2 - y1) / placement.height, (x2 - x1) / (y2 - y1),
            (x1 - placement.left) / placement.width, (y1 - placement.top) / placement.height,
            placement.mirror]


@pytest.fixture(scope="module")
def placements(sample):
    """Facts of many placements drawn by us and by the reference: arrays `[draws, facts]`."""
    augmenter, (width, height, boxes) = Augmenter(SIZE), pixels(sample)
    centres, rng = (boxes[:, :2] + boxes[:, 2:]) / 2, np.random.default_rng(5)
    ours = [placement_facts(augmenter.draw_placement(sample, rng), centres) for _ in range(20000)]
    r = np.random.RandomState(6)
    theirs = [placement_facts(reference.draw(r, width, height, boxes, SIZE)[1], centres)
              for _ in range(20000)]
    return np.array(ours, float), np.array(theirs, float)


def test_number_of_boxes(recorded, placements):
    """Sharper than its mean: all of the recorded histogram."""
    counts = np.bincount(placements[0][:, 0].astype(int), minlength=7)
    expected, found = counts / counts.sum() * 1500, recorded["dist_nboxes_hist"]
    assert counts[0] == found[0] == 0
    chi_square = ((found - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_square < 20.5, chi_square  # 5 degrees of freedom: one in a thousand


@pytest.mark.parametrize("power", [1, 2])
def test_placements_equal_the_reference(placements, power):
    """First and second moments of everything a placement is made of."""
    ours, theirs = (values ** power for values in placements)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / len(ours))
    z = (ours.mean(0) - theirs.mean(0)) / error
    assert np.abs(z).max() < LARGEST_Z, z
