from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from data.coco import CocoDataset
from data.datasets import open_dataset
from data.image import read_image
from helpers.coco_files import HEIGHT, WIDTH, document, write_images, write_json
from utils.errors import UserError
from utils.pixels import is_truncated


@pytest.fixture
def dataset(tmp_path):
    return CocoDataset(write_images(tmp_path), write_json(tmp_path, document()))


def test_sample(dataset):
    assert len(dataset) == 3 and dataset.max_objects == 2
    assert dataset.class_names == ["chat noir \u732b", "dog", "cup"]
    assert dataset.image_ids.tolist() == [30, 10, 20]
    assert dataset.image_info(1) == dataset.image_info(-2) == ("a.png", WIDTH, HEIGHT)
    sample = dataset[1]
    assert sample.image_id == 10
    assert sample.image.dtype == np.uint8
    np.testing.assert_array_equal(sample.image, cv2.imread(dataset.image_path(1)))
    assert sample.labels.tolist() == [2, 3, 1] and sample.labels.dtype == np.int64
    assert sample.crowd.tolist() == [False, True, False]
    assert sample.boxes.dtype == np.float32 and sample.boxes.shape == (3, 4)
    assert sample.segmentations[0][0].tolist() == [[5, 5], [15, 5], [15, 15], [5, 15]]
    assert sample.segmentations[1]["size"] == [HEIGHT, WIDTH]


def test_image_without_objects_is_a_sample(dataset):
    sample = dataset[2]
    assert sample.boxes.shape == (0, 4) and sample.labels.shape == (0,)
    assert sample.crowd.shape == (0,) and sample.segmentations == []


def test_index_out_of_range_ends_iteration(dataset):
    assert [sample.image_id for sample in dataset] == [30, 10, 20]
    assert dataset[-1].image_id == 20


def test_samples_do_not_share_memory_with_the_dataset(dataset):
    sample = dataset[1]
    sample.boxes[:] = 9
    sample.labels[:] = 9
    sample.crowd[:] = True
    sample.segmentations[0][0][:] = 9
    again = dataset[1]
    assert again.boxes.max() <= 1 and again.labels.max() == 3 and again.crowd.sum() == 1
    assert again.segmentations[0][0].max() == 15


