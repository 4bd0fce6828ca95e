"""Colour distortion of uint8 images."""

from __future__ import annotations

import numpy as np
import pytest

from data.augment import Distortion, distort, draw_distortion
from helpers import augment_reference as reference

CASES = [
    Distortion(brightness=25.0), Distortion(brightness=-30.5), Distortion(contrast=1.4),
    Distortion(contrast=0.6), Distortion(saturation=1.5), Distortion(saturation=0.5),
    Distortion(hue=17.0), Distortion(hue=-12.0), Distortion(-10.0, 1.3, 0.7, 11.0),
    Distortion(30.0, 0.5, 1.4, -18.0),
]


@pytest.fixture(scope="module")
def image():
    """Colours that steer clear of the ends, so that float arithmetic stays within 0..255."""
    rng = np.random.default_rng(3)
    return rng.integers(70, 150, (40, 50, 3)).astype(np.uint8)


@pytest.mark.parametrize("distortion", CASES, ids=str)
def test_equals_float_arithmetic(image, distortion):
    exact = np.clip(reference.distort(image, distortion), 0, 255)
    error = distort(image, distortion) - exact
    # A byte holds hue in steps of 1.4 degrees; all else is exact up to rounding.
    assert np.abs(error).max() < (4.0 if distortion.hue else 0.6)
    assert abs(error.mean()) < 0.35


def test_saturates_at_the_ends():
    image = np.array([[[0, 128, 255]]], np.uint8)
    assert distort(image, Distortion(brightness=32.0)).tolist() == [[[32, 160, 255]]]
    assert distort(image, Distortion(brightness=-32.0)).tolist() == [[[0, 96, 223]]]
    assert distort(image, Distortion(contrast=1.5)).tolist() == [[[0, 192, 255]]]


def test_hue_wraps():
    red = np.full((2, 2, 3), (0, 0, 200), np.uint8)
    blue, green, red_after = distort(red, Distortion(hue=-18.0))[0, 0].astype(int)
    assert blue > 40 and green == 0 and red_after == 200


def test_grey_has_no_hue_and_no_saturation():
    grey = np.full((2, 2, 3), 90, np.uint8)
    assert (distort(grey, Distortion(saturation=1.5, hue=18.0)) == 90).all()


def test_input_is_left_alone(image):
    before = image.copy()
    for distortion in CASES:
        distort(image, distortion)
    np.testing.assert_array_equal(image, before)
    assert distort(image, Distortion()) is image


def test_draws():
    rng = np.random.default_rng(0)
    draws = [draw_distortion(rng) for _ in range(4000)]
    for name, idle, low, high in [("brightness", 0.0, -32, 32), ("contrast", 1.0, 0.5, 1.5),
                                  ("saturation", 1.0, 0.5, 1.5), ("hue", 0.0, -18, 18)]:
        values = np.array([getattr(draw, name) for draw in draws])
        active = values[values != idle]
        assert abs(len(active) / len(values) - 0.5) < 0.03
        assert low <= active.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < active.max() <= high
        assert abs(active.mean() - (low + high) / 2) < 0.03 * (high - low)


@pytest.mark.parametrize("level, distortion", [
    (8, Distortion(brightness=-32.0)), (8, Distortion(brightness=-20.0, contrast=1.5)),
    (230, Distortion(contrast=1.5)), (235, Distortion(brightness=32.0, contrast=1.4)),
])
def test_dark_and_bright_images_keep_their_contrast(level, distortion):
    """As under a microscope: little stands out of a background near one end of the range."""
    image = np.full((60, 90, 3), level, np.uint8)
    image[20:40, 30:60] = level + 18 if level < 128 else level - 60
    plain = reference.distort(image, distortion)  # in float, beyond 0..255
    lost = distort(image, distortion)
    assert lost.std() < 0.7 * plain.std()
    held = distortion.within_range(image)
    assert distort(image, held).std() > 0.99 * min(plain.std(), image.std())
    assert abs(held.brightness) <= abs(distortion.brightness)
    assert 1.0 <= held.contrast <= max(distortion.contrast, 1.0)


@pytest.mark.parametrize("distortion", CASES + [Distortion()], ids=str)
def test_ordinary_images_get_what_was_drawn(image, distortion):
    assert distortion.within_range(image) == distortion
