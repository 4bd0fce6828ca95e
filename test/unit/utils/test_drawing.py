"""Pictures: colours, plates inside the picture, masks blended, inputs left alone."""

from __future__ import annotations

import numpy as np

from utils import drawing
from utils.drawing import class_color, draw_instances, side_by_side

GREY = 90


def picture(height=120, width=160):
    return np.full((height, width, 3), GREY, np.uint8)


def mask(top, bottom, left, right, height=120, width=160):
    result = np.zeros((1, height, width), bool)
    result[0, top:bottom, left:right] = True
    return result


def no_plates():
    return np.zeros((120, 160), np.int32)


def test_colors_differ_between_classes():
    names = [f"class{i}" for i in range(80)]
    colors = np.array([class_color(name, names) for name in names], float)
    apart = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    np.fill_diagonal(apart, 999)
    assert apart.min() > 8
    assert apart[:8, :8].min() > 90


def test_mask_is_blended_and_the_rest_untouched():
    image = picture()
    region = mask(40, 80, 50, 100)
    result = draw_instances(image, np.array([[50, 40, 100, 80]]), region, [""])
    assert (image == GREY).all()
    color = np.array(class_color("", ()))
    expected = GREY * (1 - drawing.MASK_OPACITY) + color * drawing.MASK_OPACITY
    assert np.abs(result[60, 75] - expected).max() <= 1
    assert np.abs(result[60, 50].astype(int) - color).max() < 80
    assert (result[:36] == GREY).all() and (result[:, 110:] == GREY).all()


def test_labels_stay_inside_wherever_the_box_is():
    style = drawing._style(picture())
    for box in ([-20, -20, 5, 5], [150, 110, 200, 150], [0, 0, 160, 120], [158, 1, 160, 3]):
        for text in ("circle 0.98", "a very long class name that cannot fit in this picture 0.55"):
            plate = drawing._place(no_plates(), np.array(box, float), text, style)
            assert 0 <= plate.left < plate.right <= 160
            assert 0 <= plate.top < plate.bottom <= 120
            result = draw_instances(picture(), np.array([box]), None, [text])
            assert (result != GREY).any(axis=2).sum() > 100


def test_labels_avoid_each_other():
    style = drawing._style(picture())
    plates = no_plates()
    for _ in range(4):
        plate = drawing._place(plates, np.array([40, 40, 110, 80.0]), "star 0.90", style)
        assert not plate.on(plates).any()
        plate.on(plates)[...] += 1


def test_text_contrasts_with_its_plate():
    for name in ("circle", "square", "triangle", "star", "person", "tie"):
        result = draw_instances(picture(), np.array([[30, 50, 140, 110]]), None, [name])
        plate = drawing._place(no_plates(), np.array([30, 50, 140, 110.0]), name,
                               drawing._style(picture()))
        luma = result[plate.top:plate.bottom, plate.left:plate.right] @ [0.114, 0.587, 0.299]
        assert np.ptp(luma) > 90


def test_box_edges_are_where_they_belong():
    result = draw_instances(picture(), np.array([[30, 50, 140, 110]]), None, [""])
    changed = (result != GREY).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert abs(rows.min() - 49.5) <= 2 and abs(rows.max() - 109.5) <= 2
    assert abs(columns.min() - 29.5) <= 2 and abs(columns.max() - 139.5) <= 2
    whole = draw_instances(picture(), np.array([[-50, -50, 999, 999]]), None, [""])
    for edge in (whole[0], whole[-1], whole[:, 0], whole[:, -1]):
        assert (edge != GREY).any(axis=1).all()


def test_nothing_to_draw():
    image = picture()
    for masks in (None, np.zeros((0, 120, 160), bool)):
        assert np.array_equal(draw_instances(image, np.zeros((0, 4)), masks, []), image)
    empty = draw_instances(image, np.array([[5, 5, 5, 5]]), np.zeros((1, 120, 160), bool), ["x"])
    assert empty.shape == image.shape


def test_side_by_side():
    first, second = picture(100, 80), np.full((60, 200, 3), 200, np.uint8)
    both = side_by_side([first, second], ["ground truth", "a title too long for such a picture"])
    assert both.dtype == np.uint8 and both.shape[0] > 100 and both.shape[1] > 280
    assert (both == GREY).all(axis=2).sum() >= 100 * 80
    assert (both == 200).all(axis=2).sum() >= 60 * 200


def test_a_small_mask_costs_its_own_pixels(monkeypatch):
    """Also where it is as large as the image: windows and whole masks are drawn alike."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (120, 160, 3)).astype(np.uint8)
    pixels = generator.random((9, 12)) < 0.7
    whole = np.zeros((120, 160), bool)
    whole[30:39, 50:62] = pixels
    blended = []

    def lut(part, table):
        blended.append(part.shape[:2])
        return look_up(part, table)

    look_up = drawing.cv2.LUT
    monkeypatch.setattr(drawing.cv2, "LUT", lut)
    boxes = np.array([[50, 30, 62, 39]])
    results = [draw_instances(image, boxes, [mask], ["cat"])
               for mask in (whole, drawing.MaskWindow(50, 30, pixels))]
    np.testing.assert_array_equal(*results)
    assert blended == [(9, 12)] * 2
