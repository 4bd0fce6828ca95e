"""Hard negative mining at its edges: no positive, one, and too many for the ratio."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layers.ohem import ohem_cross_entropy


@pytest.mark.parametrize("case", ["zero_pos", "one_pos", "saturated"])
def test_sum_is_the_originals(golden, device, case):
    data = golden("ohem_edge")
    conf = torch.from_numpy(data["conf"]).to(device)
    targets = {"zero_pos": np.zeros(conf.shape[:2], np.int64), "one_pos": data["conf_t_one"],
               "saturated": data["conf_t_saturated"]}[case]
    targets = torch.from_numpy(targets).to(device)
    total, _ = ohem_cross_entropy(conf, targets, (targets > 0).sum(1), 3)
    np.testing.assert_allclose(total.item(), data[case], rtol=1e-6)
