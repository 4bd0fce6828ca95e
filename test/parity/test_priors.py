from __future__ import annotations

import numpy as np
import pytest

from data.config import get_config
from layers.anchors import make_priors


@pytest.mark.parametrize("name", ["yolact_base", "yolact_im700", "yolact_resnet50_pascal",
                                  "yolact_plus_base"])
def test_priors_are_the_originals(name, golden):
    expected = golden("priors_" + name)
    config = get_config(name)
    assert list(config.feature_sizes) == expected["conv_sizes"].tolist()
    priors = make_priors(config).numpy()
    assert priors.dtype == np.float32
    np.testing.assert_array_equal(priors, expected["priors"])
