"""MultiBoxLoss against a slow second implementation, and finite on every legal batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.config import get_config
from helpers import rounding
from helpers.loss_reference import losses_slowly, make_batch
from helpers.recorder import SKIP_REASON, Recorder, available
from layers.masks import inside_box
from layers.multibox_loss import MultiBoxLoss, hardest_negatives, ohem_cross_entropy

CLASSES, PROTO, SEMANTIC, SIDE, COEFFICIENTS = 5, 24, 12, 48, 4
KEYS = ("loc", "conf", "mask", "proto", "segm")


def _priors():
    rows = []
    for cells, scale in ((12, 0.15), (6, 0.3), (3, 0.7)):
        centers = (np.arange(cells) + 0.5) / cells
        for y in centers:
            rows += [[x, y, scale, scale] for x in centers]
    return np.array(rows, np.float32)


PRIORS = _priors()


def _image(count, seed=0, crowds=0):
    rng = np.random.RandomState(seed)
    low = rng.rand(count + crowds, 2) * 0.7
    boxes = np.concatenate([low, low + 0.05 + 0.25 * rng.rand(count + crowds, 2)], 1)
    boxes = boxes.astype(np.float32)
    return {"boxes": boxes[:count], "labels": rng.randint(1, CLASSES, count),
            "masks": np.stack([_drawn(box) for box in boxes[:count]]) if count else (),
            "crowds": boxes[count:]}


def _drawn(box):
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    center, radius = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return ((x - center[0]) / radius[0]) ** 2 + ((y - center[1]) / radius[1]) ** 2 < 1


def _batch(images, device="cpu", **options):
    batch = make_batch(images, PRIORS, CLASSES, PROTO, SEMANTIC, **options)
    for key, value in vars(batch).items():
        setattr(batch, key, value.to(device))
    return batch


def _predictions(batch_size, device="cpu", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    count = len(PRIORS)
    shapes = {"loc": (count, 4), "conf": (count, CLASSES), "mask": (count, COEFFICIENTS),
              "proto": (PROTO, PROTO, COEFFICIENTS), "segm": (CLASSES - 1, SEMANTIC, SEMANTIC)}
    return {key: torch.randn((batch_size,) + shape, generator=generator).to(device, dtype)
            .requires_grad_() for key, shape in shapes.items()}


def _check_finite(losses, predictions):
    total = sum(losses.values())
    grads = torch.autograd.grad(total, [predictions[key] for key in KEYS])
    for name, tensor in list(losses.items()) + list(zip(KEYS, grads)):
        assert torch.isfinite(tensor).all(), name
    return dict(zip(KEYS, grads))


IMAGES = {
    "several": [_image(3, seed=1), _image(6, seed=2, crowds=2), _image(1, seed=3)],
    "with an empty image": [_image(0), _image(4, seed=4)],
    "all empty": [_image(0), _image(0)],
    "crowds only": [_image(0, seed=5, crowds=3), _image(0, seed=6, crowds=1)],
    "one pixel": [{"boxes": [[0.5, 0.5, 0.5 + 1 / SIDE, 0.5 + 1 / SIDE]], "labels": [1],
                   "masks": _drawn(np.array([0.5, 0.5, 0.52, 0.52]))[None]}],
    "100 objects": [_image(100, seed=7), _image(2, seed=8)],
}


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_equals_the_slow_implementation_and_is_finite(name, device):
    images = IMAGES[name]
    batch, predictions = _batch(images, device), _predictions(len(images), device)
    losses = MultiBoxLoss(CLASSES)(predictions, batch)
    grads = _check_finite(losses, predictions)
    plain = losses_slowly(predictions, batch)
    for key in "BCMS":
        np.testing.assert_allclose(losses[key].item(), plain[key].item(),
                                   rtol=rounding.product(2e-5), atol=1e-7)
    expected = torch.autograd.grad(sum(plain.values()), [predictions[key] for key in KEYS])
    for key, grad in zip(KEYS, expected):
        scale = float(grad.abs().max()) or 1
        assert float((grads[key] - grad).abs().max()) <= rounding.product(2e-5) * scale, key


@pytest.mark.parametrize("name", ["all empty", "crowds only"])
def test_without_positives_only_the_semantic_loss_is_left(name):
    images = IMAGES[name]
    losses = MultiBoxLoss(CLASSES)(_predictions(len(images)), _batch(images))
    assert [losses[key].item() for key in "BCM"] == [0, 0, 0]
    assert losses["S"].item() > 0


@pytest.mark.parametrize("name", sorted(IMAGES))
@pytest.mark.parametrize("size", [200.0, -200.0])
def test_saturated_logits_stay_finite(name, size):
    images = IMAGES[name]
    batch, predictions = _batch(images), _predictions(len(images))
    for tensor in predictions.values():
        tensor.data.copy_(tensor.data.sign() * size)
    _check_finite(MultiBoxLoss(CLASSES)(predictions, batch), predictions)


def test_padded_slots_add_nothing_even_where_predictions_are_huge():
    batch, predictions = _batch(IMAGES["several"]), _predictions(3)
    before = MultiBoxLoss(CLASSES)(predictions, batch)
    batch.mask_index[~batch.mask_valid] = len(PRIORS) - 1
    batch.mask_gt[~batch.mask_valid] = batch.gt_boxes.shape[1] - 1
    predictions["mask"].data[:, -1] = 1e4
    after = MultiBoxLoss(CLASSES)(predictions, batch)
    grads = _check_finite(after, predictions)
    assert after["M"].item() == pytest.approx(before["M"].item(), rel=1e-6)
    assert grads["mask"][:, -1].abs().max().item() == 0


def test_subsampled_masks_are_made_up_for_by_the_scale():
    images = [_image(12, seed=9)]
    predictions = _predictions(1)
    predictions["mask"].data.fill_(0.1)  # all samples of one object are then alike
    every = MultiBoxLoss(CLASSES)(predictions, _batch(images))["M"].item()
    count = int(_batch(images).num_positives.sum())
    found = []
    for seed in range(40):
        rng = np.random.RandomState(seed)
        batch = _batch(images, samples=count // 2, choose=rng.permutation)
        assert batch.mask_scale.item() == pytest.approx(count / (count // 2))
        found.append(MultiBoxLoss(CLASSES)(predictions, batch)["M"].item())
    assert np.mean(found) == pytest.approx(every, rel=0.1)


def test_half_precision_predictions_are_computed_in_float32():
    batch = _batch(IMAGES["several"])
    half = _predictions(3, dtype=torch.float16)
    full = {key: tensor.detach().float() for key, tensor in half.items()}
    losses, expected = MultiBoxLoss(CLASSES)(half, batch), MultiBoxLoss(CLASSES)(full, batch)
    for key in "BCMS":
        assert losses[key].dtype == torch.float32
        assert losses[key].item() == expected[key].item()


def test_two_halves_with_the_common_normaliser_equal_the_whole_batch():
    images = IMAGES["several"][:2]
    predictions = _predictions(2)
    loss = MultiBoxLoss(CLASSES)
    whole = loss(predictions, _batch(images, slots=8))
    total = _batch(images).num_positives.sum()
    parts = [loss({key: tensor[i:i + 1] for key, tensor in predictions.items()},
                  _batch(images[i:i + 1], slots=8), num_positives=total.float() / 2)
             for i in range(2)]
    for key in "BCMS":
        mean = (parts[0][key] + parts[1][key]).item() / 2
        assert mean == pytest.approx(whole[key].item(), rel=1e-5)


def test_exactly_the_asked_number_is_mined_also_among_equal_scores():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 3.0, 2.0, 5.0, 4.0]])
    marked = hardest_negatives(scores, torch.tensor([[2], [3]]))
    assert marked.sum(1).tolist() == [2, 3]
    assert marked[1].tolist() == [False, True, False, True, True]


def test_rows_far_below_the_largest_logit_are_still_mined():
    conf = torch.zeros(1, 4, 3)
    conf[0, 0] = torch.tensor([0.0, 150.0, 0.0])  # a positive, far above everything else
    conf[0, 2] = torch.tensor([0.0, 20.0, 0.0])  # a confident false positive
    targets = torch.tensor([[1, 0, 0, -1]])
    _, mined = ohem_cross_entropy(conf, targets, torch.tensor([1]), 1)
    assert mined.tolist() == [[False, False, True, False]]


def test_the_crop_is_the_originals(golden):
    data = golden("box_ops")
    masks = torch.from_numpy(data["crop_masks"])
    height, width, _ = masks.shape
    corners = torch.from_numpy(data["crop_boxes"]).reshape(-1, 2, 2)
    (x1, y1), (x2, y2) = corners.min(1)[0].unbind(-1), corners.max(1)[0].unbind(-1)
    inside = inside_box(y1, y2, height).unsqueeze(-1) & inside_box(x1, x2, width).unsqueeze(-2)
    np.testing.assert_array_equal((masks * inside.permute(1, 2, 0)).numpy(), data["crop_out"])


def test_wrong_number_of_classes_is_named():
    with pytest.raises(ValueError, match="5 classes, the loss was built for 81"):
        loss = MultiBoxLoss.from_config(get_config("yolact_base"))
        loss(_predictions(1), _batch([_image(1)]))


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
def test_needs_few_operators_and_no_host_read():
    batch, predictions = _batch(IMAGES["several"]), _predictions(3)
    recorder = Recorder()
    with recorder.step() as forward:
        losses = MultiBoxLoss(CLASSES)(predictions, batch)
    with recorder.step() as backward:
        (losses["B"] + losses["C"] + losses["M"] + losses["S"]).backward()
    assert forward.syncs == backward.syncs == []
    assert forward.total <= 105 and forward.kernels <= 75
    assert backward.total <= 50 and backward.kernels <= 32
