"""Folders as other tools leave them, small, of the same six images with the same two objects."""

from __future__ import annotations

import json
import struct
import zlib

import cv2
import numpy as np

SIDE = 64
NAMES = "abcdef"
BOXES = [(4, 6, 30, 40), (36, 10, 60, 30)]
"""x1, y1, x2, y2 of both objects of every image, in pixels."""


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(ord(path.stem[0])).randint(0, 256, (SIDE, SIDE, 3))
    cv2.imwrite(str(path), pixels.astype(np.uint8))


def mask(path, numbers):
    """Each box filled with its number, or its colour in OpenCV's order."""
    pixels = np.zeros((SIDE, SIDE, *np.shape(numbers)[1:]), np.uint8)
    for number, (x1, y1, x2, y2) in zip(numbers, BOXES):
        pixels[y1:y2, x1:x2] = number
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)


def corners(box):
    x1, y1, x2, y2 = box
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def labelme(folder):
    for name in NAMES:
        picture(folder / f"{name}.png")
        text(folder / f"{name}.json", json.dumps({"imagePath": f"{name}.png", "shapes": [
            {"label": "cat", "points": corners(box)} for box in BOXES]}))


def yolo_labels(path):
    text(path, "".join("0 " + " ".join(str(value / SIDE) for point in corners(box)
                                       for value in point) + "\n" for box in BOXES))


def yolo(folder):
    for name, split in zip(NAMES, ["train"] * 4 + ["valid"] * 2):
        picture(folder / split / "images" / f"{name}.png")
        yolo_labels(folder / split / "labels" / f"{name}.txt")
    text(folder / "data.yaml", "train: ../train/images\nval: ../valid/images\n"
                               "test: ../test/images\nnc: 1\nnames: ['cat']\n")


def yolo_without_description(folder):
    for name, split in zip(NAMES, ["train"] * 4 + ["val"] * 2):
        picture(folder / "images" / split / f"{name}.png")
        yolo_labels(folder / "labels" / split / f"{name}.txt")
    text(folder / "classes.txt", "cat\n")


