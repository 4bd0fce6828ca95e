"""The plugin's fused cross entropy: equal to PyTorch's alone, in steps and in train.py."""

from __future__ import annotations

import pytest
import torch

import train
from data.shapes import write_dataset
from helpers.deterministic import load_deterministic_weights, small_config
from helpers.loss_reference import golden_images, target_batch
from layers import fused_ops
from layers.fused_ops import kernel_problem, npu_cross_entropy
from layers.multibox_loss import MultiBoxLoss, cross_entropy, ohem_cross_entropy
from npu import counters
from train import train_step
from utils.amp import batch_norm_parameters, build_precision
from utils.device import saturates
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.optimizer import build_optimizer
from yolact import build_yolact

STEPS, CLASSES = 3, 7
KERNELS = {"CrossEntropyLoss", "CrossEntropyLossGrad"}


@pytest.fixture(autouse=True)
def only_on_an_npu(device):
    if device.type != "npu" or saturates(device):
        pytest.skip("runs with --device npu, on a card of the A2 or A3 series")


def test_the_trial_passes(device):
    assert kernel_problem("cross_entropy", device) == ""


def test_the_trial_sees_a_wrong_result(device, monkeypatch):
    monkeypatch.setattr(fused_ops, "npu_cross_entropy",
                        lambda logits, labels: npu_cross_entropy(logits, labels * 0))
    assert "deviates" in fused_ops.try_cross_entropy(device, cross_entropy)
    monkeypatch.setattr(fused_ops, "npu_cross_entropy", None)
    assert "failed its trial" in fused_ops.try_cross_entropy(device, cross_entropy)


def targets_with(kind):
    """Targets [2, 60], and how many are positive in each image."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(-1, CLASSES, (2, 60), generator=generator, dtype=torch.int32)
    if kind == "no neutral ones":
        targets = targets.clamp(min=0)
    elif kind == "an image of neutral ones":
        targets[1] = -1
    elif kind == "neutral ones only":
        targets[:] = -1
    elif kind == "few positives":
        targets = torch.where(torch.arange(60) < 2, targets, torch.zeros_like(targets))
    return targets, (targets > 0).sum(1)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4], ids=str)
@pytest.mark.parametrize("kind", ["some neutral ones", "no neutral ones", "few positives",
                                  "an image of neutral ones", "neutral ones only"])
def test_losses_and_gradients_equal_the_plain_ones(device, kind, scale):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 60, CLASSES, generator=generator) * scale
    targets, positives = (x.to(device) for x in targets_with(kind))
    factors = torch.tensor([1, 2, 0.5, 1, 3, 1, 0.1], device=device)
    results = []
    for row_losses in (npu_cross_entropy, cross_entropy):
        conf = logits.to(device).requires_grad_()
        total, mined = ohem_cross_entropy(conf, targets, positives, 3, factors, row_losses)
        total.backward()
        results.append((total.detach().cpu(), mined.cpu(), conf.grad.cpu()))
    (total, mined, gradient), (wanted, wanted_mined, wanted_gradient) = results
    assert torch.equal(mined, wanted_mined)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)
    neutral = (targets < 0).cpu()
    assert not gradient[neutral].any()
    assert bool(gradient.any()) == bool((targets > 0).any())


def test_as_many_rows_as_are_allowed(device):
    """The emulator refuses one more."""
    rows = fused_ops.CROSS_ENTROPY_ROWS
    labels = torch.zeros(rows, dtype=torch.int64)
    logits = torch.linspace(-3, 3, rows * 2).reshape(rows, 2)
    found = npu_cross_entropy(logits.to(device), labels.to(device)).cpu()
    torch.testing.assert_close(found, cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)


def losses_of_steps(golden, device, row_losses, level):
    """Losses of steps of yolact_resnet50 at 138 px."""
    data = golden("train4steps_resnet50_138")
    config = small_config("yolact_resnet50")
    network = load_deterministic_weights(build_yolact(config)).to(device).train()
    network.freeze_bn()
    precision = build_precision(level, "128", "bfloat16", device)
    optimizer = build_optimizer(
        config, network, last=batch_norm_parameters(network) if level == "O2" else ())
    precision.prepare(network, optimizer)
    criterion = MultiBoxLoss.from_config(config, row_losses=row_losses).to(device)
    images = torch.from_numpy(data["in_x"])
    batch = target_batch(config, golden_images(data)).to(device)
    batch.images = images.to(device)
    return [{name: loss.item() for name, loss in train_step(
        network, criterion, optimizer, [batch], 1e-3, Sharing(Processes(), device),
        precision).items()} for _ in range(STEPS)]


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_steps_equal_the_plain_ones(golden, device, level):
    plain = losses_of_steps(golden, device, cross_entropy, level)
    fused = losses_of_steps(golden, device, npu_cross_entropy, level)
    for found, wanted in zip(fused, plain):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert plain[0]["C"] != pytest.approx(plain[-1]["C"], rel=1e-3)  # it has trained


def run(monkeypatch, tmp_path, *more):
    """Losses of each step of train.py, and the operators that ran."""
    real, seen = MultiBoxLoss.forward, []

    def forward(self, *args):
        losses = real(self, *args)
        seen.append({name: loss.item() for name, loss in losses.items()})
        return losses

    counters.reset()
    with monkeypatch.context() as patch:
        patch.setattr(MultiBoxLoss, "forward", forward)
        assert train.main(["--data={}".format(tmp_path / "data"), "--config=yolact_shapes",
                           "--batch_size=2", "--no_autoscale", "--num_workers=0", "--no_log",
                           "--save_folder={}".format(tmp_path / "weights"), "--max_iter=4",
                           "--no_run_folder", "--node_device=npu"] + list(more)) == 0
    return seen, set(counters.operators())


@pytest.mark.launch
@pytest.mark.parametrize("more", [[], ["--opt_level=O1", "--amp_dtype=bfloat16",
                                       "--class_weights=balanced", "--multi_scale=128,160"]],
                         ids=["alone", "with all else"])
def test_a_run_with_it_equals_one_without(device, monkeypatch, tmp_path, more):
    if not counters.available():
        pytest.skip("only the emulator counts its operators")
    write_dataset(str(tmp_path / "data"), seed=3, train=13, val=4)
    plain, without = run(monkeypatch, tmp_path, *more)
    fused, used = run(monkeypatch, tmp_path, "--fused_loss", *more)
    assert len(fused) == len(plain) == 4
    for found, wanted in zip(fused, plain):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert used >= KERNELS and not KERNELS & without


@pytest.mark.launch
def test_a_card_without_it_is_one_sentence(device, monkeypatch, tmp_path, capsys):
    if not counters.available():
        pytest.skip("only the emulator can lack an operator")
    write_dataset(str(tmp_path / "data"), seed=3, train=13, val=4)
    monkeypatch.setenv("NPUEMU_REFUSE", "CrossEntropyLossGrad")
    monkeypatch.delenv("NPUEMU_LOG")  # this error is meant to be
    assert train.main(["--data={}".format(tmp_path / "data"), "--config=yolact_shapes",
                       "--batch_size=2", "--no_log", "--no_run_folder", "--node_device=npu",
                       "--save_folder={}".format(tmp_path / "weights"), "--fused_loss"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --fused_loss is the Ascend plugin's cross entropy, but the "
                            "plugin's operator failed its trial (")
    assert error.endswith("); leave it out")
