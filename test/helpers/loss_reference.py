"""Slow and plain second implementations that the loss is held against, and golden batches.

Written from the formulas alone, with loops and float64, and sharing nothing with the package.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F


def match_slowly(gt_boxes, gt_labels, crowd_boxes, priors, positive_iou=0.5, negative_iou=0.4,
                 crowd_iou=0.7):
    """Class targets [P], ground-truth slot [P] and encoded boxes [P, 4] of one image."""
    corners = np.concatenate([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2],
                             axis=1)
    if not len(gt_boxes):
        classes = np.zeros(len(priors), np.int64)
        slot = np.zeros(len(priors), np.int64)
        encoded = np.zeros((len(priors), 4), np.float32)
        best = np.zeros(len(priors))
    else:
        overlap = _intersection(gt_boxes, corners)
        union = _area(gt_boxes)[:, None] + _area(corners)[None] - overlap
        overlap = overlap / union
        best, slot = overlap.max(0), overlap.argmax(0)
        for _ in range(len(gt_boxes)):
            row, column = np.unravel_index(overlap.argmax(), overlap.shape)
            best[column], slot[column] = 2, row
            overlap[row, :] = overlap[:, column] = -1
        classes = gt_labels[slot].astype(np.int64)
        box = gt_boxes[slot]
        center, size = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]
        encoded = np.concatenate([(center - priors[:, :2]) / (0.1 * priors[:, 2:]),
                                  np.log(size / priors[:, 2:]) / 0.2], axis=1).astype(np.float32)
    classes[best < positive_iou] = -1
    classes[best < negative_iou] = 0
    if len(crowd_boxes):
        covered = (_intersection(crowd_boxes, corners) / _area(corners)).max(0)
        classes[(classes <= 0) & (covered > crowd_iou)] = -1
    return classes, slot, encoded


def _area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _intersection(a, b):
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.clip(high - low, 0, None).prod(2)


def make_batch(images, priors, num_classes, proto_size, semantic_size, samples=100, slots=None,
               choose=None):
    """Stack images, each a dict of boxes [n,4], labels [n] (from 1), masks [n,S,S], crowds [m,4].

    The first `samples` positives in prior order are sampled, as in the golden numbers, unless
    `choose(positives)` returns others.
    """
    slots = slots or max([1] + [len(image["labels"]) for image in images])
    rows = [_one_image(image, priors, num_classes, (proto_size, semantic_size), samples, slots,
                       choose) for image in images]
    fields = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
    return SimpleNamespace(**fields)


def _one_image(image, priors, num_classes, sizes, samples, slots, choose):
    proto_size, semantic_size = sizes
    boxes = np.asarray(image["boxes"], np.float32).reshape(-1, 4)
    labels = np.asarray(image["labels"], np.int64)
    crowds = np.asarray(image.get("crowds", ()), np.float32).reshape(-1, 4)
    classes, slot, encoded = match_slowly(boxes, labels, crowds, priors)
    positives = np.nonzero(classes > 0)[0]
    chosen = (choose(positives) if choose else positives)[:samples]
    row = {
        "class_targets": classes.astype(np.int16), "box_targets": encoded,
        "num_positives": np.int32(len(positives)),
        "mask_index": np.zeros(samples, np.int32), "mask_gt": np.zeros(samples, np.int16),
        "mask_valid": np.zeros(samples, np.bool_),
        "mask_scale": np.float32(len(positives) / max(len(chosen), 1)),
        "gt_boxes": np.zeros((slots, 4), np.float32), "gt_labels": np.zeros(slots, np.int16),
        "gt_masks": np.zeros((slots, proto_size, proto_size), np.uint8),
        "semantic": np.zeros((num_classes - 1, semantic_size, semantic_size), np.uint8),
    }
    count = len(chosen)
    row["mask_index"][:count], row["mask_gt"][:count] = chosen, slot[chosen]
    row["mask_valid"][:count] = True
    row["gt_boxes"][:len(boxes)], row["gt_labels"][:len(boxes)] = boxes, labels
    if len(boxes):
        masks = torch.from_numpy(np.asarray(image["masks"], np.float32))[None]
        row["gt_masks"][:len(boxes)] = _shrink(masks, proto_size)
        for label, mask in zip(labels, _shrink(masks, semantic_size)):
            row["semantic"][label - 1] |= mask
    return row


def _shrink(masks, side):
    small = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
    return (small[0] > 0.5).numpy().astype(np.uint8)


def golden_images(data, count=2):
    """The images of a golden file `loss_*` or `train4steps_*`, as `make_batch` takes them."""
    images = []
    for index in range(count):
        target = data[f"in_target_{index}"]
        shape = data[f"in_masks_{index}_shape"]
        bits = np.unpackbits(data[f"in_masks_{index}_packed"])[:shape.prod()]
        crowds = int(data["num_crowds"][index]) if "num_crowds" in data else 0
        real = len(target) - crowds
        images.append({"boxes": target[:real, :4], "labels": target[:real, 4].astype(int) + 1,
                       "masks": bits.reshape(shape)[:real], "crowds": target[real:, :4]})
    return images


def losses_slowly(predictions, batch, alphas=(1.5, 1.0, 6.125, 1.0), ratio=3):
    """B, C, M, S with loops over images and objects, in float64, as in the paper's code."""
    loc, conf, mask, proto, segm = (predictions[key].double() for key in
                                    ("loc", "conf", "mask", "proto", "segm"))
    total = max(int(batch.num_positives.sum()), 1)
    nothing = sum(tensor.sum() * 0 for tensor in (loc, conf, mask, proto, segm))
    sums = [nothing] * 4
    for b in range(len(loc)):
        targets = batch.class_targets[b].long()
        positive = (targets > 0).nonzero().reshape(-1).tolist()
        negative = (targets == 0).nonzero().reshape(-1)
        for p in positive:
            d = (loc[b, p] - batch.box_targets[b, p].double()).abs()
            sums[0] = sums[0] + torch.where(d < 1, d * d / 2, d - 0.5).sum()
        entropy = -F.log_softmax(conf[b], dim=1)
        hardest = entropy[negative, 0].sort(descending=True)[0]
        sums[1] = sums[1] + hardest[:min(ratio * len(positive), len(targets) - 1)].sum()
        sums[1] = sums[1] + sum(entropy[p, targets[p]] for p in positive)
        sums[2] = sums[2] + _mask_losses(mask[b], proto[b], batch, b)
        y = batch.semantic[b].double()
        sums[3] = sums[3] + (F.softplus(segm[b], threshold=500) - segm[b] * y).sum()
    sums[3] = sums[3] / segm[0, 0].numel() / len(loc) * total
    return {key: s * alpha / total for key, s, alpha in zip("BCMS", sums, alphas)}