def roboflow(folder, splits=("train",) * 4 + ("valid",) * 2, name="_annotations.coco.json"):
    """With the root category that Roboflow writes."""
    for split in set(splits):
        names = [name for name, place in zip(NAMES, splits) if place == split]
        for stem in names:
            picture(folder / split / f"{stem}.png")
        annotations = [{"image_id": n, "category_id": 1, "segmentation": [sum(corners(box), [])],
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": 1, "iscrowd": 0} for n in range(len(names)) for box in BOXES]
        text(folder / split / name, json.dumps({
            "info": {}, "categories": [{"id": 0, "name": "cat", "supercategory": "none"},
                                       {"id": 1, "name": "cat", "supercategory": "cat"}],
            "images": [{"id": n, "file_name": f"{stem}.png", "width": SIDE, "height": SIDE}
                       for n, stem in enumerate(names)],
            "annotations": [dict(item, id=n) for n, item in enumerate(annotations)]}))


def roboflow_without_split(folder):
    roboflow(folder, ("train",) * 6)


def voc(folder):
    folder = folder / "VOC2012"
    for name in NAMES:
        picture(folder / "JPEGImages" / f"{name}.png")
        mask(folder / "SegmentationObject" / f"{name}.png", [1, 2])
        objects = "".join(
            f"<object><name>cat</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>" for x1, y1, x2, y2 in BOXES)
        text(folder / "Annotations" / f"{name}.xml",
             f"<annotation><filename>{name}.png</filename>{objects}</annotation>")


def cvat_masks(folder):
    """As "Segmentation mask 1.1": masks of the labels' colours."""
    for name in NAMES:
        picture(folder / "JPEGImages" / "a day" / f"{name}.png")
        mask(folder / "SegmentationClass" / "a day" / f"{name}.png", [(83, 50, 250)] * 2)
        mask(folder / "SegmentationObject" / "a day" / f"{name}.png", [(0, 128, 0), (0, 0, 128)])
    text(folder / "ImageSets" / "Segmentation" / "default.txt",
         "".join(f'"a day/{name}"\n' for name in NAMES))
    text(folder / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\n"
                                  "cat:250,50,83::\n")


def labelme2voc(folder):
    for name in NAMES:
        picture(folder / "JPEGImages" / f"{name}.jpg")
        mask(folder / "SegmentationClass" / f"{name}.png", [1, 1])
        mask(folder / "SegmentationObject" / f"{name}.png", [1, 2])
    text(folder / "class_names.txt", "_background_\ncat\n")


def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(kind, shape, name, *rest):
    """An array of a MAT-file."""
    return element(14, b"".join([
        element(6, struct.pack("<II", kind, 0)), element(5, struct.pack("<ii", *shape)),
        element(1, name), *rest]))


def mat_file():
    """What SBD says of an image, by the format's description; SciPy reads the same from it (tried
    by hand).
    """
    numbers = np.zeros((SIDE, SIDE), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(BOXES, 1):
        numbers[y1:y2, x1:x2] = number
    fields = [matrix(9, (SIDE, SIDE), b"", element(2, numbers.tobytes(order="F"))),
              matrix(1, (1, 1), b"", matrix(9, (1, 1), b"", element(2, b"x"))),
              matrix(9, (2, 1), b"", struct.pack("<HH4s", 2, 2, bytes([8, 8])))]
    return matrix(2, (1, 1), b"GTinst", struct.pack("<HHi", 5, 4, 16), element(
        1, b"".join(name.ljust(16, b"\0") for name in (
            b"Segmentation", b"Boundaries", b"Categories"))), *fields)


def sbd(folder):
    for name, split in zip(NAMES, ["train"] * 4 + ["val"] * 2):
        picture(folder / "dataset" / "img" / f"{name}.jpg")
        path = folder / "dataset" / "inst" / f"{name}.mat"
        path.parent.mkdir(exist_ok=True)
        packed = zlib.compress(mat_file())
        path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
                         + struct.pack("<II", 15, len(packed)) + packed)
        with open(str(folder / "dataset" / f"{split}.txt"), "a") as stream:
            stream.write(f"{name}\n")


def nuclei(folder):
    for name in NAMES:
        picture(folder / "stage1_train" / name / "images" / f"{name}.png")
        for n in range(2):
            mask(folder / "stage1_train" / name / "masks" / f"0{n}ef.png",
                 [255 * (n == 0), 255 * (n == 1)])
    picture(folder / "stage1_test" / "z" / "images" / "z.png")


def penn_fudan(folder):
    for name in NAMES:
        picture(folder / "PNGImages" / f"{name}.png")
        mask(folder / "PedMasks" / f"{name}_mask.png", [1, 2])
        text(folder / "Annotation" / f"{name}.txt", "# Compatible with PASCAL")


def plants(folder):
    for name in NAMES:
        picture(folder / "A1" / f"{name}_rgb.png")
        mask(folder / "A1" / f"{name}_label.png", [7, 9])
        mask(folder / "A1" / f"{name}_fg.png", [1, 1])
        mask(folder / "A1" / f"{name}_centers.png", [0, 1])


def folders_of_masks(folder):
    for name, split in zip(NAMES, ["train"] * 4 + ["val"] * 2):
        picture(folder / split / "images" / f"{name}.jpg")
        mask(folder / split / "masks" / name / "0.png", [255, 0])
        mask(folder / split / "masks" / f"{name}_1.png", [0, 255])


def numbers_beside_images(folder):
    for name in NAMES:
        picture(folder / "images" / f"{name}.jpg")
        mask(folder / "masks" / f"{name}.png", [1, 2])


LAYOUTS = {
    labelme: ("labelme", "cat", (5, 1)),
    yolo: ("yolo", "cat", (4, 2)),
    yolo_without_description: ("yolo", "cat", (4, 2)),
    roboflow: ("coco", "cat", (4, 2)),
    roboflow_without_split: ("coco", "cat", (5, 1)),
    voc: ("voc", "cat", (5, 1)),
    cvat_masks: ("voc", "cat", (5, 1)),
    labelme2voc: ("voc", "cat", (5, 1)),
    sbd: ("sbd", "cat", (4, 2)),
    nuclei: ("masks", "object", (5, 1)),
    penn_fudan: ("masks", "object", (5, 1)),
    plants: ("masks", "object", (5, 1)),
    folders_of_masks: ("masks", "object", (4, 2)),
    numbers_beside_images: ("masks", "object", (5, 1)),
}
