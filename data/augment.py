"""SSD's augmentation: colours, and a geometry composed so that pixels and masks are resampled once.

Source: Liu et al., "SSD: Single Shot MultiBox Detector" (2016), in the form the original YOLACT
trains with. Its numbers are kept, and one quirk: SSD's lower limit on the IoU of crop and objects
never takes effect there (its author measured that enforcing it costs accuracy), so the five limited
kinds of crop are all the unlimited one. Only `no crop at all` is different, one time in six.

Brightness, contrast, saturation and hue are each changed with probability 1/2. The original works
in float and lets values leave 0..255, where a uint8 image saturates: of a dark microscopy image
little would be left, so brightness and contrast are held back where they would push half of the
pixels out. The four steps commute: brightness and contrast change the largest channel and the
distances to it like every channel, saturation scales those distances, hue only redistributes them.
So SSD's random order of contrast need not be drawn, and the image saturates once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable

import cv2
import numpy as np

from data.coco import Sample
from data.config import Config
from data.masks import Affine, draw_masks

FILL_BGR = (104, 117, 124)
"""ImageNet's mean as whole levels: the canvas around an expanded image, whatever the backbone."""

EXPAND_RATIO = (1.0, 4.0)
NO_CROP = 1.0 / 6.0
CROP_TRIALS = 50
CROP_SIDE = (0.3, 1.0)
CROP_ASPECT = (0.5, 2.0)
DEGENERATE = 1e-4
"""Boxes of at most this width or height, relative to the output, are dropped."""

BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18.0
_GRID = 32
"""Rows and columns, about, of the pixels whose median stands for the image's."""

_LEVELS = np.arange(256, dtype=np.float32)


@dataclass
class AugmentedSample:
    """One image at the network's size with its objects; n and m may be 0.

    Attributes:
        image: uint8 `[S, S, 3]`, BGR.
        boxes: float32 `[n, 4]`, x1 y1 x2 y2 relative to the output, in [0, 1].
        labels: int64 `[n]`, 1..C-1.
        masks: uint8 `[n, S, S]` of 0 and 1.
        crowd_boxes: float32 `[m, 4]`, as `boxes`.
        image_id: COCO image id.
        mask_extents: int64 `[n, 4]`, x1 y1 x2 y2 in whole pixels around all that is set in a mask.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    crowd_boxes: np.ndarray
    image_id: int
    mask_extents: np.ndarray


@dataclass(frozen=True)
class Augmenter:
    """Turn a `Sample` into an `AugmentedSample`; all switches off is a plain resize."""

    size: int
    """S, side of the output in pixels. The aspect ratio of the image is not kept."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue."""
    expand: bool = True
    """Shrink the image onto a larger canvas, with probability 1/2."""
    crop: bool = True
    """Cut out a rectangle that holds the centre of an object."""
    mirror: bool = True
    """Flip left to right, with probability 1/2."""
    rotate: bool = False
    """Turn by 0, 90, 180 or 270 degrees; with `mirror`, every symmetry of the square."""

    @staticmethod
    def from_config(config: Config) -> Augmenter:
        """Build what the recipe trains with."""
        return Augmenter(config.max_size, photometric=config.augment_photometric,
                         expand=config.augment_expand, crop=config.augment_crop,
                         mirror=config.augment_mirror, rotate=config.augment_rotate)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> AugmentedSample:
        """Draw an augmentation from `rng` and render it."""
        distortion = draw_distortion(rng) if self.photometric else Distortion()
        rendered = self.render(sample, self.draw_placement(sample, rng),
                               distortion.within_range(sample.image))
        return turned(rendered, int(rng.integers(4))) if self.rotate else rendered

    def draw_placement(self, sample: Sample, rng: np.random.Generator) -> Placement:
        """Draw expansion, crop and mirror for `sample`."""
        height, width = sample.image.shape[:2]
        left, top, canvas_width, canvas_height = 0, 0, width, height
        if self.expand and rng.random() < 0.5:
            ratio, across, down = rng.uniform(*EXPAND_RATIO), rng.random(), rng.random()
            left, top = int(across * (ratio - 1) * width), int(down * (ratio - 1) * height)
            canvas_width, canvas_height = int(ratio * width), int(ratio * height)
        crop = None
        if self.crop and not sample.crowd.all():
            boxes = sample.boxes[~sample.crowd] * np.array([width, height, width, height])
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + [left, top]
            crop = draw_crop(canvas_width, canvas_height, centres, rng)
        mirror = self.mirror and rng.random() < 0.5
        return Placement(width=width, height=height, left=left, top=top, mirror=mirror,
                         crop=crop or (0, 0, canvas_width, canvas_height), size=self.size)

    def render(self, sample: Sample, placement: Placement,
               distortion: Distortion) -> AugmentedSample:
        """Apply given draws: objects and crowds stay whose box centre lies in the crop.

        Objects of which nothing is left to train on are left out: those with a box of no width or
        height, or a mask without a pixel.
        """
        x1, y1, x2, y2 = placement.crop
        centres = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
        centres = centres * np.array([placement.width, placement.height])
        centres = centres + [placement.left, placement.top]
        kept = ((centres > [x1, y1]) & (centres < [x2, y2])).all(axis=1)
        boxes = placement.boxes(sample.boxes)
        objects = np.flatnonzero(kept & ~sample.crowd)
        solid = objects[((boxes[objects, 2:] - boxes[objects, :2]) > DEGENERATE).all(axis=1)]
        masks, extents = draw_masks([sample.segmentations[i] for i in solid], placement.affine,
                                    self.size)
        drawn = extents[:, 2] > 0
        if not drawn.all():
            solid, masks, extents = solid[drawn], masks[drawn], extents[drawn]
        return AugmentedSample(
            image=resample(sample.image, placement, distortion), boxes=boxes[solid],
            labels=sample.labels[solid], masks=masks, crowd_boxes=boxes[kept & sample.crowd],
            image_id=sample.image_id, mask_extents=extents)


