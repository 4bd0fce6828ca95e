"""Host-side targets: matching of odd cases, mask samples, padding, types."""

from __future__ import annotations

import numpy as np
import pytest

from data.augment import AugmentedSample
from data.config import get_config
from data.targets import Matcher, TargetMaker, match
from helpers.loss_reference import match_slowly
from layers.anchors import make_priors

NO_BOXES = np.zeros((0, 4), np.float32)
SIZE = 138


@pytest.fixture(scope="module")
def priors():
    config = get_config("yolact_base", max_size=SIZE,
                        pred_scales=[[6], [12], [24], [48], [96]])
    return make_priors(config).numpy()


def random_boxes(rng, count):
    corners = np.sort(rng.random((count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float32)


def make_sample(boxes, labels=None, crowd_boxes=NO_BOXES):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), SIZE, SIZE), np.uint8)
    for mask, box in zip(masks, boxes):
        x1, y1, x2, y2 = np.rint(box * SIZE).astype(int)
        mask[y1:y2, x1:x2] = 1
    labels = np.ones(len(boxes), np.int64) if labels is None else np.asarray(labels)
    return AugmentedSample(image=np.zeros((SIZE, SIZE, 3), np.uint8), boxes=boxes, labels=labels,
                           masks=masks, crowd_boxes=crowd_boxes, image_id=5,
                           mask_extents=np.tile([0, 0, SIZE, SIZE], (len(boxes), 1)))


def make_maker(priors, **changes):
    options = dict(num_classes=81, max_objects=6, masks_to_train=20, size=SIZE, proto_size=36,
                   semantic_size=18)
    options.update(changes)
    return TargetMaker(priors, **options)


def rng(seed=0):
    return np.random.default_rng(seed)


