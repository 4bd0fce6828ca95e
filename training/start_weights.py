"""The first weights of a training: a whole network to train on from, or a backbone, or none."""

from __future__ import annotations

import argparse
import os
from typing import Any, Optional, Sequence, Tuple

from utils.checkpoint import load_for_inference
from utils.weights.backbone import load_backbone
from utils.weights.loading import load_for_fine_tuning


def load_start_weights(model: Any, args: argparse.Namespace, configured_backbone: str,
                       class_names: Sequence[str]) -> Tuple[Optional[str], bool]:
    """Load what `--weights` or else `--backbone_weights` names.

    A run that goes on from a checkpoint loads nothing here, but is as pretrained as it was.

    Args:
        model: newly built network; its `backbone` is loaded alone where `--weights` is not given.
        args: the command line.
        configured_backbone: the recipe's backbone file, or "none".
        class_names: of the training data.

    Returns:
        What was loaded, for the user, or None; and whether the backbone is pretrained.
    """
    backbone = args.backbone_weights or configured_backbone
    pretrained = args.weights is not None or backbone != "none"
    if args.resume is not None or not pretrained:
        return None, pretrained
    if args.weights is not None:
        stored = load_for_inference(args.weights)
        report = load_for_fine_tuning(model, stored.weights, len(class_names), class_names,
                                      stored.class_names)
        return "Weights : {}".format(report), True
    path = backbone if os.path.exists(backbone) else os.path.join(args.save_folder, backbone)
    return "Backbone : {}".format(load_backbone(model.backbone, path)), True