def _mask_losses(mask, proto, batch, b):
    height, width = proto.shape[:2]
    total = mask.sum() * 0
    for i in range(batch.mask_index.shape[1]):
        if not batch.mask_valid[b, i]:
            continue
        slot = int(batch.mask_gt[b, i])
        x1, y1, x2, y2 = batch.gt_boxes[b, slot].tolist()
        columns = [x for x in range(width) if x1 * width - 1 <= x < x2 * width + 1]
        rows = [y for y in range(height) if y1 * height - 1 <= y < y2 * height + 1]
        window = proto[rows][:, columns]
        logits = window @ mask[int(batch.mask_index[b, i])]
        target = batch.gt_masks[b, slot][rows][:, columns].double()
        bce = (F.softplus(logits, threshold=500) - logits * target).sum()
        total = total + bce / ((x2 - x1) * (y2 - y1) * height * width) * float(batch.mask_scale[b])
    return total


def target_batch(config, images, slots=None, seed=0):
    """The same images through the package's own targets; the pixels are random."""
    from data.augment import AugmentedSample
    from data.batch import collate
    from data.targets import TargetMaker
    from layers.anchors import make_priors

    rng = np.random.default_rng(seed)
    slots = slots or max([1] + [len(image["labels"]) for image in images])
    maker = TargetMaker(make_priors(config).numpy(), config.num_classes, slots,
                        config.masks_to_train, config.max_size, config.proto_size,
                        config.semantic_size)
    side, rows = config.max_size, []
    for index, image in enumerate(images):
        count = len(image["labels"])
        sample = AugmentedSample(
            image=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
            boxes=np.asarray(image["boxes"], np.float32).reshape(-1, 4),
            labels=np.asarray(image["labels"], np.int64),
            masks=np.asarray(image["masks"], np.uint8).reshape(count, side, side),
            crowd_boxes=np.asarray(image.get("crowds", ()), np.float32).reshape(-1, 4),
            image_id=index + 1, mask_extents=np.tile([0, 0, side, side], (count, 1)))
        rows.append(maker(sample, rng))
    return collate(rows)
