"""Masks as run lengths: the pixels of the plain way, at a fraction of its time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F

from helpers.paths import ROOT
from layers.box_ops import crop
from layers.masks import (
    _Axis,
    _Crossings,
    _run_ends,
    assemble_masks,
    boxes_to_pixels,
    encode_masks,
)


def make_scene(seed, count=24, side=46, prototypes=8):
    """Smooth prototypes, mostly zero like ReLU's, and boxes of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, prototypes, 9, 9, generator=generator)
    proto = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)
    proto = 3 * proto[0].permute(1, 2, 0).relu().contiguous()
    coefficients = torch.tanh(torch.randn(count, prototypes, generator=generator))
    center = torch.rand(count, 2, generator=generator)
    half = torch.rand(count, 2, generator=generator) ** 2 / 2
    boxes = torch.cat((center - half, center + half), 1)
    odd = [[-1, -1, 2, 2], [0, 0, 1, 1], [.3, .3, .3, .3], [1.2, .3, 1.5, .5], [-.4, .1, -.2, .9],
           [.7, .7, .2, .3], [.99, .99, 1.5, 1.5], [.4, -3, .5, 3]]
    boxes[:len(odd)] = torch.tensor(odd, dtype=torch.float32)
    coefficients[8] = 0
    return proto, coefficients, boxes


def soft_masks(proto, coefficients, boxes, height, width, crop_to_box):
    """The plain way up to the threshold: float `[n, height, width]`."""
    masks = torch.sigmoid(torch.matmul(proto, coefficients.t()))
    masks = crop(masks, boxes) if crop_to_box else masks
    masks = masks.permute(2, 0, 1).unsqueeze(1)
    return F.interpolate(masks, (height, width), mode="bilinear", align_corners=False).squeeze(1)


def decode(encoded):
    packed = [{"size": rle["size"], "counts": rle["counts"].encode()} for rle in encoded]
    return torch.from_numpy(pycocotools.mask.decode(packed)).permute(2, 0, 1) == 1


@pytest.mark.parametrize("crop_to_box", [True, False])
@pytest.mark.parametrize("height, width", [(120, 160), (161, 97), (46, 46), (30, 200), (17, 13),
                                           (300, 2), (92, 138)])
def test_run_lengths_are_those_of_the_plain_way(height, width, crop_to_box):
    differing = pixels = 0
    for seed in range(4):
        scene = make_scene(seed)
        soft = soft_masks(*scene, height, width, crop_to_box)
        encoded = encode_masks(*scene, height, width, crop_to_box)
        assert torch.equal(assemble_masks(*scene, height, width, crop_to_box), soft > 0.5)
        wrong = decode(encoded) != (soft > 0.5)
        # Order of summation: only a value that is 0.5 to the last digits may fall either way.
        assert not (wrong & ((soft - 0.5).abs() > 1e-6)).any()
        differing, pixels = differing + int(wrong.sum()), pixels + wrong.numel()
        for rle, mask in zip(encoded, decode(encoded)):
            expected = pycocotools.mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            assert rle["counts"] == expected["counts"].decode()
            assert rle["size"] == [height, width]
        assert 0.01 < (soft > 0.5).float().mean() < 0.9
    assert differing <= 2e-4 * pixels


@pytest.mark.parametrize("source, size", [(5, 15), (7, 7), (6, 40), (9, 5), (4, 9), (3, 2)])
def test_ends_of_runs_are_exact(source, size):
    """Coarse values make ties with the threshold; every pixel is computed for comparison."""
    rng = np.random.default_rng(source * 100 + size)
    rows = _Axis.build(source, size)
    values = rng.integers(0, 9, (3000, source)).astype(np.float32) / 8
    lines = np.pad(values, ((0, 0), (1, 1)), mode="constant")
    pixels = values[:, rows.low] * (1 - rows.weight) + values[:, rows.high] * rows.weight
    inside = (pixels > 0.5).reshape(-1)
    expected = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False])).astype(int)))
    ends, repeats = np.unique(_run_ends(_Crossings.find(lines, 0, 0), rows), return_counts=True)
    np.testing.assert_array_equal(ends[repeats % 2 == 1], expected)


def test_a_few_at_a_time(device):
    scene = [tensor.to(device) for tensor in make_scene(0)]
    assert assemble_masks(*scene, 40, 50).dtype == torch.bool
    assert encode_masks(*scene, 40, 50, chunk_size=7) == encode_masks(*scene, 40, 50)


def test_no_detections(device):
    proto, coefficients, boxes = (tensor.to(device) for tensor in make_scene(0))
    assert assemble_masks(proto, coefficients[:0], boxes[:0], 40, 50).shape == (0, 40, 50)
    assert encode_masks(proto, coefficients[:0], boxes[:0], 40, 50) == []


def test_boxes_in_pixels_lie_in_the_image():
    boxes = torch.tensor([[-0.5, 0.25, 0.5, 1.5], [0.9, 0.1, 0.2, 0.05], [1.2, 1.2, 1.4, 1.3],
                          [-0.4, -0.4, -0.2, -0.1]])
    expected = [[0, 20, 50, 80], [20, 4, 90, 8], [100, 80, 100, 80], [0, 0, 0, 0]]
    found = boxes_to_pixels(boxes, 80, 100)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32))


LARGE = """
import json, re, sys
import torch
from layers.masks import encode_masks

def peak():
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) / 1024

generator = torch.Generator().manual_seed(0)
proto = torch.rand(138, 138, 32, generator=generator)
coefficients = torch.tanh(torch.randn(100, 32, generator=generator))
boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(100, 1)
encode_masks(proto, coefficients, boxes, 20, 20)
baseline = peak()
sizes = [rle["size"] for rle in encode_masks(proto, coefficients, boxes, 3000, 4000)]
print(json.dumps({"n": len(sizes), "encode": peak() - baseline}))
"""


def test_memory_for_a_large_image():
    """100 detections that fill a 4000 x 3000 image; peak of the process above its baseline."""
    result = subprocess.run([sys.executable, "-c", LARGE], cwd=str(ROOT), stdout=subprocess.PIPE,
                            check=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    peaks = json.loads(result.stdout.decode())
    assert peaks["n"] == 100
    assert peaks["encode"] < 256, peaks


def test_faster_than_the_plain_way():
    scene = make_scene(0, count=60, side=138, prototypes=32)

    def plain():
        for mask in assemble_masks(*scene, 480, 640).numpy():
            pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))

    def cpu_seconds(work):
        times = []
        for _ in range(3):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    ratio = cpu_seconds(plain) / cpu_seconds(lambda: encode_masks(*scene, 480, 640))
    assert ratio > 2, ratio