# Matching

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("grid", [True, False])
def test_match_equals_the_plain_algorithm(priors, seed, grid):
    generator = rng(seed)
    if not grid:
        priors = priors[generator.permutation(len(priors))]
    boxes, crowds = random_boxes(generator, 9), random_boxes(generator, seed % 3)
    boxes[1] = boxes[0]
    labels = generator.integers(1, 81, 9)
    expected = match_slowly(boxes, labels, crowds, priors)
    found = match(boxes, labels, crowds, priors, 0.5, 0.4)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    positive = found[0] > 0
    np.testing.assert_allclose(found[2][positive], expected[2][positive], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_objects_that_want_the_same_priors_get_what_the_plain_algorithm_gives(priors, seed):
    """More objects than priors of some sides; boxes and priors that are equal to the last bit."""
    generator = rng(seed)
    priors = priors[generator.integers(0, len(priors), 60)][generator.integers(0, 60, 150)]
    boxes = random_boxes(generator, 40)[generator.integers(0, 40, 90)]
    labels = generator.integers(1, 81, 90)
    expected = match_slowly(boxes, labels, NO_BOXES, priors)
    found = match(boxes, labels, NO_BOXES, priors, 0.5, 0.4)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_many_objects_that_want_one_prior_cost_a_row_each(monkeypatch):
    """The check of a dataset matches with equal priors."""
    rows = []

    def copied(target, *args, **kwargs):
        rows.append(target)
        return copyto(target, *args, **kwargs)

    copyto = np.copyto
    count = 300
    monkeypatch.setattr(np, "copyto", copied)
    priors = np.tile(np.array([[0.5, 0.5, 1, 1]], np.float32), (count + 1, 1))
    found = match(random_boxes(rng(), count), np.ones(count, int), NO_BOXES, priors, 0.5, 0.4)
    assert (found[0] > 0).sum() >= count and len(rows) <= 2 * count


def test_priors_share_few_intervals(priors):
    """What a box shares with each is computed once for all priors of a column or a row."""
    matcher = Matcher(priors, 0.5, 0.4, 0.7)
    assert matcher.columns.shape[1] <= 3 * (18 + 9 + 5 + 3 + 2) < len(priors) // 10
    np.testing.assert_allclose(matcher.columns.mean(axis=0)[matcher.column_of], priors[:, 0],
                               atol=1e-6)
    np.testing.assert_allclose(matcher.rows.mean(axis=0)[matcher.row_of], priors[:, 1], atol=1e-6)


def test_no_ground_truth_is_background(priors):
    class_targets, gt_index, box_targets = match(NO_BOXES, np.zeros(0), NO_BOXES, priors, 0.5, 0.4)
    assert not class_targets.any() and not gt_index.any() and not box_targets.any()


def test_only_a_crowd(priors):
    class_targets, _, _ = match(NO_BOXES, np.zeros(0), np.array([[0, 0, 0.5, 1]]), priors, 0.5, 0.4)
    assert set(class_targets.tolist()) == {0, -1}
    covered = priors[class_targets == -1]
    assert (covered[:, 0] < 0.6).all()


def test_crowds_leave_objects_alone(priors):
    box = np.array([[0.2, 0.2, 0.6, 0.6]], np.float32)
    alone = match(box, np.array([4]), NO_BOXES, priors, 0.5, 0.4)[0]
    crowded = match(box, np.array([4]), np.array([[0, 0, 1, 1]]), priors, 0.5, 0.4)[0]
    np.testing.assert_array_equal(alone == 4, crowded == 4)
    assert (crowded[alone == 0] == -1).sum() > 100


def test_boxes_without_size_give_finite_targets(priors):
    boxes = np.array([[0.3, 0.3, 0.3, 0.3], [0.5, 0.5, 0.5, 0.9]])
    class_targets, _, box_targets = match(boxes, np.array([1, 2]), NO_BOXES, priors, 0.5, 0.4)
    assert np.isfinite(box_targets).all() and set(class_targets.tolist()) == {0, 1, 2}


def test_scratch_memory_does_not_leak_between_images(priors):
    matcher = Matcher(priors, 0.5, 0.4, 0.7)
    boxes, labels = random_boxes(rng(1), 12), np.arange(1, 13)
    first = matcher(boxes, labels, NO_BOXES)
    matcher(random_boxes(rng(2), 20), np.ones(20, int), random_boxes(rng(3), 3))
    for one, other in zip(first, matcher(boxes, labels, NO_BOXES)):
        np.testing.assert_array_equal(one, other)


# Mask samples

def test_all_positives_in_prior_order(priors):
    sample = make_sample([[0.1, 0.1, 0.5, 0.5], [0.4, 0.4, 0.9, 0.8]], [3, 7])
    targets = make_maker(priors, masks_to_train=100)(sample, rng())
    positives = np.flatnonzero(targets["class_targets"] > 0)
    count = len(positives)
    assert 0 < count < 100 and targets["num_positives"] == count
    assert targets["mask_index"][:count].tolist() == positives.tolist()
    assert targets["mask_valid"].tolist() == [True] * count + [False] * (100 - count)
    assert targets["mask_scale"] == 1.0
    owners = np.array([3, 7])[targets["mask_gt"][:count]]
    np.testing.assert_array_equal(owners, targets["class_targets"][positives])
    assert not targets["mask_index"][count:].any() and not targets["mask_gt"][count:].any()


def test_a_random_part_of_many_positives(priors):
    boxes = [[0.1, 0.1, 0.27, 0.27], [0.5, 0.4, 0.86, 0.74], [0.3, 0.7, 0.39, 0.78]]
    sample, maker = make_sample(boxes), make_maker(priors, masks_to_train=2)
    first = maker(sample, rng(0))
    positives = np.flatnonzero(first["class_targets"] > 0)
    assert len(positives) > 2 and first["mask_valid"].all()
    assert first["mask_scale"] == pytest.approx(len(positives) / 2)
    drawn = {tuple(maker(sample, rng(seed))["mask_index"].tolist()) for seed in range(200)}
    assert len(drawn) > 1
    assert {index for row in drawn for index in row} == set(positives.tolist())
    assert all(len(set(row)) == 2 for row in drawn)


def test_samples_are_a_uniform_draw_without_replacement(priors):
    """As the original's first entries of a random permutation: by element, by pair, in scale."""
    maker = make_maker(priors, masks_to_train=4)
    positives, count, draws, generator = np.arange(40, 1000, 80), 12, 20000, rng(7)
    class_targets, owners = np.zeros((2, len(priors)), np.int32)
    class_targets[positives] = 1
    losses = np.linspace(0.5, 3.0, count)  # any loss of each positive
    seen, sums = np.zeros((draws, count)), np.zeros(draws)
    for row in range(draws):
        sample = maker._mask_samples(class_targets, owners, generator)
        seen[row] = np.isin(positives, sample["mask_index"])
        sums[row] = sample["mask_scale"] * (seen[row] * losses).sum()
    assert (seen.sum(1) == 4).all()
    together = seen.T @ seen / draws  # the diagonal: each alone
    expected = np.full((count, count), 4 * 3 / (count * (count - 1)))
    np.fill_diagonal(expected, 4 / count)
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(together - expected) < 4.5 * error).all()
    assert abs(sums.mean() - losses.sum()) < 4 * sums.std() / np.sqrt(draws)