class _Ids:
    """Item n: image id and boxes of sample n, from a worker."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        return sample.image_id, int(sample.image.sum()), sample.boxes.tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_samples(dataset, method):
    loader = torch.utils.data.DataLoader(_Ids(dataset), batch_size=1, num_workers=1,
                                         collate_fn=list, multiprocessing_context=method)
    assert [batch[0] for batch in loader] == [_Ids(dataset)[n] for n in range(3)]


def test_pickling_keeps_everything(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.class_names == dataset.class_names
    assert copy.report.sentences() == dataset.report.sentences()
    np.testing.assert_array_equal(copy[1].boxes, dataset[1].boxes)


def test_missing_folders_and_files(tmp_path):
    images, file = write_images(tmp_path), write_json(tmp_path, document())
    with pytest.raises(UserError, match="image folder not found: looked for /.*nowhere"):
        CocoDataset(tmp_path / "nowhere", file)
    with pytest.raises(UserError, match="image folder is not a folder: looked for /"):
        CocoDataset(file, file)
    with pytest.raises(UserError, match="annotation file not found: looked for /.*none.json"):
        CocoDataset(images, tmp_path / "none.json")


def test_check_images_exist(dataset):
    dataset.check_images_exist()
    for name in ("a.png", "c.png"):
        (Path(dataset.images_dir) / name).unlink()
    with pytest.raises(UserError) as error:
        dataset.check_images_exist()
    for word in ("2 of the 3", "a.png (image 10)", "c.png (image 30)", "instances.json"):
        assert word in str(error.value)
    shutil.rmtree(dataset.images_dir)
    with pytest.raises(UserError, match="3 of the 3"):
        dataset.check_images_exist()


@pytest.mark.parametrize("file_name, words", [
    ("images/a.png", "found where {folder} is given as the image folder"),
    ("C:\\data\\a.png", "a.png itself is there: leave the folders out of file_name"),
    ("train/a.png", "a.png itself is there"), ("x/y.png", "x/y.png (image 10)"),
    ("A.PNG", "images/a.png' is there, whose name differs in case"), ("a.png ", "images/a.png'"),
    ("my%20cat.png", "images/my cat.png' is there"),
    ("caf\u00e9.png", "images/cafe\\u0301.png' is there"), ("sub\\b.png", "images/sub/b.png'"),
])
def test_a_missing_image_is_looked_for_nearby(tmp_path, file_name, words):
    content = document()
    images = write_images(tmp_path)
    (images / "sub").mkdir()
    for other in ("cafe\u0301.png", "my cat.png", "sub/b.png"):
        (images / other).write_bytes(b"")
    content["images"][1]["file_name"] = file_name
    dataset = CocoDataset(images, write_json(tmp_path, content))
    with pytest.raises(UserError) as error:
        dataset.check_images_exist()
    assert words.format(folder=tmp_path) in str(error.value)


@pytest.mark.parametrize("side, good", [(30.0, True), (30.5, False), ("30", False), (True, False),
                                        (0, False), (float("nan"), False), (1e300, False)])
def test_sizes_are_whole_numbers(tmp_path, side, good):
    content = document()
    content["images"][0]["height"] = side
    images, file = write_images(tmp_path), write_json(tmp_path, content)
    if good:
        dataset = CocoDataset(images, file)
        assert dataset.image_info(0)[2] == 30 and dataset[0].image.shape == (HEIGHT, WIDTH, 3)
        return
    with pytest.raises(UserError, match="image 30 .*expected whole numbers above 0"):
        CocoDataset(images, file)


def test_images_in_subfolders(tmp_path):
    content = document()
    images = write_images(tmp_path)
    (images / "sub").mkdir()
    (images / "c.png").rename(images / "sub" / "c.png")
    content["images"][0]["file_name"] = "sub/c.png"
    dataset = CocoDataset(images, write_json(tmp_path, content))
    dataset.check_images_exist()
    assert dataset[0].image_id == 30


def _encoded(extension, options=()):
    pixels = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    return cv2.imencode(extension, pixels, list(options))[1].tobytes()


BROKEN_IMAGES = {
    "missing": (None, "not found"),
    "empty": (b"", "empty file"),
    "text": (b"this is not an image", "not an image"),
    "html": (b"<html>404</html>", "not an image"),
    "only a jpeg start": (b"\xff\xd8\xff", "truncated"),
    "jpeg one byte short": (_encoded(".jpg")[:-1], "truncated"),
    "jpeg half": (_encoded(".jpg")[:900], "truncated"),
    "jpeg header only": (_encoded(".jpg")[:200], "truncated"),
    "progressive half": (_encoded(".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[:1500], "truncated"),
    "png half": (_encoded(".png")[:900], "truncated"),
    "png short": (_encoded(".png")[:-3], "truncated"),
    "bmp header only": (_encoded(".bmp")[:20], "not an image"),
    "other size": (cv2.imencode(".png", np.zeros((HEIGHT, 7, 3), np.uint8))[1].tobytes(), "7 x 30"),
    "turned": (cv2.imencode(".png", np.zeros((WIDTH, HEIGHT, 3), np.uint8))[1].tobytes(), "EXIF"),
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_broken_image_is_one_sentence(dataset, name):
    data, word = BROKEN_IMAGES[name]
    path = Path(dataset.images_dir) / "b.jpg"
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    with pytest.raises(UserError) as error:
        dataset[2]
    for part in (word, "image 20", "b.jpg", "instances.json"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert dataset[1].image_id == 10


def test_folder_in_place_of_an_image(tmp_path):
    with pytest.raises(UserError, match="image 4"):
        read_image(tmp_path, "image 4")
    with pytest.raises(UserError, match="image 4"):
        read_image("a\0b", "image 4")


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("tail", [b"", b"\0" * 512, b"\n", b"SEFHsamsung trailer"])
def test_data_after_the_image_is_no_truncation(tmp_path, extension, tail):
    path = tmp_path / "x"
    path.write_bytes(_encoded(extension) + tail)
    assert read_image(path).shape == (HEIGHT, WIDTH, 3)


def _with_thumbnail(data):
    """Insert an application segment that holds a whole JPEG, as cameras do."""
    thumbnail = b"Exif\0\0" + _encoded(".jpg")
    return data[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + data[2:]


def test_end_of_a_thumbnail_does_not_hide_truncation():
    data = _with_thumbnail(_encoded(".jpg"))
    assert not is_truncated(data) and not is_truncated(data + b"\0\0")
    assert all(is_truncated(data[:end]) for end in (len(data) - 1, len(data) - 300, 3000))


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 4)])
def test_grey_and_transparent_images_become_bgr(tmp_path, shape):
    cv2.imwrite(str(tmp_path / "x.png"), np.full(shape, 100, np.uint8))
    assert read_image(tmp_path / "x.png").shape == (HEIGHT, WIDTH, 3)


def test_missing_sizes_are_read_from_the_images(tmp_path):
    content = document()
    for record in content["images"]:
        del record["width"], record["height"]
    images = write_images(tmp_path)
    dataset = CocoDataset(images, write_json(tmp_path, content))
    assert dataset.image_info(0) == ("c.png", WIDTH, HEIGHT)
    (images / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="image 10 .*a.png.*is not an image that can be read"):
        CocoDataset(images, write_json(tmp_path, content))
    (images / "a.png").unlink()
    with pytest.raises(UserError, match="image 10 .*a.png.*No such file"):
        CocoDataset(images, write_json(tmp_path, content))


def test_without_ground_truth(tmp_path):
    content = document()
    del content["annotations"]
    images, file = write_images(tmp_path), write_json(tmp_path, content)
    dataset = open_dataset("coco2017", None, str(images), str(file), "val", allow_empty=True)
    assert dataset.max_objects == 0 and dataset[0].boxes.shape == (0, 4)
    with pytest.raises(UserError, match="of 0 annotations none is an object to learn or score"):
        open_dataset("coco2017", None, str(images), str(file), "val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_equals_pycocotools(coco_mini, split, capsys):
    file = coco_mini / "annotations" / f"instances_{split}2017.json"
    dataset = CocoDataset(coco_mini / (split + "2017"), file)
    dataset.check_images_exist()
    truth = COCO(str(file))
    capsys.readouterr()
    ids = truth.getCatIds()
    assert [category.id for category in dataset.categories] == sorted(ids)
    assert dataset.report.dropped == 0 and len(dataset) == len(truth.imgs)
    arrays = [v for v in vars(dataset.annotations).values() if isinstance(v, np.ndarray)]
    assert sum(array.nbytes for array in arrays) / dataset.report.annotations < 400
    for index in range(0, len(dataset), 5):
        sample = dataset[index]
        annotations = truth.imgToAnns[sample.image_id]
        height, width = sample.image.shape[:2]
        assert len(annotations) == len(sample.labels)
        for n, annotation in enumerate(annotations):
            assert dataset.categories[sample.labels[n] - 1].id == annotation["category_id"]
            assert sample.crowd[n] == annotation["iscrowd"]
            x, y, w, h = annotation["bbox"]
            np.testing.assert_allclose(sample.boxes[n] * [width, height, width, height],
                                       [x, y, x + w, y + h], atol=1e-3)
            outline = sample.segmentations[n]
            if isinstance(outline, dict):
                decoded = mask_utils.decode([outline])[:, :, 0]
                assert np.array_equal(decoded, truth.annToMask(annotation))
            else:
                assert [part.reshape(-1).tolist() for part in outline] == [
                    np.array(part, np.float32).tolist() for part in annotation["segmentation"]]
    assert dataset.max_objects == max(
        sum(not annotation["iscrowd"] for annotation in annotations)
        for annotations in truth.imgToAnns.values())
