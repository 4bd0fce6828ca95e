"""Commands of the published ports, as they are typed there, on small data."""

from __future__ import annotations

import json
import shutil

import pytest

import eval as eval_program
import train
from data import shapes
from utils import convert_weights

SMALL = ["--max_size=64", "--num_workers=0", "--no_log", "--max_iter=2", "--validation_epoch=-1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/coco as the original lays it out, and W.pdparams."""
    place = tmp_path_factory.mktemp("published")
    coco = place / "data" / "coco"
    assert shapes.main([str(coco), "--train=4", "--val=2"]) == 0
    (coco / "images").mkdir()
    for folder in ("train2017", "val2017"):
        for path in (coco / folder).iterdir():
            path.rename(coco / "images" / path.name)
        (coco / folder).rmdir()
    info = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    del info["annotations"]
    (coco / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(info))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(str(place))
        assert train.main(["--config=yolact_shapes_config", "--batch_size=2", *SMALL]) == 0
        weights, = (place / "weights").glob("*.pth")
        assert convert_weights.main([str(weights), str(place / "W.pdparams")]) == 0
    return place


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(str(place))


def test_evaluation_on_test_dev(place, capsys):
    assert eval_program.main(["--trained_model=W.pdparams", "--output_coco_json",
                              "--dataset=coco2017_testdev_dataset", "--cuda=True",
                              "--config=yolact_shapes_config"]) == 0
    assert "Results of 2 images written" in capsys.readouterr().out
    assert (place / "results" / "mask_detections.json").is_file()


def test_evaluation_of_the_newest_weights(capsys):
    assert eval_program.main(["--trained_model=latest", "--dataset=coco2017_dataset"]) == 0
    assert "  mask | " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    ["--batch_size=2", "--trained_model=W.pdparams"],
    ["--batch_size", "2", "--lr", "0.000125", "--resume="],
    ["--batch_alloc=2", "--resume=", "--dataset=coco2017_dataset"],
])
def test_training(capsys, flags):
    assert train.main(["--config=yolact_shapes_config", *flags, *SMALL]) == 0
    assert "Final weights : " in capsys.readouterr().out


def test_resuming_by_the_iteration_in_the_name(place, capsys):
    weights, = (place / "weights").glob("*.pth")
    shutil.copy(str(weights), str(place / "weights" / "yolact_shapes_10_32100.pth"))
    assert train.main(["--config=yolact_shapes_config", "--batch_size=2", *SMALL[:-2],
                       "--resume=weights/yolact_shapes_10_32100.pth", "--start_iter=-1",
                       "--max_iter=32101", "--validation_epoch=-1", "--no_autoscale"]) == 0
    assert "iterations 32100 to 32101" in capsys.readouterr().out
