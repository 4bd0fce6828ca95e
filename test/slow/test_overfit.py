"""The whole chain on real images: a network from scratch learns eight COCO images by heart.

Whatever is wrong between pixels, targets, loss, detection and scoring (a shifted mask, a swapped
axis, a class off by one) keeps this from reaching its mark.
"""

from __future__ import annotations

import json

import pytest
import torch

from data.coco import CocoDataset
from data.config import get_config
from data.loader import TrainDataset, TrainLoader, prefetch
from helpers.evaluation import evaluate
from layers.anchors import make_priors
from layers.multibox_loss import MultiBoxLoss
from train import train_step
from utils.amp import Precision
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.optimizer import build_optimizer
from utils.schedule import LearningRate
from yolact import build_yolact

IMAGES = 8
STEPS = 160


def first_images(coco_mini, target):
    """Write an annotation file with the first images of coco_mini that hold a few objects."""
    source = json.loads((coco_mini / "annotations" / "instances_train2017.json").read_text())
    objects = {}
    for annotation in source["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    chosen = [image for image in source["images"]
              if 2 <= len(objects.get(image["id"], [])) <= 8
              and not any(item["iscrowd"] for item in objects[image["id"]])][:IMAGES]
    annotations = [item for image in chosen for item in objects[image["id"]]]
    target.write_text(json.dumps(dict(source, images=chosen, annotations=annotations)))
    return CocoDataset(coco_mini / "train2017", target)


@pytest.mark.slow
def test_eight_real_images_are_learned_by_heart(coco_mini, tmp_path, device):
    dataset = first_images(coco_mini, tmp_path / "eight.json")
    assert len(dataset) == IMAGES
    config = get_config(
        "yolact_resnet50", max_size=200, num_classes=len(dataset.categories) + 1,
        pred_scales=[[24], [48], [80], [120], [180]], augment_photometric=False,
        augment_expand=False, augment_crop=False, augment_mirror=False, optimizer="adamw", lr=1e-3,
        decay=1e-4, clip_grad_norm=10.0, schedule="cosine", lr_warmup_init=1e-5,
        lr_warmup_until=20, max_iter=STEPS)
    torch.manual_seed(0)
    model = build_yolact(config).to(device)
    criterion = MultiBoxLoss.from_config(config)
    optimizer = build_optimizer(config, model)
    learning_rate = LearningRate.from_config(config, total_batch=IMAGES)
    samples = TrainDataset.from_config(dataset, config, lambda recipe: make_priors(recipe).numpy())
    loader = TrainLoader(samples, IMAGES)
    sharing = Sharing(Processes(), device)
    for step, batch in zip(range(STEPS), prefetch(loader, device)):
        losses = train_step(model, criterion, optimizer, [batch], learning_rate(step), sharing,
                            Precision())
        if step % 20 == 0 or step == STEPS - 1:
            print(step, {name: round(value.item(), 3) for name, value in losses.items()})

    results = evaluate(model.eval(), config, dataset, device, num_workers=0)
    print(results.statistics_table())
    print(results.table())
    assert results.box.statistics["AP50"] >= 0.9
    assert results.mask.statistics["AP50"] >= 0.8
