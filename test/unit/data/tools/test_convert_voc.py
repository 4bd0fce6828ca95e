"""The converter of Pascal VOC: masks of instances, polygons, boxes, lists, broken files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from helpers.convert_files import HEIGHT, WIDTH, drawn, masks_of, opened, picture, run


def voc(folder, stem, objects, mask=None, size=(WIDTH, HEIGHT), colors=False):
    """`objects`: name and box in pixels from 0, right and bottom excluded."""
    picture(folder / "JPEGImages" / (stem + ".jpg"))
    parts = ["<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
             "<ymax>{}</ymax></bndbox>{}</object>".format(
                 name, box[0] + 1, box[1] + 1, box[2], box[3], "".join(more))
             for name, box, *more in objects]
    path = folder / "Annotations" / (stem + ".xml")
    path.parent.mkdir(exist_ok=True)
    path.write_text("<annotation><filename>{}.jpg</filename><size><width>{}</width><height>{}"
                    "</height></size>{}</annotation>".format(stem, *size, "".join(parts)))
    if mask is not None:
        target = folder / "SegmentationObject" / (stem + ".png")
        target.parent.mkdir(exist_ok=True)
        image = Image.fromarray(mask.astype(np.uint8), mode="P")
        image.putpalette(palette())
        (image.convert("RGB") if colors else image).save(str(target))


def palette():
    """VOC's: the bits of a number spread over red, green and blue, high ones first."""
    colors = []
    for number in range(256):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colors += color
    return colors


def instances():
    mask = np.zeros((HEIGHT, WIDTH), np.int64)
    mask[4:20, 4:20] = 1
    mask[10:40, 30:50] = 2
    mask[9, 30:50] = 255
    return mask


BOXES = [("cat", (4, 4, 20, 20)), ("dog", (30, 10, 50, 40))]


