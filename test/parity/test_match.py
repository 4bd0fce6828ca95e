"""Target assignment against the numbers recorded from the original."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from data.targets import match

CASES = ["five", "one_full", "tiny40", "dup", "sixty", "crowd1", "crowd3", "zero_width",
         "same_best_prior"]


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("match")


@pytest.fixture(scope="module")
def priors(golden):
    values = golden("priors_yolact_base")
    return values[list(values)[0]]


def run(recorded, priors, case):
    crowd = recorded.get(case + "_crowd", np.zeros((0, 4), np.float32))
    # The recording counts labels from 0 and stores them plus one.
    return match(recorded[case + "_gt"], recorded[case + "_labels"] + 1, crowd, priors, 0.5, 0.4)


@pytest.mark.parametrize("case", CASES)
def test_classes_and_indices_are_exact(recorded, priors, case):
    class_targets, gt_index, _ = run(recorded, priors, case)
    np.testing.assert_array_equal(class_targets, recorded[case + "_conf_t"])
    counts = [(class_targets > 0).sum(), (class_targets == 0).sum(), (class_targets < 0).sum()]
    assert counts == recorded[case + "_counts"].tolist()
    np.testing.assert_array_equal(gt_index[class_targets > 0], recorded[case + "_idx_t_pos"])
    assert zlib.crc32(gt_index.astype("<i8").tobytes()) == recorded[case + "_idx_t_crc"]


@pytest.mark.parametrize("case", CASES)
def test_box_targets(recorded, priors, case):
    class_targets, _, box_targets = run(recorded, priors, case)
    expected = recorded[case + "_loc_t_pos"]
    finite = np.isfinite(expected)
    assert finite.all() or case == "zero_width"
    np.testing.assert_allclose(box_targets[class_targets > 0][finite], expected[finite],
                               rtol=1e-5, atol=1e-6)
    assert np.isfinite(box_targets).all()
    assert not box_targets[class_targets <= 0].any()
