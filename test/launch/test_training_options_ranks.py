"""Two processes with a moving average and early stopping: equal averages, and an end together."""

from __future__ import annotations

import pytest
import torch

from data.shapes import write_dataset
from helpers.ranks import largest_difference, train_ranks
from utils.checkpoint import load_state

pytestmark = pytest.mark.launch

PREPARE = """
import torch
from utils.engine import learner
learner.AVERAGE_RAMP = 2
config_file.get_config = lambda name: get_config(name).replace(
    max_size=64, pred_scales=((8, 12), (17, 24), (34, 44)), masks_to_train=10, lr=0.05)
scores = iter([0.3, 0.2, 0.1, 0.9, 0.9, 0.9])
def validate(training, done, record, stop):
    train.share_buffers(training.learner.model, training.processes)
    with training.learner.scored_weights(training.processes):
        weights = training.learner.model.state_dict()
        torch.save({key: value.clone() for key, value in weights.items()},
                   "scored{}.pth".format(training.processes.rank))
    score = next(scores)
    if training.processes.is_main:
        training.best.update(done, score, score)
train.validate = validate
save = train.save
def save_everywhere(training, *args, **kwargs):
    torch.save({key: value.clone() for key, value in training.learner.weights().items()},
               "averages{}.pth".format(training.processes.rank))
    return save(training, *args, **kwargs)
train.save = save_everywhere
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=3, train=8, val=2)
    return folder


def test_two_processes_agree_on_averages_and_on_when_to_stop(shapes, tmp_path):
    codes, texts, weights = train_ranks(
        2, shapes, tmp_path / "run", PREPARE, batch_size=2, max_iter=40, ema="0.9",
        validation_epoch=1, early_stopping=2, no_run_folder="True")
    assert codes == [0, 0], texts
    folder = tmp_path / "run"
    assert "yolact_shapes_3_6.pth" in texts[0].splitlines()[-1]
    averages = [torch.load(str(folder / f"averages{rank}.pth")) for rank in (0, 1)]
    assert largest_difference(*averages) == 0
    assert largest_difference(averages[0], weights, skip=()) == 0
    scored = [torch.load(str(folder / f"scored{rank}.pth")) for rank in (0, 1)]
    assert largest_difference(*scored, skip=()) == 0  # statistics are those of the main process
    state = load_state(str(folder / "weights" / "yolact_shapes_3_6.pth"))
    assert largest_difference(state["raw_weights"], weights) > 0
    assert state["best"]["iteration"] == 2 and state["best"]["since"] == 2
