"""Detection: batches, empty images, values that are no numbers, static shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.config import get_config
from layers.detection import (
    EXCLUDED,
    NMS_KINDS,
    Detect,
    fast_nms,
    fast_nms_on_host,
    greedy_nms,
)

PRIORS, CLASSES, PROTOTYPES, ROWS = 120, 6, 4, 20


def make_predictions(device, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(PRIORS, 2, generator=generator)
    priors = torch.cat((center, 0.05 + 0.3 * torch.rand(PRIORS, 2, generator=generator)), 1)
    predictions = {
        "loc": torch.randn(batch, PRIORS, 4, generator=generator),
        "conf": 3 * torch.randn(batch, PRIORS, CLASSES, generator=generator),
        "mask": torch.randn(batch, PRIORS, PROTOTYPES, generator=generator),
        "priors": priors,
    }
    return {key: value.to(device) for key, value in predictions.items()}


def make_detect(nms, compact=True):
    detect = Detect(CLASSES, 0.05, 0.5, ROWS, 15, nms, max_size=100)
    detect.compact = compact
    return detect


def tensors(detections):
    return list(vars(detections).values())


def assert_same(found, expected):
    for (name, a), b in zip(vars(found).items(), expected):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("nms", NMS_KINDS)
def test_a_batch_equals_its_images(device, nms):
    predictions = make_predictions(device)
    together = make_detect(nms)(predictions)
    for i in range(3):
        alone = make_detect(nms)({key: value if key == "priors" else value[i:i + 1]
                                  for key, value in predictions.items()})
        assert_same(alone, [field[i:i + 1] for field in tensors(together)])
    assert (together.count > 0).all()


@pytest.mark.parametrize("nms", NMS_KINDS)
def test_leaving_out_priors_on_the_host_changes_nothing(device, nms):
    predictions = make_predictions(device)
    predictions["conf"][0, :, 0] += 6
    predictions["conf"][1, :, 0] += 50
    compacted = make_detect(nms)(predictions)
    assert_same(compacted, tensors(make_detect(nms, compact=False)(predictions)))


@pytest.mark.parametrize("top_k, max_detections", [(300, 5), (300, 40), (3, 40), (300, 200)])
@pytest.mark.parametrize("crowding", [1.0, 0.1, 0.01])
def test_the_surest_pairs_decide_as_all_of_them(top_k, max_detections, crowding):
    """Spread boxes, of which enough stay, and crowded ones, of which all have to be compared."""
    generator = torch.Generator().manual_seed(0)
    corner = crowding * torch.rand(1, 300, 2, generator=generator)
    boxes = torch.cat((corner, corner + 0.2 + 0.1 * torch.rand(1, 300, 2, generator=generator)), 2)
    scores = torch.rand(1, 6, 300, generator=generator)
    scores[:, :, ::7] = EXCLUDED
    expected = fast_nms(boxes, scores, 0.5, top_k, max_detections)
    found = fast_nms_on_host(boxes, scores, 0.5, top_k, max_detections)
    count = int(expected.count)
    assert int(found.count) == count > 0
    for name in ("index", "classes", "scores"):
        assert torch.equal(getattr(found, name)[:, :count], getattr(expected, name)[:, :count])


def test_what_stays_may_lie_below_the_surest_pairs():
    """100 sure boxes at one place leave one of each class; the others are unsure, and apart."""
    place = torch.cat((torch.zeros(100), torch.arange(1.0, 21.0))).reshape(1, 120, 1)
    boxes = torch.cat((place, place, place + 0.9, place + 0.9), 2)
    scores = torch.rand(1, 2, 120, generator=torch.Generator().manual_seed(0))
    scores[:, :, :100] += 1
    expected, found = (nms(boxes, scores / 2, 0.5, 120, 10) for nms in (fast_nms, fast_nms_on_host))
    assert int(found.count) == int(expected.count) == 10
    assert torch.equal(found.index, expected.index) and found.index.max() > 100


def test_of_equal_scores_the_lower_class_and_prior_comes_first():
    corner = torch.tensor([0.0, 0.01, 0.5, 0.51]).reshape(1, 4, 1)  # two pairs that overlap
    found = fast_nms_on_host(torch.cat((corner, corner, corner + 0.3, corner + 0.3), 2),
                             torch.ones(1, 2, 4), 0.5, 10, 10)
    assert found.classes.tolist() == [[0, 0, 1, 1]] and found.index.tolist() == [[0, 2, 0, 2]]


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 0.05, 0.3, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_candidate_is_left_out_whatever_the_threshold(threshold, dtype):
    """Two classes, so that a score is all but the bound; those next to the threshold as well."""
    near = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else 0.0
    above = torch.tensor([-1e-5, -2e-7, 0.0, 2e-7, 1e-5, 0.1, 5.0, -5.0, math.inf, math.nan])
    conf = torch.stack((torch.full((10,), -7.0), near + above - 7.0), 1)  # [10, 2]
    predictions = {"loc": torch.zeros(1, 10, 4), "conf": conf.to(dtype).unsqueeze(0),
                   "mask": torch.arange(1.0, 11.0).reshape(1, 10, 1),
                   "priors": torch.tensor([[0.1 * n, 0.5, 0.01, 0.01] for n in range(10)])}
    found, plain = (Detect(2, threshold, 0.5, 10, 10, compact=compact)(predictions)
                    for compact in (True, False))
    assert int(found.count) == int(plain.count)
    assert torch.equal(found.scores, plain.scores)  # equal ones may come in another order
    assert sorted(found.coefficients.flatten()) == sorted(plain.coefficients.flatten())
    assert int(plain.count) == {0.0: 8, 1.0: 0}.get(threshold, int(plain.count)) <= 8


@pytest.mark.parametrize("nms", NMS_KINDS)
@pytest.mark.parametrize("compact", [True, False])
def test_an_image_without_candidates(device, nms, compact):
    predictions = make_predictions(device)
    predictions["conf"][1, :, 0] = 100
    found = make_detect(nms, compact)(predictions)
    assert int(found.count[1]) == 0 and int(found.count[0]) > 0
    for field in tensors(found)[:4]:
        assert not (field[1] != 0).any()
    predictions["conf"][:, :, 0] = 100
    assert not make_detect(nms, compact)(predictions).count.sum()


@pytest.mark.parametrize("nms", NMS_KINDS)
@pytest.mark.parametrize("compact", [True, False])
def test_degenerate_predictions_give_no_nan(device, nms, compact):
    predictions = make_predictions(device)
    predictions["loc"][0, :30, 2:] = 1e4    # infinite size
    predictions["loc"][0, 30:40] = float("nan")
    predictions["loc"][0, 40:60, 2:] = -1e4  # no area
    predictions["conf"][0, 60:70] = float("nan")
    predictions["loc"][1] = float("inf")
    found = make_detect(nms, compact)(predictions)
    for field in tensors(found):
        assert torch.isfinite(field.double()).all()
    assert int(found.count[0]) > 0 and int(found.count[1]) == 0


def test_boxes_without_area_do_not_suppress_each_other(device):
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5]] * 3], device=device)
    scores = torch.tensor([[[0.9, 0.8, 0.7]]], device=device)
    assert fast_nms(boxes, scores, 0.5, 3, 3).index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("nms", ["fast", "cross_class"])
def test_shapes_follow_from_the_configuration(device, nms):
    def shapes(predictions):
        return [tuple(field.shape) for field in tensors(make_detect(nms)(predictions))]

    empty = make_predictions(device, seed=1)
    empty["conf"][:, :, 0] = 100
    assert shapes(make_predictions(device)) == shapes(empty)
    assert shapes(empty) == [(3, ROWS, 4), (3, ROWS), (3, ROWS), (3, ROWS, PROTOTYPES), (3,)]


def test_fewer_priors_than_rows(device):
    predictions = make_predictions(device)
    predictions = {key: value[:7] if key == "priors" else value[:, :7]
                   for key, value in predictions.items()}
    for nms in NMS_KINDS:
        found = make_detect(nms, compact=False)(predictions)
        assert found.boxes.shape == (3, ROWS, 4)


def test_greedy_nms_counts_pixels_at_both_ends():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 4], [0, 0, 9, 3.9]], np.float32)
    # IoU with the first is 50 / 100 and 49 / 100: at the threshold a box goes.
    assert greedy_nms(boxes, np.array([0.9, 0.8, 0.7], np.float32), 0.5).tolist() == [0, 2]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="classes"):
        Detect(CLASSES + 1, 0.05, 0.5, ROWS, 15)(make_predictions("cpu"))


def test_from_config():
    config = get_config("yolact_base", num_classes=7, nms_top_k=50, max_num_detections=30)
    detect = Detect.from_config(config, nms="cross_class")
    assert (detect.num_classes, detect.top_k, detect.max_detections) == (7, 50, 30)
    assert detect.nms == "cross_class" and detect.max_size == 550


@pytest.mark.parametrize("nms", ["fast", "cross_class"])
def test_the_device_is_never_asked_for_a_value(nms):
    """Two different batches run the same operators on the same shapes, none of which waits."""
    dispatch = pytest.importorskip("torch.utils._python_dispatch")
    if not hasattr(dispatch, "TorchDispatchMode"):
        pytest.skip("this torch cannot record operators")

    class Recorder(dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shapes = tuple((tuple(a.shape), a.dtype) for a in args if isinstance(a, torch.Tensor))
            signatures.append((str(function), shapes))
            return function(*args, **(kwargs or {}))

    recorded = []
    crowded, empty = make_predictions("cpu"), make_predictions("cpu", seed=1)
    empty["conf"][:, :, 0] = 100
    for predictions in (crowded, empty):
        signatures = []
        with Recorder():
            make_detect(nms, compact=False)(predictions)
        recorded.append(signatures)
    assert recorded[0] == recorded[1] and len(recorded[0]) > 20
    waiting = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "index.Tensor")
    assert not [name for name, _ in recorded[0] if any(word in name for word in waiting)]
    assert not [s for _, shapes in recorded[0] for s in shapes if s[1] == torch.float64]
