"""Sums of compressed run lengths, against pycocotools."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_utils

from data.annotations.outlines import run_length_sums


def test_run_length_sums_match_pycocotools():
    rng = np.random.RandomState(1)
    rles, expected = [], []
    for n in range(300):
        mask = (rng.rand(rng.randint(1, 60), rng.randint(1, 60)) < rng.rand()).astype(np.uint8)
        if n % 7 == 0:
            mask[:] = n % 2
        rles.append(mask_utils.encode(np.asfortranarray(mask))["counts"])
        expected.append((mask.size, int(mask.sum())))
    large = np.zeros((2000, 3000), np.uint8)
    large[500:1500, 700:900] = 1
    rles.append(mask_utils.encode(np.asfortranarray(large))["counts"])
    expected.append((large.size, int(large.sum())))
    totals, areas = run_length_sums(np.frombuffer(b"".join(rles), np.uint8),
                                    np.array([len(rle) for rle in rles]))
    assert list(zip(totals.tolist(), areas.tolist())) == expected


def test_run_length_sums_do_not_mix_neighbours():
    good = mask_utils.encode(np.asfortranarray(np.eye(9, dtype=np.uint8)))["counts"]
    shifted = bytes([good[0] + 64]) + good[1:]  # the same low bits, but not a legal character
    rles = [b"", good, shifted, good, b"o" * 40, good, good[:-1] + b"o", good, b""]
    totals, areas = run_length_sums(np.frombuffer(b"".join(rles), np.uint8),
                                    np.array([len(rle) for rle in rles]))
    assert totals.tolist() == [-1, 81, -1, 81, -1, 81, -1, 81, -1]
    assert areas[[1, 3, 5, 7]].tolist() == [9, 9, 9, 9]
