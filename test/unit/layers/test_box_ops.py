from __future__ import annotations

import torch

from layers import box_ops


def _boxes(*shape):
    generator = torch.Generator().manual_seed(3)
    low = torch.rand(*shape, 2, generator=generator) * 0.6
    return torch.cat((low, low + 0.05 + torch.rand(*shape, 2, generator=generator) * 0.3), -1)


def test_forms_are_inverse():
    boxes = _boxes(2, 50)
    assert torch.allclose(box_ops.point_form(box_ops.center_size(boxes)), boxes, atol=1e-6)


def test_decode_inverts_encode_for_one_image_and_for_a_batch():
    boxes, priors = _boxes(3, 40), box_ops.center_size(_boxes(40))
    loc = box_ops.encode(boxes, priors)
    assert loc.shape == (3, 40, 4)
    assert torch.allclose(box_ops.decode(loc, priors), boxes, atol=1e-5)
    assert torch.equal(box_ops.encode(boxes[1], priors), loc[1])


def test_encode_by_hand():
    loc = box_ops.encode(torch.tensor([[0.2, 0.2, 0.6, 0.4]]), torch.tensor([[0.3, 0.3, 0.2, 0.2]]))
    expected = torch.tensor([[5.0, 0.0, 3.4657359, 0.0]])
    assert torch.allclose(loc, expected, atol=1e-5)


def test_jaccard_by_hand():
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 0.5, 0.5]])
    expected = torch.tensor([[1 / 3, 0.0, 1.0], [0.25, 0.09, 0.25]])
    assert torch.allclose(box_ops.jaccard(a, b), expected, atol=1e-6)
    crowd = box_ops.jaccard(b, a, iscrowd=True)
    assert torch.allclose(crowd, torch.tensor([[0.5, 1.0], [0.0, 1.0], [1.0, 1.0]]), atol=1e-6)


def test_jaccard_of_a_batch_is_that_of_its_images():
    a, b = _boxes(3, 7), _boxes(3, 5)
    together = box_ops.jaccard(a, b)
    for i in range(3):
        assert torch.equal(together[i], box_ops.jaccard(a[i], b[i]))


def test_no_boxes():
    empty = torch.zeros(0, 4)
    assert box_ops.jaccard(empty, _boxes(5)).shape == (0, 5)
    assert box_ops.decode(empty, empty).shape == (0, 4)
    assert box_ops.crop(torch.ones(4, 6, 0), empty).shape == (4, 6, 0)


def test_crop_keeps_the_box_and_its_padding():
    masks = torch.ones(10, 20, 1)
    boxes = torch.tensor([[0.5, 0.8, 0.25, 0.4]])  # corners in the wrong order
    assert box_ops.crop(masks, boxes, padding=0).sum() == 5 * 4
    assert box_ops.crop(masks, boxes, padding=1).sum() == 7 * 6
    inside = box_ops.crop(masks, boxes, padding=0)[:, :, 0]
    assert inside[4:8, 5:10].sum() == inside.sum()
