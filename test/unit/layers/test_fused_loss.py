"""The trial of the plugin's cross entropy, with stand-ins for the plugin, and what is refused."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import train
from data.shapes import write_dataset
from layers import fused_ops
from layers.multibox_loss import MultiBoxLoss, cross_entropy, ohem_cross_entropy
from utils.engine.learner import choose_row_losses
from utils.errors import UserError

CPU, NPU = torch.device("cpu"), types.SimpleNamespace(type="npu")


def plugin_with(monkeypatch, losses=None):
    """Put a torch_npu in place whose cross entropy is `losses(logits, labels)`."""
    module = types.ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    if losses is not None:
        def operator(logits, labels, reduction):
            assert reduction == "none"
            return losses(logits, labels), None, None, None

        module.npu_cross_entropy_loss = operator
    monkeypatch.setitem(sys.modules, "torch_npu", module)


def trial():
    return fused_ops.try_cross_entropy(CPU, cross_entropy)


def without_the_largest_subtracted(logits, labels):
    return logits.exp().sum(1).log() - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


class WrongGradient(torch.autograd.Function):
    """As a kernel would be that leaves the softmax out of the rows' gradient."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, gradient):
        logits, labels = ctx.saved_tensors
        chosen = F.one_hot(labels, logits.shape[1]).float()
        return -chosen * gradient.unsqueeze(1), None


WRONG = {
    "label": lambda logits, labels: cross_entropy(logits, (labels - 1).clamp(min=0)),
    "one per cent": lambda logits, labels: cross_entropy(logits, labels) * 1.01,
    "mean": lambda logits, labels: cross_entropy(logits, labels).mean().expand(len(labels)),
    "half precision": lambda logits, labels: cross_entropy(logits.half().float(), labels),
    "overflow": without_the_largest_subtracted,
    "NaN hidden": lambda logits, labels: torch.where(
        torch.isnan(logits).any(1), torch.zeros(len(labels)), cross_entropy(logits, labels)),
    "NaN spread": lambda logits, labels: cross_entropy(logits, labels) + 0 * logits.sum(),
    "ignored class": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none",
                                                            ignore_index=0),
    "gradient": WrongGradient.apply,
}


def test_the_trial_passes_what_is_right(monkeypatch):
    plugin_with(monkeypatch, cross_entropy)
    assert trial() == ""
    plugin_with(monkeypatch, lambda logits, labels: -logits.log_softmax(1).gather(
        1, labels.unsqueeze(1)).squeeze(1))
    assert trial() == ""


@pytest.mark.parametrize("mistake", sorted(WRONG))
def test_the_trial_sees_what_is_wrong(monkeypatch, mistake):
    plugin_with(monkeypatch, WRONG[mistake])
    assert trial() == "the plugin's operator deviates from the reference in its trial"


def test_the_trial_names_what_fails(monkeypatch):
    def broken(logits, labels):
        raise RuntimeError("EZ9999\nmore")

    plugin_with(monkeypatch, broken)
    assert trial() == "the plugin's operator failed its trial (EZ9999)"
    plugin_with(monkeypatch)
    assert trial() == "the plugin has no operator npu_cross_entropy_loss"


def test_the_kernel_sees_no_label_out_of_range(device):
    """What it would do is not documented; neutral priors are -1 in the batch."""
    seen = []

    def noted(logits, labels):
        seen.append(labels)
        return cross_entropy(logits, labels)

    targets = torch.tensor([[-1, 0, 2, -1], [-1, -1, -1, -1]], device=device)
    conf = torch.randn(2, 4, 3).to(device)
    positives = torch.tensor([1, 0], device=device)
    total, _ = ohem_cross_entropy(conf, targets, positives, 3, row_losses=noted)
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [0, 0, 2, 0, 0, 0, 0, 0]
    assert torch.equal(total, ohem_cross_entropy(conf, targets, positives, 3)[0])
    assert MultiBoxLoss(3, row_losses=noted).row_losses is noted


def test_it_is_left_out_by_default(monkeypatch):
    monkeypatch.setattr("utils.engine.learner.kernel_problem", None)  # no trial either
    assert choose_row_losses(False, NPU, 99, 19248) is cross_entropy


def test_as_many_rows_as_the_operator_takes(monkeypatch):
    monkeypatch.setattr("utils.engine.learner.kernel_problem", lambda kernel, device: "")
    assert choose_row_losses(True, NPU, 10, 19248) is fused_ops.npu_cross_entropy
    assert choose_row_losses(True, NPU, 1, 199999) is fused_ops.npu_cross_entropy
    with pytest.raises(UserError) as error:
        choose_row_losses(True, NPU, 11, 19248)
    assert str(error.value) == (
        "--fused_loss is the Ascend plugin's cross entropy, but it takes 199999 rows at most, and "
        "11 x 19248 (images, priors of each) are 211728; give --batch_size=10 or less, "
        "with --accumulate for as many images a step, or leave it out")
    with pytest.raises(UserError, match="are 200000; leave it out"):
        choose_row_losses(True, NPU, 1, 200000)


def test_a_trial_that_fails_is_refused(monkeypatch):
    monkeypatch.setattr("utils.engine.learner.kernel_problem",
                        lambda kernel, device: "it is broken")
    with pytest.raises(UserError, match="but it is broken; leave it out"):
        choose_row_losses(True, NPU, 8, 19248)


def test_another_device_is_refused_before_the_first_step(tmp_path, capsys):
    write_dataset(str(tmp_path / "data"), seed=3, train=3, val=2)
    assert train.main(["--data={}".format(tmp_path / "data"), "--config=yolact_shapes",
                       "--batch_size=2", "--no_log", "--no_run_folder", "--fused_loss",
                       "--save_folder={}".format(tmp_path / "weights"), "--node_device=cpu"]) == 2
    assert capsys.readouterr().err.endswith(
        "error: --fused_loss is the Ascend plugin's cross entropy, but this device is cpu; leave "
        "it out\n")
