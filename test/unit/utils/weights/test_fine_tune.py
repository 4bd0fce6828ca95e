"""Training on from weights of the same or other classes, and evaluating across class lists."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import train
from backbone import BatchNorm2d, SyncBatchNorm2d
from data.classes import match_categories
from data.config import get_config
from data.shapes import write_dataset
from helpers.weight_files import NAMES, network, save
from utils.checkpoint import CheckpointName, save_checkpoint
from utils.engine import learner
from utils.errors import UserError
from utils.weights.files import WeightsFile, metadata_of, read_weights
from utils.weights.loading import class_dependent, load_for_fine_tuning, load_network
from utils.weights.safetensors import write_safetensors
from utils.weights_folder import find_checkpoint

OF_CLASSES = ["prediction_layers.0.conf_layer.weight", "prediction_layers.0.conf_layer.bias",
              "semantic_seg_conv.weight", "semantic_seg_conv.bias"]


def weights(model, **known):
    return WeightsFile("w.pth", "PyTorch", model.state_dict(), **known)


def changed(model, before):
    return [name for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])]


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("classes", [1, 3, 7])
def test_other_class_count_keeps_exactly_the_class_layers(classes):
    source, target = network(4), network(classes, seed=1)
    before = copy_of(target)
    names = [str(n) for n in range(classes)]
    report = load_for_fine_tuning(target, weights(source), names)
    assert list(report.reinitialised) == [name for name in before if name in OF_CLASSES]
    after, given = target.state_dict(), source.state_dict()
    for name, value in after.items():
        assert torch.equal(value, before[name] if name in OF_CLASSES else given[name])
    assert "4 re-initialised ({})".format(", ".join(report.reinitialised)) in str(report)
    assert len(report.loaded) + 4 == len(after)


@pytest.mark.parametrize("known,fresh", [
    (None, 0), (NAMES, 0), (NAMES[::-1], 4), (["a", "b", "c", "d"], 4)])
def test_same_count_depends_on_the_names(known, fresh):
    target = network(4, seed=1)
    report = load_for_fine_tuning(target, weights(network(4), class_names=known), NAMES)
    assert len(report.reinitialised) == fresh


def test_last_layer_of_mask_rescoring_belongs_to_the_classes():
    golden = ROOT / "test" / "golden" / "state_dict_keys.json"
    keys = list(json.loads(golden.read_text())["yolact_plus_base"]["keys"])
    expected = {"maskiou_net.maskiou_net.10.weight", "maskiou_net.maskiou_net.10.bias"}
    assert set(class_dependent(keys)) == expected | set(OF_CLASSES)


def test_backbone_alone_and_other_recipes_are_refused(tmp_path):
    target = network(4, seed=1)
    before = copy_of(target)
    path = save(network(4).backbone.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="ResNet of basic blocks alone.*--backbone_weights"):
        load_for_fine_tuning(target, read_weights(path), NAMES)
    source = weights(network(3))
    source.tensors["fpn.lat_layers.0.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"fpn.lat_layers.0.weight is \[3, 3\], expected"):
        load_for_fine_tuning(target, source, NAMES)
    del source.tensors["fpn.lat_layers.0.weight"]
    with pytest.raises(UserError, match="1 tensors missing .first: fpn.lat_layers.0.weight"):
        load_for_fine_tuning(target, source, NAMES)
    assert not changed(target, before)


def test_exact_loading_names_the_class_count_and_changes_nothing():
    target = network(3)
    before = copy_of(target)
    with pytest.raises(UserError, match="trained for 5 classes, the dataset has 3: .*--weights"):
        load_network(target, weights(network(5)))
    source = WeightsFile("w.pth", "PyTorch", {"fc.weight": torch.zeros(1), "x": torch.zeros(1)})
    with pytest.raises(UserError, match="'w.pth' does not hold this network.*tensors missing .*"
                                        "1 unknown.*first: x.*--config"):
        load_network(target, source)
    assert not changed(target, before)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine_tune") / "data"
    write_dataset(str(folder), seed=3, train=6, val=4)
    return folder


@pytest.fixture
def flags(shapes, tmp_path, request):
    return ["--data={}".format(shapes), "--config=yolact_shapes", "--batch_size=2",
            "--no_autoscale", "--num_workers=0", "--max_iter=1", "--lr=1e-9",
            "--save_folder={}".format(tmp_path / "weights"), "--no_log",
            "--node_device={}".format(request.config.getoption("--device"))]


def trained_weights(folder):
    return torch.load(find_checkpoint("latest", str(folder / "weights")))


def test_training_from_weights_of_other_classes(flags, tmp_path, capsys):
    """Almost no step is made, so the saved weights show what was loaded."""
    source = network(7)
    path = save(source.state_dict(), tmp_path / "coco.pth")
    assert train.main(flags + ["--weights=" + path, "--backbone_weights=absent.pth"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("Weights :"))
    assert "coco.pth (YOLACT, ResNet of basic blocks, 7 classes; PyTorch)" in line
    assert all(name in line for name in OF_CLASSES) and "4 re-initialised" in line
    assert "Batch norm stays frozen" in out and "Backbone :" not in out
    result = trained_weights(tmp_path)
    given = source.state_dict()
    moved = [name for name in given if name not in OF_CLASSES
             and not torch.allclose(result[name], given[name], atol=1e-3)]
    assert moved == []
    assert result["semantic_seg_conv.weight"].shape[0] == 4


def test_weights_know_their_classes(flags, tmp_path, capsys):
    """The same count with other names, told by the file: the class layers start anew."""
    path = str(tmp_path / "other.safetensors")
    with open(path, "wb") as stream:
        write_safetensors(stream, network(4).state_dict(), metadata_of(None, list("abcd")))
    assert train.main(flags + ["--weights=" + path]) == 0
    assert "4 re-initialised" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["safetensors", "pdparams"])
def test_resume_and_evaluation_from_another_format(flags, tmp_path, shapes, capsys, kind):
    from utils.convert_weights import convert

    assert train.main(flags) == 0
    latest = find_checkpoint("latest", str(tmp_path / "weights"))
    other = str(tmp_path / "yolact_shapes_0_0.") + kind
    convert(latest, other)
    assert train.main(flags + ["--resume=" + other]) == 0
    assert "Resumed weights only" in capsys.readouterr().out
    assert evaluation.main(["--trained_model=" + other, "--val_data={}".format(shapes),
                            "--cuda=False", "--num_workers=0", "--no_bar",
                            "--per_class_file="]) == 0
    out = capsys.readouterr().out
    assert f"Weights : {other} (" in out and "mask |" in out


def test_a_damaged_weights_flag_is_one_sentence(flags, tmp_path, capsys):
    for name, words in (("absent.pth", "no file"), (str(tmp_path), "is a folder")):
        assert train.main(flags + ["--weights=" + name]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_batch_norm_is_frozen_as_for_a_pretrained_backbone(tmp_path):
    from argparse import Namespace

    path = save(network(4).state_dict(), tmp_path / "w.pth")
    args = Namespace(weights=path, backbone_weights=None, resume=None, sync_bn=False,
                     save_folder=str(tmp_path))
    config = get_config("yolact_shapes", num_classes=5)
    for per_card, frozen in ((2, True), (6, False)):
        model = learner.build_model(args, config, per_card, 1, NAMES)
        assert model.bn_frozen is frozen
        assert any(isinstance(module, BatchNorm2d) for module in model.modules())
    # Over all cards enough images come together: where it is wanted most.
    args.sync_bn = True
    for cards, frozen in ((4, False), (2, True)):
        model = learner.build_model(args, config, 2, cards, NAMES)
        assert model.bn_frozen is frozen
        assert any(isinstance(module, SyncBatchNorm2d) for module in model.modules()) is not frozen


CATEGORIES = list(zip((3, 5, 8), ("cat", "dog", "Bus")))


def test_matching_classes_by_name():
    names = ["person", "bus", "cat"]
    with pytest.raises(UserError) as caught:
        match_categories(names, 3, CATEGORIES, "w.pth", "val.json")
    for part in ("person, bus, cat", "cat, dog, Bus", "--map_classes", "w.pth", "val.json"):
        assert part in str(caught.value)
    ids, notes = match_categories(names, 3, CATEGORIES, "w.pth", "val.json", by_name=True)
    assert ids == [None, 8, 3]
    assert notes == ["1 of 3 classes are not in val.json and left out: person",
                     "1 of 3 categories are unknown to w.pth and score 0: dog"]
    with pytest.raises(UserError, match="no class of w"):
        match_categories(["a"], 1, CATEGORIES, "w", "v", by_name=True)
    with pytest.raises(UserError, match="needs the class names"):
        match_categories(None, 3, CATEGORIES, "w", "v", by_name=True)
    with pytest.raises(UserError, match="3 classes, but 2 class names"):
        match_categories(names[:2], 3, CATEGORIES, "w", "v")


def test_evaluation_on_other_categories(shapes, tmp_path, capsys):
    """Refused with both lists, or mapped by name."""
    config = get_config("yolact_shapes", num_classes=4)
    annotations = os.path.join(str(shapes), "annotations", "instances_val2017.json")
    with open(annotations) as stream:
        names = [category["name"] for category in json.load(stream)["categories"]]
    stored = ["zebra", names[2], names[0]]
    path = save_checkpoint(CheckpointName("yolact_shapes", 0, 1).path(str(tmp_path)),
                           network(3).state_dict(),
                           {"config": config.to_dict(), "class_names": stored})
    command = ["--trained_model=" + path, "--val_data={}".format(shapes), "--cuda=False",
               "--num_workers=0", "--no_bar", "--output_coco_json", "--per_class_file=",
               "--bbox_det_file={}".format(tmp_path / "b.json"),
               "--mask_det_file={}".format(tmp_path / "m.json")]
    assert evaluation.main(command) == 2
    error = capsys.readouterr().err
    assert ", ".join(stored) in error and ", ".join(names) in error and "--map_classes" in error
    assert evaluation.main(command + ["--map_classes"]) == 0
    out = capsys.readouterr().out
    assert "left out: zebra" in out and "score 0: " in out
    with open(annotations) as stream:
        ids = {category["name"]: category["id"] for category in json.load(stream)["categories"]}
    found = {record["category_id"] for record in json.loads((tmp_path / "b.json").read_text())}
    assert found and found <= {ids[names[0]], ids[names[2]]}


@pytest.mark.parametrize("metadata,words", [
    ({"config": '{"name": "yolact_shapes", "max_size": 160}'}, "has no 'dataset'"),
    ({"config": json.dumps(dict(get_config("yolact_shapes").to_dict(), max_size="large"))},
     "max_size"),
    ({"config": '{"name": 3}'}, "has no 'name'"),
    (metadata_of(get_config("yolact_shapes").to_dict(), ["a"]), "1 class names")])
def test_metadata_that_does_not_belong_is_one_sentence(shapes, tmp_path, capsys, metadata, words):
    path = str(tmp_path / "x.safetensors")
    with open(path, "wb") as stream:
        write_safetensors(stream, network(4).state_dict(), metadata)
    assert evaluation.main(["--trained_model=" + path, "--val_data={}".format(shapes),
                            "--cuda=False", "--num_workers=0", "--no_bar"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
