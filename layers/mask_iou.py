"""Mask re-scoring (YOLACT++, Bolya et al., 2020, section 6): a small network predicts a mask's IoU.

Letters: B batch, K mask samples, N detections, C classes with background, k prototypes, h x w
prototype size.
"""

from __future__ import annotations

from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.detection import Detections
from layers.masks import inside_box, mask_logits


class MaskIouNet(nn.Module):
    """IoU of a soft mask with its object's true mask, were the object of each class.

    3x3 convolutions with stride 2, a 1x1 convolution to C-1 and the maximum over what is left of
    the mask. They have no padding, so that masks need 63 pixels a side.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: List[nn.Module] = []
        previous = 1
        for features in (8, 16, 32, 64, 128):
            layers += [nn.Conv2d(previous, features, 3, stride=2), nn.ReLU(inplace=True)]
            previous = features
        layers += [nn.Conv2d(previous, num_classes - 1, 1), nn.ReLU(inplace=True)]
        self.maskiou_net = nn.Sequential(*layers)

    def forward(self, masks: Tensor) -> Tensor:
        """Soft masks `[n,1,h,w]` in 0..1, zero outside of their boxes -> `[n,C-1]`, 0 or more."""
        # Where the parameters are in half precision, the loss that this is called from is not.
        x = self.maskiou_net(masks.to(next(self.parameters()).dtype))
        return F.max_pool2d(x, x.shape[2:]).flatten(1).to(masks.dtype)


def crop_to_boxes(soft: Tensor, boxes: Tensor) -> Tensor:
    """Soft masks `[B, n, h, w]`, zero outside of boxes `[B, n, 4]` that are grown by a pixel."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    rows = inside_box(y1, y2, soft.shape[2]).unsqueeze(-1)
    columns = inside_box(x1, x2, soft.shape[3]).unsqueeze(-2)
    return soft.masked_fill(~(rows & columns), 0.0)


def mask_iou_loss(network: nn.Module, logits: Tensor, boxes: Tensor, masks: Tensor,
                  labels: Tensor, valid: Tensor, smallest_area: float) -> Tensor:
    """Smooth L1 between predicted and true IoU, summed over the samples.

    The true IoU is that of the predicted mask above 0.5, cropped to the true box, with the
    ground truth. Gradients reach the network and, through its input, the masks. All K slots run
    through the network; what does not count has weight 0.

    Args:
        network: a `MaskIouNet`.
        logits: float `[B, K, h, w]`, see `layers.masks.mask_logits`.
        boxes: float `[B, K, 4]`, ground-truth x1 y1 x2 y2 of each sample, relative.
        masks: `[B, K, h, w]` in {0, 1}, ground truth of each sample.
        labels: integer `[B, K]`, 1..C-1; anything in slots that hold no sample.
        valid: bool `[B, K]`, slots that hold a sample.
        smallest_area: ground-truth masks of up to this many pixels do not count.

    Returns:
        0-d float.
    """
    soft = crop_to_boxes(torch.sigmoid(logits), boxes)
    predicted = network(soft.flatten(0, 1).unsqueeze(1))
    label = (labels.long() - 1).clamp(min=0).reshape(-1, 1)
    predicted = predicted.gather(1, label).reshape(valid.shape)

    truth = masks.to(logits.dtype)
    found = (soft.detach() > 0.5).to(logits.dtype)
    area = truth.sum((2, 3))
    overlap = (truth * found).sum((2, 3))
    iou = overlap / (area + found.sum((2, 3)) - overlap).clamp(min=1)
    losses = F.smooth_l1_loss(predicted, iou, reduction="none")
    return (losses * (valid & (area > smallest_area))).sum()


@torch.no_grad()
def mask_scores(network: nn.Module, detections: Detections, proto: Tensor,
                crop: bool = True) -> Tensor:
    """Scores of the masks: the boxes' scores times the predicted IoU for their classes.

    Args:
        network: a `MaskIouNet`.
        detections: boxes of N rows an image.
        proto: float `[B, h, w, k]`.
        crop: whether the masks are cropped to their boxes.

    Returns:
        `[B, N]`, in the order of the rows; zero in rows not in use.
    """
    scores, rows = detections.scores, detections.scores.shape[1]
    if scores.device.type == "cpu":
        rows = max(1, int(detections.count.max()))  # the value is at hand; elsewhere it is not
    soft = torch.sigmoid(mask_logits(detections.coefficients[:, :rows].float(), proto.float()))
    if crop:
        soft = crop_to_boxes(soft, detections.boxes[:, :rows])
    predicted = network(soft.flatten(0, 1).unsqueeze(1)).reshape(soft.shape[:2] + (-1,))
    iou = predicted.gather(2, detections.classes[:, :rows].unsqueeze(2)).squeeze(2)
    return F.pad(scores[:, :rows] * iou, [0, scores.shape[1] - rows])
