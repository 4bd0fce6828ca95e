"""The mask-IoU network, its loss against loops, and training it in several processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed

from data.config import get_config
from helpers import rounding
from helpers.loss_reference import target_batch
from helpers.recorder import SKIP_REASON, Recorder, available
from layers.detection import Detections
from layers.heads import MaskIouNet
from layers.masks import crop_to_boxes, mask_scores
from layers.multibox_loss import MultiBoxLoss, mask_iou_loss
from utils.errors import UserError
from yolact import build_yolact

SIDE, CLASSES = 63, 4


def _samples(device, batch=2, samples=5, seed=0):
    """Arguments of `mask_iou_loss` after the network; masks are rectangles, boxes around them."""
    rng = np.random.RandomState(seed)
    low = rng.uniform(0, 0.5, (batch, samples, 2))
    boxes = np.concatenate((low, low + rng.uniform(0.1, 0.5, low.shape)), 2).astype(np.float32)
    masks = np.zeros((batch, samples, SIDE, SIDE), np.uint8)
    for n, k in np.ndindex(batch, samples):
        x1, y1, x2, y2 = (boxes[n, k] * SIDE).astype(int)
        masks[n, k, y1:y2, x1:x2] = 1
    masks[0, 0] = 0
    masks[0, 0, 10:15, 10:15] = 1  # 25 pixels: too small to count
    masks[0, 1] = 0
    masks[0, 1, 10:12, 10:23] = 1  # 26
    logits = 3 * rng.randn(batch, samples, SIDE, SIDE) + 2 * masks
    valid = np.ones((batch, samples), bool)
    valid[1, 3:] = False
    labels = rng.randint(1, CLASSES, (batch, samples)).astype(np.int8)
    labels[1, 3:] = 0
    return [torch.from_numpy(a).to(device) for a in
            (logits.astype(np.float32), boxes, masks, labels, valid)]


def _loss_slowly(network, logits, boxes, masks, labels, valid, smallest_area):
    total = logits.sum() * 0
    for n, k in np.ndindex(*valid.shape):
        truth = masks[n, k].bool()
        if not valid[n, k] or int(truth.sum()) <= smallest_area:
            continue
        x1, y1, x2, y2 = (boxes[n, k] * SIDE).tolist()
        inside = torch.zeros(SIDE, SIDE, dtype=torch.bool, device=logits.device)
        rows = [row for row in range(SIDE) if y1 - 1 <= row < y2 + 1]
        columns = [column for column in range(SIDE) if x1 - 1 <= column < x2 + 1]
        inside[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = True
        soft = torch.sigmoid(logits[n, k]) * inside.float()
        found = soft > 0.5
        iou = float((found & truth).sum()) / float((found | truth).sum())
        d = (network(soft[None, None])[0, int(labels[n, k]) - 1] - iou).abs()
        total = total + (d * d / 2 if d < 1 else d - 0.5)
    return total


@pytest.fixture
def network(device):
    torch.manual_seed(3)
    made = MaskIouNet(CLASSES).to(device)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.02, 0.2 if parameter.dim() > 1 else 0.05)
    return made


def test_loss_and_gradients_are_those_of_a_loop(network, device):
    logits, *others = _samples(device)
    results = []
    for function in (mask_iou_loss, _loss_slowly):
        leaf = logits.clone().requires_grad_()
        loss = function(network, leaf, *others, smallest_area=25)
        tensors = [leaf] + list(network.parameters())
        results.append([loss] + list(torch.autograd.grad(loss, tensors)))
    for found, expected in zip(*results):
        assert expected.abs().max() > 0
        assert torch.allclose(found, expected, rtol=rounding.network(1e-4),
                              atol=rounding.product(1e-5) * expected.abs().max().item())


def test_no_sample_that_counts_gives_zeros(network, device):
    logits, boxes, masks, labels, valid = _samples(device)
    loss = mask_iou_loss(network, logits.requires_grad_(), boxes, masks, labels,
                         torch.zeros_like(valid), 25)
    grads = torch.autograd.grad(loss, [logits] + list(network.parameters()))
    assert loss.item() == 0
    assert all(not (grad != 0).any() for grad in grads)


@pytest.mark.parametrize("side, left", [(63, 1), (64, 1), (138, 3), (176, 4)])
def test_shapes(side, left):
    network = MaskIouNet(CLASSES)
    masks = torch.rand(2, 1, side, side)
    assert network.maskiou_net(masks).shape == (2, CLASSES - 1, left, left)
    assert network(masks).shape == (2, CLASSES - 1)


def test_too_small_an_input_is_refused():
    assert get_config("yolact_plus_base", max_size=249).proto_size == 64
    with pytest.raises(UserError, match="max_size is 248, expected at least 249"):
        get_config("yolact_plus_base", max_size=248)


@pytest.mark.parametrize("change", [{"backbone": "darknet53"}, {"dcn_layers": (0, 4, 6)},
                                    {"dcn_interval": 0}])
def test_other_backbones_cannot_be_deformed(change):
    with pytest.raises(UserError, match="dcn_(layers|interval) is"):
        get_config("yolact_plus_base", **change)


def test_crop_takes_a_margin_of_a_pixel(device):
    soft = torch.ones(1, 1, 10, 10, device=device)
    boxes = torch.tensor([[[0.2, 0.5, 0.4, 0.6]]], device=device)
    kept = crop_to_boxes(soft, boxes)[0, 0].nonzero().cpu()
    assert sorted(set(kept[:, 0].tolist())) == [4, 5, 6]
    assert sorted(set(kept[:, 1].tolist())) == [1, 2, 3, 4]


def test_scores_of_several_images(network, device):
    """Rows of one image do not depend on the other images or on how many rows there are."""
    torch.manual_seed(0)
    rows, k = 6, 8
    boxes = torch.rand(2, rows, 4).mul(0.4)
    boxes[:, :, 2:] += 0.5
    count = torch.tensor([6, 2])
    used = (torch.arange(rows) < count.unsqueeze(1)).float()
    fields = [boxes, torch.rand(2, rows) * used, torch.randint(0, CLASSES - 1, (2, rows)),
              torch.randn(2, rows, k), count]
    proto = torch.rand(2, SIDE, SIDE, k)
    found = mask_scores(network, Detections(*(f.to(device) for f in fields)), proto.to(device))
    assert found.shape == (2, rows) and not (found[1, 2:] != 0).any()
    for n in range(2):
        single = Detections(*(f[n:n + 1, :2].to(device) for f in fields[:4]),
                            count=torch.tensor([2]).to(device))
        expected = mask_scores(network, single, proto[n:n + 1].to(device))
        assert torch.allclose(found[n, :2], expected[0], rtol=1e-5)


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
def test_loss_is_static(network, device):
    recorder = Recorder()
    for seed in range(3):
        logits, *others = _samples(device, seed=seed)
        logits.requires_grad_()
        with recorder.step():
            loss = mask_iou_loss(network, logits, *others, smallest_area=25)
            torch.autograd.grad(loss, [logits] + list(network.parameters()))
    assert [step.syncs for step in recorder.steps] == [[]] * 3
    assert [len(step.new_signatures) for step in recorder.steps[1:]] == [0, 0]


def _small_network():
    """A network of the shapes recipe that re-scores its masks, and its loss, always the same."""
    config = get_config("yolact_shapes", max_size=249, use_maskiou=True, masks_to_train=4)
    torch.manual_seed(0)
    network = build_yolact(config)
    for parameter in network.maskiou_net.parameters():
        if parameter.dim() > 1:  # the start values leave hardly anything behind five layers
            parameter.data.mul_(2)
    network.train()
    network.freeze_bn()
    return config, network, MultiBoxLoss.from_config(config, network.maskiou_net)


def _process_batch(config, rank):
    """One image; that of the second process is empty."""
    masks = np.zeros((1, 249, 249), np.uint8)
    masks[0, 50:200, 60:180] = 1
    image = {"boxes": [[60 / 249, 50 / 249, 180 / 249, 200 / 249]], "labels": [2], "masks": masks}
    empty = {"boxes": [], "labels": [], "masks": []}
    return target_batch(config, [empty if rank else image], slots=2, seed=rank)


def _gradients(rank, wrap):
    config, network, criterion = _small_network()
    batch = _process_batch(config, rank)
    wrapped = wrap(network)  # has to live until the gradients have been averaged
    sum(criterion(wrapped(batch.images), batch).values()).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def _process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store",
                                         rank=rank, world_size=2)
    torch.set_num_threads(1)
    grads = _gradients(rank, torch.nn.parallel.DistributedDataParallel)
    torch.save(grads, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_every_process_gets_the_same_gradients(tmp_path):
    """The mask-IoU network runs in the loss, outside of what DistributedDataParallel wraps."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    found = [torch.load(str(tmp_path / f"{rank}.pth")) for rank in range(2)]
    alone = [_gradients(rank, lambda network: network) for rank in range(2)]
    assert any(name.startswith("maskiou_net.") and grad.abs().max() > 0
               for name, grad in alone[0].items())
    differ = False
    for name, grad in found[0].items():
        if alone[0][name] is None:  # batch norm is frozen
            assert grad is None
            continue
        expected = (alone[0][name] + alone[1][name]) / 2
        differ = differ or not torch.allclose(alone[0][name], expected)
        assert torch.equal(grad, found[1][name]), name
        assert torch.allclose(grad, expected, rtol=1e-4,
                              atol=1e-6 + 1e-4 * expected.abs().max().item()), name
    assert differ
