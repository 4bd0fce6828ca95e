"""Photos with an EXIF orientation: read as they were annotated, counted, converted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.coco import CocoDataset
from data.image import read_header, read_image
from data.tools.findings import turned_notes
from helpers.coco_files import document, write_images, write_json
from helpers.convert_files import opened, run
from utils.errors import UserError

WIDTH, HEIGHT = 64, 48  # as stored
WIDE, TALL, SQUARE = (WIDTH, HEIGHT), (HEIGHT, WIDTH), (WIDTH, WIDTH)
KINDS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}}


def photo(path, orientation, width=WIDTH, height=HEIGHT):
    """Write a photo; return it as stored and as shown, BGR."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:height // 2, :, 0], pixels[:, :width // 3, 1], pixels[:, :, 2] = 200, 150, 60
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[274] = orientation
    suffix = path.suffix[1:]
    image.save(str(path), exif=exif.tobytes(), **KINDS.get(suffix, {}))
    with Image.open(str(path)) as written:
        shown = np.asarray(ImageOps.exif_transpose(written).convert("RGB"))
        return np.asarray(written.convert("RGB"))[:, :, ::-1], shown[:, :, ::-1]


def like(image, expected):
    return image.shape == expected.shape and np.abs(image.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("suffix", sorted(KINDS))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_annotated_size_tells_how_to_read(tmp_path, suffix, orientation):
    path = tmp_path / ("a." + suffix)
    stored, shown = photo(path, orientation)
    as_stored = orientation >= 5
    assert like(read_image(path, size=shown.shape[1::-1]), shown)
    assert like(read_image(path, size=stored.shape[1::-1]), stored if as_stored else shown)
    assert like(read_image(path), shown)
    header = read_header(path)
    assert header == (stored.shape[1::-1], shown.shape[1::-1], orientation > 1)
    assert header.shown == header.annotated(None)


def test_tiff_is_always_as_shown(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(str(tmp_path / "a.tiff"),
                                                                 exif=exif)
    assert read_image(tmp_path / "a.tiff").shape == (WIDTH, HEIGHT, 3)
    assert read_header(tmp_path / "a.tiff") == ((WIDTH, HEIGHT), (HEIGHT, WIDTH), True)


def test_large_images_are_measured_without_a_warning(tmp_path, monkeypatch, recwarn):
    photo(tmp_path / "a.jpg", 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)  # Pillow warns from here
    assert read_header(tmp_path / "a.jpg") == (WIDE, TALL, True)
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 3)  # Pillow refuses
    with pytest.raises(OSError, match="3072 pixels"):
        read_header(tmp_path / "a.jpg")


def make(tmp_path, photos):
    """A dataset of one square in the upper left corner of each picture as it is annotated."""
    images = []
    for number, (orientation, size, stored) in enumerate(photos, 1):
        photo(tmp_path / "images" / f"{number}.jpg", orientation, *stored)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": size[0],
                       "height": size[1]})
    content = dict(document(), images=images)
    content["annotations"] = [dict(content["annotations"][0], id=n, image_id=n)
                              for n in range(1, len(images) + 1)]
    return CocoDataset(tmp_path / "images", write_json(tmp_path, content))


def test_datasets_read_and_count_them(tmp_path):
    dataset = make(tmp_path, [(6, TALL, WIDE), (8, TALL, WIDE), (6, WIDE, WIDE), (3, WIDE, WIDE),
                              (6, SQUARE, SQUARE), (1, WIDE, WIDE)])
    assert [sample.image.shape[1::-1] for sample in map(dataset.__getitem__, range(6))] == [
        TALL, TALL, WIDE, WIDE, SQUARE, WIDE]
    note, = turned_notes({"train": dataset})
    assert note.startswith("train: 5 images with an EXIF orientation (1.jpg, 2.jpg, 3.jpg, 4.jpg, ")
    assert "5.jpg), read upright as viewers show them, but 1 (3.jpg) as stored" in note
    (tmp_path / "images" / "1.jpg").write_bytes(b"no image")
    assert "train: 4 images" in turned_notes({"train": dataset})[0]


def test_upright_photos_need_no_note(tmp_path):
    write_images(tmp_path)
    dataset = CocoDataset(tmp_path / "images", write_json(tmp_path, document()))
    assert turned_notes({"train": dataset}) == []


def test_a_size_that_fits_neither_way_is_refused(tmp_path):
    dataset = make(tmp_path, [(6, (WIDTH, 20), WIDE)])
    with pytest.raises(UserError, match="is 48 x 64 pixels .* says 64 x 20"):
        dataset[0]


@pytest.mark.parametrize("size", [TALL, WIDE])
def test_labelme_files_tell_too(tmp_path, capsys, size):
    raw = tmp_path / "raw"
    stored, shown = photo(raw / "a.jpg", 6)
    shape = {"label": "cat", "points": [[4, 4], [20, 4], [20, 30], [4, 30]],
             "shape_type": "polygon"}
    (raw / "a.json").write_text(json.dumps({
        "imagePath": "a.jpg", "imageWidth": size[0], "imageHeight": size[1], "shapes": [shape]}))
    code, out = run(capsys, "labelme", raw, "--out", tmp_path / "out", "--val_fraction=0")
    assert code == 0, out
    dataset = opened(tmp_path / "out")
    assert dataset.image_info(0) == ("a.jpg",) + size
    assert like(dataset[0].image, shown if size == TALL else stored)


def test_yolo_coordinates_refer_to_the_picture_as_shown(tmp_path, capsys):
    photo(tmp_path / "raw" / "images" / "a.jpg", 6)
    (tmp_path / "raw" / "labels").mkdir()
    (tmp_path / "raw" / "labels" / "a.txt").write_text("0 0 0 0.5 0 0.5 0.25 0 0.25\n")
    (tmp_path / "raw" / "classes.txt").write_text("cat\n")
    code, out = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out",
                    "--val_fraction=0")
    assert code == 0, out
    dataset = opened(tmp_path / "out")
    assert dataset[0].image.shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_allclose(dataset[0].boxes, [[0, 0, 0.5, 0.25]])
