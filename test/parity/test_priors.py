from __future__ import annotations

import numpy as np
import pytest

from data.config import get_config
from layers.anchors import make_priors


def _config(name, golden):
    if name != "yolact_plus_base":
        return get_config(name)
    scales = [list(row) for row in golden["scales"]]
    return get_config("yolact_base", pred_scales=scales, use_square_anchors=False)


@pytest.mark.parametrize("name", ["yolact_base", "yolact_im700", "yolact_resnet50_pascal",
                                  "yolact_plus_base"])
def test_priors_are_the_originals(name, golden):
    expected = golden("priors_" + name)
    config = _config(name, expected)
    assert list(config.feature_sizes) == expected["conv_sizes"].tolist()
    priors = make_priors(config).numpy()
    assert priors.dtype == np.float32
    np.testing.assert_array_equal(priors, expected["priors"])