def turned(sample: AugmentedSample, quarters: int) -> AugmentedSample:
    """`sample` turned counterclockwise by `quarters` times 90 degrees; its output is a square."""

    def corners(boxes: np.ndarray, side: int) -> np.ndarray:
        for _ in range(quarters):
            x1, y1, x2, y2 = boxes.T
            boxes = np.stack([y1, side - x2, y2, side - x1], axis=1)
        return boxes

    return replace(
        sample, image=np.ascontiguousarray(np.rot90(sample.image, quarters)),
        masks=np.ascontiguousarray(np.rot90(sample.masks, quarters, axes=(1, 2))),
        boxes=corners(sample.boxes, 1), crowd_boxes=corners(sample.crowd_boxes, 1),
        mask_extents=corners(sample.mask_extents, len(sample.image)))


def draw_crop(width: int, height: int, centres: np.ndarray,
              rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Draw SSD's crop of a canvas: x1 y1 x2 y2 in whole pixels, or None for no crop.

    A crop holds at least one of `centres` `[n, 2]`, those of objects that are not crowds. In each
    round no crop comes up one time in six, otherwise the first good one of fifty trials.
    """
    canvas = np.array([width, height])
    while rng.random() >= NO_CROP:
        draws = rng.random((4, CROP_TRIALS, 1))
        sides = np.concatenate([draws[0], draws[1]], axis=1)
        sides = (CROP_SIDE[0] + (CROP_SIDE[1] - CROP_SIDE[0]) * sides) * canvas
        start = np.concatenate([draws[2], draws[3]], axis=1) * (canvas - sides)
        first, last = start.astype(np.int64), (start + sides).astype(np.int64)
        aspect = sides[:, 1] / sides[:, 0]
        holds = ((first[:, None] < centres) & (centres < last[:, None])).all(axis=2).any(axis=1)
        good = holds & (aspect >= CROP_ASPECT[0]) & (aspect <= CROP_ASPECT[1])
        if good.any():
            trial = int(good.argmax())
            return (int(first[trial, 0]), int(first[trial, 1]),
                    int(last[trial, 0]), int(last[trial, 1]))
    return None


@dataclass(frozen=True)
class Placement:
    """An image on a larger canvas, of which a crop is mirrored and resized to a square.

    Attributes:
        width, height: of the image, pixels.
        left, top: the image's place on the canvas; 0 without expansion.
        crop: x1 y1 x2 y2 on the canvas, whole pixels; becomes the whole output.
        mirror: flip the output left to right.
        size: S, side of the square output.
    """

    width: int
    height: int
    left: int
    top: int
    crop: tuple[int, int, int, int]
    mirror: bool
    size: int

    @property
    def affine(self) -> Affine:
        """From pixels of the image to pixels of the output."""
        x1, y1, x2, y2 = self.crop
        scale = np.array([self.size / (x2 - x1), self.size / (y2 - y1)])
        shift = np.array([self.left - x1, self.top - y1]) * scale
        if self.mirror:
            scale[0], shift[0] = -scale[0], self.size - shift[0]
        return scale, shift

    @property
    def visible(self) -> tuple[int, int, int, int]:
        """x1 y1 x2 y2 of the part of the image inside the crop, in pixels of the image."""
        x1, y1, x2, y2 = self.crop
        return (max(x1 - self.left, 0), max(y1 - self.top, 0),
                min(x2 - self.left, self.width), min(y2 - self.top, self.height))

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes `[n, 4]`, relative to the image, to float32 boxes relative to the output.

        They are clipped to the output.
        """
        scale, shift = self.affine
        corners = boxes.reshape(-1, 2, 2) * [self.width, self.height] * scale + shift
        corners = np.clip(corners / self.size, 0.0, 1.0).astype(np.float32)
        if self.mirror:
            corners[:, :, 0] = corners[:, ::-1, 0]
        return corners.reshape(-1, 4)


def resample(image: np.ndarray, placement: Placement, distortion: Distortion) -> np.ndarray:
    """Render `image` uint8 `[h, w, 3]` as `placement` says: uint8 `[S, S, 3]`, bilinear.

    Canvas outside the image becomes `FILL_BGR`. `distortion` is applied to the image but not to the
    fill, before or after resampling, where there are fewer pixels.
    """
    x1, y1, x2, y2 = placement.visible
    part, size = image[y1:y2, x1:x2], placement.size
    crop = placement.crop
    if (x2 - x1, y2 - y1) == (crop[2] - crop[0], crop[3] - crop[1]):
        output = _in_cheaper_order(
            part, size * size, distortion,
            lambda pixels: cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR))
    else:
        output = np.empty((size, size, 3), np.uint8)
        cv2.rectangle(output, (0, 0), (size, size), FILL_BGR, cv2.FILLED)
        _paste(output, part, placement, distortion)
    return cv2.flip(output, 1) if placement.mirror else output


