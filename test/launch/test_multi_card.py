"""Training and evaluation on n cards equal those on one: real processes, gloo, drawn shapes."""

from __future__ import annotations

import json
import re

import pytest

from data.shapes import write_dataset
from helpers.ranks import FROZEN, PLAIN_SGD, largest_difference, run_ranks, train_ranks

pytestmark = pytest.mark.launch
STEPS = 5
SGD = PLAIN_SGD + FROZEN


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=3, train=18, val=7)
    return folder


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """One process with the whole batch of four."""
    codes, texts, weights = train_ranks(1, shapes, tmp_path_factory.mktemp("one") / "run", SGD,
                                        batch_size=4, max_iter=STEPS)
    assert codes == [0], texts[0]
    return weights


def train_and_compare(count, shapes, folder, whole, **flags):
    codes, texts, weights = train_ranks(count, shapes, folder / "run", SGD, max_iter=STEPS, **flags)
    assert codes == [0] * count, texts
    return largest_difference(weights, whole)


def test_two_cards_train_as_one_with_the_whole_batch(shapes, tmp_path, whole):
    assert train_and_compare(2, shapes, tmp_path, whole, batch_size=2) < 1e-5


@pytest.mark.parametrize("count, batch, parts", [
    (1, 2, 2), pytest.param(2, 1, 2, marks=pytest.mark.slow)])
def test_a_step_in_parts_equals_the_whole_one(shapes, tmp_path, whole, count, batch, parts):
    assert train_and_compare(count, shapes, tmp_path, whole, batch_size=batch,
                             accumulate=parts) < 1e-5


@pytest.mark.slow
def test_four_cards_train_as_one(shapes, tmp_path, whole):
    assert train_and_compare(4, shapes, tmp_path, whole, batch_size=1) < 1e-5


@pytest.mark.slow
def test_synchronised_batch_norm_makes_two_cards_one_without_freezing(shapes, tmp_path):
    """One step: batch norm over four small images blows rounding up from step to step."""
    _, _, whole = train_ranks(1, shapes, tmp_path / "one", PLAIN_SGD, batch_size=4, max_iter=1)
    _, _, synced = train_ranks(2, shapes, tmp_path / "synced", PLAIN_SGD, batch_size=2, max_iter=1,
                               sync_bn="True")
    assert largest_difference(synced, whole, skip=()) < 1e-5
    _, _, apart = train_ranks(2, shapes, tmp_path / "apart", PLAIN_SGD, batch_size=2, max_iter=1)
    assert largest_difference(apart, whole) > 1e-4


POISON = """
import os
real, steps = run.MultiBoxLoss.forward, []
def forward(self, predictions, batch, *args, **kwargs):
    losses = real(self, predictions, batch, *args, **kwargs)
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 3:
        losses["B"] = losses["B"] * float("nan")
    return losses
run.MultiBoxLoss.forward = forward
save = train.save
def save_everywhere(training, *args, **kwargs):
    import torch
    torch.save({key: value.clone() for key, value in training.learner.model.state_dict().items()},
               "parameters{}.pth".format(training.processes.rank))
    return save(training, *args, **kwargs)
train.save = save_everywhere
"""


def test_nan_on_one_card_is_skipped_by_all(shapes, tmp_path):
    import torch

    codes, texts, weights = train_ranks(2, shapes, tmp_path / "run", SGD + POISON, batch_size=2,
                                        max_iter=STEPS)
    assert codes == [0, 0], texts
    named = [re.search(r"^iteration 2: .* not finite; update skipped.*$", text, re.M)
             for text in texts]
    assert all(named) and "B: nan" in named[1].group() and "gradient" in named[0].group()
    ranks = [torch.load(str(tmp_path / "run" / f"parameters{n}.pth")) for n in (0, 1)]
    assert largest_difference(*ranks) == 0
    assert all(torch.isfinite(value.float()).all() for value in weights.values())


EVAL = """
import sys, eval
sys.exit(eval.main(sys.argv[1:]))
"""


def scores_of(text):
    return [line for line in text.splitlines() if re.match(r" +(box|mask) \||(det|seg)", line)]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    codes, texts, _ = train_ranks(1, shapes, folder, batch_size=4, max_iter=40)
    assert codes == [0], texts
    return folder / "weights" / "yolact_shapes_10_40.pth"


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluation_shared_among_cards_equals_one_card_to_the_last_digit(
        shapes, tmp_path, trained, count):
    """Seven images in batches of two: ranks get unequally many, the last batch is not full."""
    outputs = []
    for ranks in (1, count):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        codes, texts = run_ranks(ranks, EVAL, [
            f"--trained_model={trained}", f"--val_data={shapes}",
            "--eval_device=cpu", "--batch_size=2", "--num_workers=0", "--output_coco_json"], folder)
        assert codes == [0] * ranks, texts
        assert all(not scores_of(text) for text in texts[1:])
        outputs.append((scores_of(texts[0]), [
            (folder / "results" / name).read_bytes()
            for name in ("bbox_detections.json", "mask_detections.json")]))
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0]) == 4
    assert len({found["image_id"] for found in json.loads(outputs[0][1][0].decode())}) > 3


@pytest.mark.slow
def test_validation_during_training_uses_all_cards(shapes, tmp_path):
    codes, texts, _ = train_ranks(2, shapes, tmp_path / "run", batch_size=2, max_iter=8,
                                  validation_epoch=1, validation_size=5)
    assert codes == [0, 0], texts
    assert len(scores_of(texts[0])) == 4 and not scores_of(texts[1])


GATHER = """
import sys, torch
from utils.distributed.sharing import gather_bytes
from utils.distributed.processes import Processes
processes = Processes.from_env()
device = torch.device("cpu")
processes.init(device)
mine = bytes(range(256)) * 5 + b"x" * processes.rank if processes.rank != 1 else b""
found = gather_bytes(mine, processes, device)
assert found == [bytes(range(256)) * 5, b"", bytes(range(256)) * 5 + b"xx"], found
"""


@pytest.mark.slow
def test_bytes_of_any_length_are_gathered(tmp_path):
    codes, texts = run_ranks(3, GATHER, [], tmp_path)
    assert codes == [0, 0, 0], texts


def test_what_strict_finds_ends_all_processes(shapes, tmp_path):
    """The data check runs in the main process alone; the others must not wait for it."""
    import json
    import shutil

    data = tmp_path / "data"
    shutil.copytree(str(shapes), str(data))
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [item for item in content["annotations"]
                              if item["category_id"] != 4]  # a class without an object
    path.write_text(json.dumps(content))
    codes, texts, weights = train_ranks(2, data, tmp_path / "run", batch_size=2, max_iter=2,
                                        strict="True")
    assert codes == [2, 2], texts
    assert texts[0].rstrip().splitlines()[-1].startswith("error: ") and weights is None
    assert "another process has found a problem; its log says which" in texts[1]
