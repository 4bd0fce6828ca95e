"""Pictures of every format, and folders of them through eval.py: outputs, failures, exit codes."""

from __future__ import annotations

import io
import json
import os
import threading

import cv2
import numpy as np
import pytest
from PIL import Image, features

import eval as evaluation
from data.image import image_from_pil, read_image
from helpers.prediction_weights import IDS, full_disk, noise, save_weights
from utils.errors import UserError
from utils.inference.predict import (
    PredictionOptions,
    PredictionRun,
    find_images,
    output_pair,
    split_pair,
    write_image,
)
from utils.inference.video import read_ahead
from utils.pixels import image_from_array

LEFT, RIGHT = (200, 100, 50), (10, 20, 220)  # RGB


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


def colors():
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :15], image[:, 15:] = LEFT, RIGHT
    return image


def wide(values):
    return cv2.imencode(".tiff", values)[1].tobytes()


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


BASE = Image.fromarray(colors())
BGR = colors()[:, :, ::-1]
FILES = {
    "a.jpg": saved(BASE, "JPEG", quality=95),
    "cmyk.jpg": saved(BASE.convert("CMYK"), "JPEG", quality=95),
    "cmyk.tiff": saved(BASE.convert("CMYK"), "TIFF"),
    "a.gif": saved(BASE.quantize(4), "GIF"),
    "a.webp": saved(BASE, "WEBP", lossless=True),
    "a.tga": saved(BASE, "TGA"),
    "a.bmp": saved(BASE, "BMP"),
    "alpha.png": saved(BASE.convert("RGBA"), "PNG"),
    "palette.png": saved(BASE.quantize(4), "PNG"),
    "16.png": cv2.imencode(".png", BGR.astype(np.uint16) * 257)[1].tobytes(),
    "16.tiff": wide(BGR.astype(np.uint16) * 257),
    "float.tiff": wide(BGR.astype(np.float32) / 255),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_formats(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    image = read_image(tmp_path / name)
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"]
    for column, color in ((3, LEFT), (26, RIGHT)):
        np.testing.assert_allclose(image[10, column, ::-1], color, atol=6)


@pytest.mark.parametrize("content, value", [
    (saved(BASE.convert("L"), "PNG"), int(np.asarray(BASE.convert("L"))[10, 3])),
    (saved(BASE.convert("LA"), "PNG"), int(np.asarray(BASE.convert("L"))[10, 3])),
    (saved(Image.new("1", (30, 20), 1), "PNG"), 255),
    (cv2.imencode(".png", np.full((20, 30), 40000, np.uint16))[1].tobytes(), 156),
])
def test_grey(tmp_path, content, value):
    (tmp_path / "grey.png").write_bytes(content)
    image = read_image(tmp_path / "grey.png")
    assert image.shape == (20, 30, 3)
    assert np.abs(image[10, 3].astype(int) - value).max() <= 1


@pytest.mark.parametrize("kind, options", [
    ("JPEG", {"quality": 95}), ("TIFF", {}), ("WEBP", {"lossless": True}), pytest.param(
        "AVIF", {"quality": 95}, marks=pytest.mark.skipif(
            "avif" not in features.modules, reason="this Pillow knows no AVIF"))])
def test_orientations(tmp_path, kind, options):
    for orientation, turn in ((3, cv2.ROTATE_180), (6, cv2.ROTATE_90_CLOCKWISE),
                              (8, cv2.ROTATE_90_COUNTERCLOCKWISE)):
        path = tmp_path / "a.bin"
        path.write_bytes(saved(BASE, kind, exif=exif(orientation), **options))
        image, expected = read_image(path), cv2.rotate(BGR, turn)
        assert image.shape == expected.shape
        assert np.abs(image.astype(int) - expected).mean() < 6
        other = image_from_pil(Image.open(str(path)))
        assert other.shape == image.shape and np.abs(image.astype(int) - other).mean() < 6


def test_arrays():
    grey = noise()[:, :, 0]
    assert (image_from_array(grey) == grey[:, :, None]).all()
    assert image_from_array(grey[:, :, None]).shape == (90, 120, 3)
    assert (image_from_array(colors(), rgb=True) == BGR).all()
    assert (image_from_array(grey > 99)[:, :, 0] == 255 * (grey > 99)).all()
    assert (image_from_array(noise().astype(np.float32) / 255) == noise()).all()
    assert image_from_array(np.array([[np.nan, 0.0]])).max() == 0
    assert image_from_array(np.full((2, 2), 1.5)).min() == 255  # overshoot of filters
    assert image_from_array(np.full((2, 2), -0.5)).max() == 0
    for wrong, words in (([0, 200], "0 to 200"), ([-1, 1], "-1 to 1"), ([np.nan, -9], "-9 to -9"),
                         ([np.nan, np.nan], "nan to nan"), ([0, np.inf], "0 to inf")):
        with pytest.raises(ValueError, match=f"float64 from {words}, expected floats in 0..1"):
            image_from_array(np.array([wrong], np.float64))
    assert image_from_array(np.zeros((2, 2), np.uint16)).max() == 0
    assert image_from_array(np.full((2, 2), 0x1234, ">u2")).max() == 0x12
    with pytest.raises(ValueError, match="uint16 up to 255, expected values up to 65535"):
        image_from_array(np.full((2, 2), 255, np.uint16))  # 8 bits in 16: all of it would be black
    for wrong in (np.zeros((2, 2, 2)), np.zeros((0, 4, 3)), np.zeros(3), np.zeros((4, 4), int)):
        with pytest.raises(ValueError, match="the image is"):
            image_from_array(wrong)


@pytest.mark.parametrize("values, words", [
    (np.full((9, 9), 200, np.float32), "float32 from 200 to 200, expected floats in 0..1"),
    (np.full((9, 9), 200, np.int32), "int32 from 200 to 200, expected"),
    (np.full((9, 9), -1, np.int32), "int32 from -1"),
    (np.full((9, 9), 70000, np.int32), "int32 from 70000"),
])
def test_files_are_held_to_the_range_of_arrays(tmp_path, values, words):
    image = Image.fromarray(values)
    image.save(str(tmp_path / "a.tiff"))
    for read in (lambda: read_image(tmp_path / "a.tiff"), lambda: image_from_pil(image)):
        with pytest.raises((UserError, ValueError), match=words):
            read()
    assert image_from_pil(Image.fromarray(np.full((2, 2), 40000, np.int32))).max() == 156


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"hello", "not an image"), (FILES["a.jpg"][:-300], "truncated"),
    (FILES["a.tga"][:30], "not an image"), (None, "not found"),
])
def test_unreadable_files_are_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError, match=f"(?s)bad.jpg.*{words}|{words}.*bad.jpg"):
        read_image(tmp_path / "bad.jpg")