@pytest.mark.parametrize("colors", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_voc_masks(tmp_path, capsys, order, colors):
    voc(tmp_path / "raw", "a", BOXES[::order], instances(), colors=colors)
    assert run(capsys, "voc", tmp_path / "raw", "--out", tmp_path / "o", "--val_fraction=0")[0] == 0
    found = masks_of(opened(tmp_path / "o"), 0)
    assert [name for name, _ in found] == ["cat", "dog"][::order]
    by_name = dict(found)
    assert (by_name["cat"] == (instances() == 1)).all()
    assert (by_name["dog"] == (instances() == 2)).all()


def test_voc_splits_of_the_segmentation_lists(tmp_path, capsys):
    raw = tmp_path / "raw"
    for stem in ("a", "b"):
        voc(raw, stem, BOXES, instances())
    voc(raw, "boxes_only", BOXES)
    (raw / "ImageSets" / "Segmentation").mkdir(parents=True)
    (raw / "ImageSets" / "Segmentation" / "train.txt").write_text("b\n")
    (raw / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n")
    assert run(capsys, "voc", raw, "--out", tmp_path / "o")[0] == 0
    assert [opened(tmp_path / "o", split).image_info(0)[0] for split in ("train", "val")] == [
        "b.jpg", "a.jpg"]


def test_voc_polygons_and_boxes(tmp_path, capsys):
    outline = "<polygon><x1>4</x1><y1>4</y1><x2>20</x2><y2>4</y2><x3>20</x3><y3>20</y3></polygon>"
    voc(tmp_path / "raw", "a", [BOXES[0] + (outline,), BOXES[1]], size=(0, 0))
    flags = ("voc", tmp_path / "raw", "--out", tmp_path / "o", "--val_fraction=0")
    code, message = run(capsys, *flags)
    assert code == 2 and "a.xml: object 2 ('dog'): has a box only" in message
    assert "--boxes_as_masks" in message
    assert run(capsys, *(flags + ("--boxes_as_masks",)))[0] == 0
    (_, cat), (_, dog) = masks_of(opened(tmp_path / "o"), 0)
    assert abs(int(cat.sum()) - 128) < 12 and (dog == drawn(30, 10, 50, 40)).all()


POLYGON = "<polygon><x1>4</x1><y1>4</y1><x2>20</x2><y2>4</y2><x3>20</x3><y3>20</y3>{}</polygon>"


def test_all_polygons_of_an_object_are_taken(tmp_path, capsys):
    other = POLYGON.format("").replace(">4<", ">30<").replace(">20<", ">46<")
    voc(tmp_path / "raw", "a", [BOXES[0] + (POLYGON.format("") + other,)])
    assert run(capsys, "voc", tmp_path / "raw", "--out", tmp_path / "o", "--val_fraction=0")[0] == 0
    (_, mask), = masks_of(opened(tmp_path / "o"), 0)
    assert mask[:, :25].any() and mask[:, 30:].any()


@pytest.mark.parametrize("more", ["<x5>4</x5><y5>20</y5>", "<x4></x4><y4>20</y4>", "<x4>4</x4>",
                                  "<pt><x>4</x><y>20</y></pt>"])
def test_no_point_of_a_polygon_is_dropped(tmp_path, capsys, more):
    voc(tmp_path / "raw", "a", [BOXES[0] + (POLYGON.format(more),)])
    code, message = run(capsys, "voc", tmp_path / "raw", "--out", tmp_path / "o",
                        "--boxes_as_masks")
    assert code == 2 and "a polygon that is not x1, y1, x2, y2, .. as numbers" in message


def test_files_that_were_renamed_together(tmp_path, capsys):
    raw = tmp_path / "raw"
    for stem in ("a", "b"):
        voc(raw, stem, BOXES, instances())
        path = raw / "Annotations" / (stem + ".xml")
        path.write_text(path.read_text().replace(stem + ".jpg", "a.jpg"))
    assert run(capsys, "voc", raw, "--out", tmp_path / "o", "--val_fraction=0")[0] == 0
    dataset = opened(tmp_path / "o")
    assert [dataset.image_info(n)[0] for n in (0, 1)] == ["a.jpg", "b.jpg"]


def test_images_of_a_test_list_are_not_trained_on(tmp_path, capsys):
    raw = tmp_path / "raw"
    for stem in "abc":
        voc(raw, stem, BOXES, instances())
    (raw / "ImageSets" / "Main").mkdir(parents=True)
    (raw / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\n")
    (raw / "ImageSets" / "Main" / "test.txt").write_text("c\n")
    code, out = run(capsys, "voc", raw, "--out", tmp_path / "o", "--val_fraction=0")
    assert code == 0 and "train.json: 2 images" in out


@pytest.mark.parametrize("objects,changes,expected", [
    ([("cat", (4, 4, 20, 20))], {}, "instance 2 fits no object"),
    (BOXES + [("cup", (0, 40, 9, 48))], {}, "object 3 ('cup'): no instance of"),
    ([("", (4, 4, 20, 20))], {}, "object 1 (''): needs a name and a bndbox"),
    ([("cat", (30, 4, 20, 20))], {}, "object 1 ('cat'): needs a name and a bndbox"),
    (BOXES, {"size": (10, 10)}, "says 10 x 10 pixels"),
    (BOXES, {"mask": np.zeros((9, 9), int)}, "has 9 x 9 pixels, its image 64 x 48"),
])
def test_broken_voc(tmp_path, capsys, objects, changes, expected):
    voc(tmp_path / "raw", "a", objects, **dict({"mask": instances()}, **changes))
    code, message = run(capsys, "voc", tmp_path / "raw", "--out", tmp_path / "o")
    assert code == 2 and expected in message and message.count("\n") == 1
    assert message.count("--skip_bad") == 1


@pytest.mark.parametrize("encoding, name", [
    ("gb2312", "\u88c2\u7f1d"), ("GBK", "\u88c2\u7f1d"), ("x-unknown", "cat"),
    ("latin-1", "b\u00e4r"), ("utf-16", "cat"), ("utf-8", "\u88c2\u7f1d")])
def test_declared_encodings(tmp_path, capsys, encoding, name):
    voc(tmp_path / "raw", "a", [(name, BOXES[0][1])])
    path = tmp_path / "raw" / "Annotations" / "a.xml"
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + path.read_text()
    path.write_bytes(text.encode("ascii" if encoding == "x-unknown" else encoding))
    code, out = run(capsys, "voc", tmp_path / "raw", "--out", tmp_path / "o", "--val_fraction=0",
                    "--boxes_as_masks")
    assert code == 0, out
    assert opened(tmp_path / "o").class_names == [name]


def test_broken_voc_files(tmp_path, capsys):
    voc(tmp_path / "raw", "a", BOXES, instances())
    (tmp_path / "raw" / "Annotations" / "a.xml").write_text("<annotation>")
    code, message = run(capsys, "voc", tmp_path / "raw", "--out", tmp_path / "o")
    assert code == 2 and "a.xml: not XML" in message
    voc(tmp_path / "raw", "a", BOXES, instances())
    (tmp_path / "raw" / "JPEGImages" / "a.jpg").unlink()
    code, message = run(capsys, "voc", tmp_path / "raw", "--out", tmp_path / "o")
    assert code == 2 and "its image 'a.jpg' was not found" in message