def test_background_image_is_legal(priors):
    targets = make_maker(priors)(make_sample([]), rng())
    assert targets["num_positives"] == 0 and targets["mask_scale"] == 1.0
    assert not targets["mask_valid"].any() and not targets["class_targets"].any()
    assert not targets["gt_masks"].any() and not targets["semantic"].any()


# Ground-truth slots

def test_empty_slots_are_harmless(priors):
    sample = make_sample([[0.1, 0.1, 0.5, 0.5]], [80])
    targets = make_maker(priors)(sample, rng())
    np.testing.assert_array_equal(targets["gt_boxes"][0], sample.boxes[0])
    assert targets["gt_boxes"][1:].tolist() == [[0, 0, 1, 1]] * 5
    assert targets["gt_labels"].tolist() == [80, 0, 0, 0, 0, 0]
    assert targets["gt_masks"][0].any() and not targets["gt_masks"][1:].any()


def test_semantic_is_the_union_of_each_class(priors):
    boxes = [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0]]
    semantic = make_maker(priors)(make_sample(boxes, [2, 2, 80]), rng())["semantic"]
    assert semantic.shape == (80, 18, 18)
    assert semantic[1].sum() == 2 * 81 and semantic[79].sum() == 81
    assert semantic.sum() == 3 * 81


def test_extents_only_save_work(priors):
    sample = make_sample([[0.1, 0.1, 0.52, 0.5], [0.3, 0.0, 0.33, 1.0]], [2, 2])
    plain = make_maker(priors)(sample, rng())
    sample.mask_extents = np.rint(sample.boxes * SIZE).astype(np.int64)
    again = make_maker(priors)(sample, rng())
    np.testing.assert_array_equal(plain["gt_masks"], again["gt_masks"])
    np.testing.assert_array_equal(plain["semantic"], again["semantic"])


def test_more_objects_than_priors(priors):
    few = priors[:5]
    boxes = random_boxes(np.random.default_rng(0), 9)
    classes, index, _ = match(boxes, np.ones(9, np.int64), NO_BOXES, few, 0.5, 0.4)
    assert (classes == 1).all()  # every prior is some object's best
    assert len(set(index.tolist())) == 5


def test_more_objects_than_slots(priors):
    with pytest.raises(ValueError, match="image 5 has 7 objects, more than the 6 slots"):
        make_maker(priors)(make_sample(random_boxes(rng(), 7)), rng())


@pytest.mark.parametrize("num_classes, kind", [(81, np.int8), (128, np.int8), (129, np.int32)])
def test_large_arrays_of_integers_are_small_and_none_has_16_bits(priors, num_classes, kind):
    """An Ascend 910A widens integers of 8 bits, not those of 16, and to 32 bits alone."""
    maker = make_maker(priors, num_classes=num_classes, max_objects=300)
    targets = maker(make_sample([[0.1, 0.1, 0.5, 0.5]]), rng())
    assert targets["class_targets"].dtype == kind
    for name in ("mask_gt", "mask_index", "gt_labels"):
        assert targets[name].dtype == np.int32
