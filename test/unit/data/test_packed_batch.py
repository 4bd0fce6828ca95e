"""Masks travel as bits and arrive as they were."""

from __future__ import annotations

import torch

from data.batch import Batch, bit_values, pack

B, G, K, P, C, S, H = 2, 48, 100, 19248, 81, 550, 138


def full_size_batch():
    generator = torch.Generator().manual_seed(0)

    def integers(high, shape, dtype):
        return torch.randint(0, high, shape, generator=generator).to(dtype)

    return Batch(
        images=integers(256, (B, 3, S, S), torch.uint8),
        class_targets=integers(C, (B, P), torch.int8),
        box_targets=torch.randn(B, P, 4, generator=generator),
        num_positives=integers(9, (B,), torch.int32),
        mask_index=integers(P, (B, K), torch.int16),
        mask_gt=integers(G, (B, K), torch.int8),
        mask_valid=integers(2, (B, K), torch.bool),
        mask_scale=torch.ones(B), gt_boxes=torch.rand(B, G, 4, generator=generator),
        gt_labels=integers(C, (B, G), torch.int8),
        gt_masks=integers(2, (B, G, H, H), torch.uint8),
        semantic=integers(2, (B, C - 1, H // 2, H // 2), torch.uint8),
        image_ids=integers(1000, (B,), torch.int64))


def test_unpacked_on_the_device_equals_the_batch(device):
    batch = full_size_batch()
    arrived = pack(batch).to(device).unpack(bit_values(device))
    for name, sent in vars(batch).items():
        found = getattr(arrived, name).cpu()
        assert found.dtype == sent.dtype and torch.equal(found, sent), name


def test_bytes_to_the_device_per_image():
    batch = full_size_batch()
    packed = pack(batch)
    assert batch.nbytes / B == 2530940
    assert packed.nbytes / B == 1404860
    assert len(packed) == B


def test_input_is_left_alone():
    batch = full_size_batch()
    before = batch.gt_masks.clone()
    pack(batch)
    assert torch.equal(batch.gt_masks, before)