def test_pairs(tmp_path):
    assert split_pair("a:b") == ("a", "b") and split_pair("a") == ("a", None)
    assert split_pair("a:") == ("a", None)
    (tmp_path / "12:30.jpg").write_bytes(b"")
    assert split_pair(str(tmp_path / "12:30.jpg")) == (str(tmp_path / "12:30.jpg"), None)
    for value in ("", ":b.png"):
        with pytest.raises(UserError, match="names no input"):
            split_pair(value)
    assert split_pair("rtsp://a/b") == ("rtsp://a/b", None)
    assert split_pair("rtsp://a:5/b:c.mp4") == ("rtsp://a:5/b", "c.mp4")
    assert output_pair("x/b.jpg", ".png") == ("x/b.jpg", os.path.join("results", "b.png"))
    assert output_pair("x/b.jpg:c.png", ".png") == ("x/b.jpg", "c.png")
    assert output_pair("b.avi", ".mp4") == ("b.avi", os.path.join("results", "b.mp4"))
    with pytest.raises(UserError, match="both input and output"):
        output_pair("a.png:./a.png", ".png")


def test_folders(tmp_path):
    for name in ("b.JPG", "a.png", "a.jpg", "notes.txt", "noending", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub.png").mkdir()
    images, folder, others = find_images(f"{tmp_path}:out")
    assert folder == "out" and others == 2
    assert [(os.path.basename(one.source), one.target, one.image_id) for one in images] == [
        ("a.jpg", os.path.join("out", "a.jpg.png"), 1),
        ("a.png", os.path.join("out", "a.png.png"), 2),
        ("b.JPG", os.path.join("out", "b.png"), 3),
        ("noending", os.path.join("out", "noending.png"), 4)]
    for name in ("x", "y"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        (tmp_path / "deep" / name / "a.jpg").write_bytes(b"x")
    for pattern in ("*/*.jpg", "**/*.jpg", "**"):  # equal names do not overwrite one another
        images, folder, _ = find_images(f"{tmp_path}/deep/{pattern}")
        assert folder == os.path.join("results", "deep") and [
            (one.target, one.name) for one in images] == [
                (os.path.join(folder, name, "a.png"), os.path.join(name, "a.jpg"))
                for name in "xy"]
    images, folder, _ = find_images(str(tmp_path / "*.png"))
    assert len(images) == 1 and folder == os.path.join("results", tmp_path.name)
    for value, words in (("nowhere", "no folder 'nowhere'|no folder '/.*nowhere'"),
                         (f"{tmp_path}:{tmp_path}", "both"),
                         ("{}:o".format(tmp_path / "sub.png"), "none of the 0 files"),
                         (str(tmp_path / "deep"), "in its folders give '.*/deep/[*][*]'"),
                         ("{0}/deep/*/a.jpg:{0}/deep".format(tmp_path), "both")):
        with pytest.raises(UserError, match=words):
            find_images(value)


def run(capsys, *flags):
    code = evaluation.main(["--eval_device=cpu", "--num_workers=0"] + list(flags))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def make_folder(tmp_path, count=5):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(count):
        cv2.imwrite(str(folder / f"{20 + n:012d}.png"), noise(60 + 7 * n, 80, n))
    return folder


def test_a_folder(weights, tmp_path, capsys):
    folder, out = make_folder(tmp_path), tmp_path / "out"
    code, text, err = run(capsys, "--trained_model=" + weights, "--batch_size=2", "--output_json",
                          f"--images={folder}:{out}", "--crops", "--top_k=3",
                          "--benchmark")
    assert code == 0 and err == ""
    assert "5 of 5 images drawn" in text and "15 objects" in text and "drawing" in text
    for n in range(5):
        drawn = cv2.imread(str(out / f"{20 + n:012d}.png"))
        assert drawn.shape == (60 + 7 * n, 80, 3) and (drawn != noise(60 + 7 * n, 80, n)).any()
    records = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert [record["image_id"] for record in records] == sorted([20, 21, 22, 23, 24] * 3)
    assert {record["category_id"] for record in records} <= set(IDS)
    assert records[0]["file_name"] == "000000000020.png"
    crops = sorted(os.listdir(str(out / "crops")))
    assert 10 < len(crops) <= 15 and crops[0].startswith("000000000020_0")
    assert not any("/" in name or " " in name for name in crops)
    assert cv2.imread(str(out / "crops" / crops[0]), cv2.IMREAD_UNCHANGED).shape[2] == 4


def test_one_picture_beside_its_json(weights, tmp_path, capsys):
    folder = make_folder(tmp_path, 1)
    code, text, _ = run(capsys, "--trained_model=" + weights, "--output_json", "--benchmark",
                        "--json_masks=polygon", "--top_k=2", "--image={}:{}".format(
                            folder / "000000000020.png", tmp_path / "o.jpg"))
    assert code == 0 and "2 objects drawn" in text and "network" in text
    records = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert len(records) == 2
    assert all(isinstance(part, list) for record in records for part in record["segmentation"])


@pytest.mark.parametrize("content", ["{}", "[{\"mine\": 1}]", "x"])
def test_records_replace_no_file_of_others(weights, tmp_path, capsys, content):
    source = make_folder(tmp_path, 1) / "000000000020.png"
    for target in ("--image={0}:{1}/predictions.png", "--images={0}:{1}"):
        path = tmp_path / "out" / "predictions.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        flags = "--trained_model=" + weights, "--output_json", target.format(source, path.parent)
        code, _, err = run(capsys, *flags)
        assert code == 2 and "predictions.json', where --output_json writes, is there and" in err
        assert path.read_text() == content and list(path.parent.iterdir()) == [path]
        path.unlink()
        assert run(capsys, *flags)[0] == run(capsys, *flags)[0] == 0  # its own it replaces
        for file in path.parent.iterdir():
            file.unlink()


def test_hostile_and_foreign_names(weights, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = ["a\nSaved.png", "\x1b[2J.png", "x" * 251 + ".png", os.fsdecode(b"\xc1\xd1.png")]
    for name in names:
        (folder / name).write_bytes(cv2.imencode(".png", noise())[1].tobytes())
    (folder / "broken\n\x1b[2J.png").write_bytes(b"x")
    code, text, err = run(capsys, "--trained_model=" + weights, "--output_json", "--top_k=1",
                          f"--images={folder}:{out}")
    assert code == 1 and err.count("\n") == 1 and "broken\\n\\x1b[2J.png is not" in err
    assert "4 of 5 images drawn" in text and "\x1b" not in text
    records = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert {record["file_name"] for record in records} == set(names)
    assert set(os.listdir(str(out))) == set(names) | {"predictions.json"}


def test_display_flags(weights, tmp_path, capsys):
    folder = make_folder(tmp_path, 1)
    drawn = {}
    everything = [f"--display_{what}=False"
                  for what in ("masks", "bboxes", "text", "scores")]
    for flags in [[], everything] + [[flag] for flag in everything]:
        target = tmp_path / "o.png"
        assert run(capsys, "--trained_model=" + weights, "--image={}:{}".format(
            folder / "000000000020.png", target), *flags)[0] == 0
        drawn[tuple(flags)] = cv2.imread(str(target)).tobytes()
    assert drawn[tuple(everything)] == noise(60, 80, 0).tobytes()
    assert len(set(drawn.values())) == 6


def test_unreadable_files_in_a_folder_are_counted(weights, tmp_path, capsys):
    folder, out = make_folder(tmp_path), tmp_path / "out"
    (folder / "000000000022.png").write_bytes(b"broken")
    (folder / "a.jpg").write_bytes(b"")
    code, text, err = run(capsys, "--trained_model=" + weights, "--batch_size=2",
                          f"--images={folder}:{out}")
    assert code == 1 and "4 of 6 images drawn" in text and "2 failed" in text
    assert len(err.splitlines()) == 2 and "000000000022.png" in err and "a.jpg is an empty" in err
    assert len(os.listdir(str(out))) == 4


def test_a_full_disk_is_counted_and_the_rest_goes_on(weights, tmp_path, capsys):
    folder, out = make_folder(tmp_path), tmp_path / "out"
    cv2.imwrite(str(folder / "large.png"), noise(400, 400))
    with full_disk(60000):
        code, text, err = run(capsys, "--trained_model=" + weights, "--output_json",
                              f"--images={folder}:{out}")
    assert code == 1 and "1 failed" in text and len(err.splitlines()) == 1
    assert "5 of 6 images drawn" in text
    assert "large.png" in err and "File too large" in err
    assert sorted(os.listdir(str(out))) == [f"{20 + n:012d}.png" for n in range(5)] + [
        "predictions.json"]


def test_json_that_cannot_be_written(tmp_path):
    said = []
    (tmp_path / "file").write_text("")

    def end(stem):
        made = PredictionRun(None, PredictionOptions(json=True), said.append, said.append, None)
        made._stem = str(stem)
        return made._end("done", speed=False)

    assert end(tmp_path / "file" / "p") == 1
    assert "p.json" in said[1] and said[2] == "1 failed" and os.listdir(str(tmp_path)) == ["file"]
    assert end(tmp_path / "deep" / "empty") == 0
    assert said[4].startswith("0 records in ")
    assert json.loads((tmp_path / "deep" / "empty.json").read_text()) == []


@pytest.mark.parametrize("flags, words", [
    (["--image=a.png", "--video=0"], "--image and --video exclude each other"),
    (["--images=/nonexistent"], "no folder '/nonexistent'"),
    (["--image=/nonexistent.png"], "/nonexistent.png"),
    (["--video=/nonexistent.mp4"], "/nonexistent.mp4 was not found"),
    (["--video=/"], "--video: / is no video file"),
    (["--image=/"], "'/' is a folder; --images takes one"),
    (["--video=a.mp4", "--video_multiframe=0"], "--video_multiframe is '0'"),
    (["--image=a.png", "--json_masks=polygons"], "did you mean 'polygon'?"),
])
def test_mistakes_are_one_sentence(weights, tmp_path, capsys, flags, words):
    code, _, err = run(capsys, "--trained_model=" + weights, *flags)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert words in err


def test_what_cannot_be_written_is_said(weights, tmp_path, capsys):
    with pytest.raises(UserError, match="does not write .xyz files"):
        write_image(str(tmp_path / "a.xyz"), noise())
    folder = make_folder(tmp_path, 1)
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "--trained_model=" + weights, "--image={}:{}".format(
        folder / "000000000020.png", tmp_path / "file" / "o.png"))
    assert code == 2 and "o.png" in err


def test_reading_ahead_keeps_order_and_raises_in_place():
    def items():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for item in read_ahead(items()):
            seen.append(item)
    assert seen == [1, 2]


def test_reading_ahead_stays_near_and_ends_its_thread():
    taken = []

    def endless():
        while True:
            taken.append(0)
            yield 0

    before = threading.active_count()
    ahead = read_ahead(endless(), 2)
    assert next(ahead) == 0 and threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before and len(taken) <= 3