def _paste(output: np.ndarray, part: np.ndarray, placement: Placement,
           distortion: Distortion) -> None:
    """Draw the visible part of an expanded image where the crop, not yet mirrored, shows it."""
    size, (x1, y1, x2, y2) = placement.size, placement.crop
    scale = np.array([size / (x2 - x1), size / (y2 - y1)])
    visible = np.array(placement.visible).reshape(2, 2)
    place = (visible + [placement.left - x1, placement.top - y1]) * scale
    # Output pixels whose centres lie on the image.
    (left, top), (right, bottom) = np.clip(np.ceil(place - 0.5), 0, size).astype(int)
    if right <= left or bottom <= top:
        return
    start = (np.array([left, top]) + 0.5 - place[0]) / scale - 0.5
    matrix = np.array([[1.0 / scale[0], 0.0, start[0]], [0.0, 1.0 / scale[1], start[1]]])
    shape = (int(right - left), int(bottom - top))
    output[top:bottom, left:right] = _in_cheaper_order(
        part, shape[0] * shape[1], distortion,
        lambda pixels: cv2.warpAffine(pixels, matrix, shape, borderMode=cv2.BORDER_REPLICATE,
                                      flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))


def _in_cheaper_order(part: np.ndarray, output_pixels: int, distortion: Distortion,
                      resize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if part.shape[0] * part.shape[1] < output_pixels:
        return resize(distort(part, distortion))
    return distort(resize(part), distortion)


@dataclass(frozen=True)
class Distortion:
    """What one image gets; the defaults change nothing.

    Attributes:
        brightness: added to every channel, first.
        contrast: factor on every channel.
        saturation: factor on HSV's saturation.
        hue: degrees added to HSV's hue.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def within_range(self, image: np.ndarray) -> Distortion:
        """The same with brightness and contrast held back to keep `image`'s median in 0..255."""
        if self.brightness == 0.0 and self.contrast <= 1.0:
            return self
        height, width = image.shape[:2]
        grid = image[::max(height // _GRID, 1), ::max(width // _GRID, 1)]
        median = float(np.median(grid))
        brightness = min(max(self.brightness, -median), 255.0 - median)
        contrast = min(self.contrast, max(255.0 / max(median + brightness, 1.0), 1.0))
        return replace(self, brightness=brightness, contrast=contrast)


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw SSD's distortion: each of the four with probability 1/2."""
    apply = rng.random(4) < 0.5
    brightness, hue = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(-HUE, HUE)
    contrast, saturation = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    return Distortion(
        brightness=brightness if apply[0] else 0.0,
        contrast=contrast if apply[1] else 1.0,
        saturation=saturation if apply[2] else 1.0,
        hue=hue if apply[3] else 0.0)


def distort(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Return the distorted image; `image` is BGR uint8 `[h, w, 3]` and is left as it is."""
    if distortion.hue != 0.0:
        # The _FULL variants spread 360 degrees over the 256 values of a byte: hue wraps by itself.
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL)
        hsv[:, :, 0] += np.uint8(int(round(distortion.hue * 256.0 / 360.0)) % 256)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL)
    contrast, saturation = distortion.contrast, distortion.saturation
    offset = contrast * distortion.brightness
    if saturation != 1.0:
        # HSV's saturation scales the distance of every channel to the largest one.
        blue, green, red = cv2.split(image)
        largest = cv2.max(cv2.max(blue, green, blue), red, red)
        grey = cv2.merge([largest, largest, largest])
        return cv2.addWeighted(image, contrast * saturation, grey, contrast * (1.0 - saturation),
                               offset)
    if contrast != 1.0 or offset != 0.0:
        levels = np.clip(np.rint(_LEVELS * contrast + offset), 0, 255)
        return cv2.LUT(image, levels.astype(np.uint8))
    return image
