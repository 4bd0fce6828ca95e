"""The original YOLACT, measured in a process of its own: its modules have the names of ours.

`run.py --against` starts it with the original's folder, a recipe, an image folder, an annotation
file, and a file of samples. For each line of its standard input ("train", "find", "load") it does
that piece of work once and answers with the CPU milliseconds.

No file of the original is changed. What it needs and a CPU has not (a current CUDA device,
torchvision), or what newer NumPy refuses, is put in its place before its modules are imported; how
it computes stays as it is.
"""

from __future__ import annotations

import sys
import time
import types
from typing import Any, Callable, Dict

import cv2
import numpy as np
import torch


def make_importable() -> None:
    """Let the original's modules be imported without CUDA, torchvision and NumPy 1."""
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 2  # with one it compiles its pyramid by TorchScript
    for name in ("torchvision", "torchvision.models", "torchvision.models.resnet"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].transforms = None
    sys.modules["torchvision.models.resnet"].Bottleneck = None
    np.float = float
    # Of options of different lengths NumPy makes no array any more.
    np.random.choice = lambda options: options[np.random.randint(len(options))]


def build_works(recipe: str, images: str, annotations: str,
                samples: str) -> Dict[str, Callable[[], Any]]:
    """The pieces of work by name; the network has random weights and trains its batch norm."""
    from data import MEANS, STD, COCODetection, cfg, set_cfg
    from layers.modules import MultiBoxLoss
    from utils import timer
    from utils.augmentations import SSDAugmentation

    set_cfg(recipe + "_config")
    from yolact import Yolact

    timer.disable_all()
    net: Any = Yolact()
    optimizer = torch.optim.SGD(net.parameters(), lr=cfg.lr, momentum=cfg.momentum,
                                weight_decay=cfg.decay)
    criterion = MultiBoxLoss(cfg.num_classes, cfg.positive_iou_threshold,
                             cfg.negative_iou_threshold, cfg.ohem_negpos_ratio)
    stored = np.load(samples)
    pixels = (stored["images"].astype(np.float32) - MEANS) / STD  # BGR
    batch = torch.from_numpy(pixels[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32))
    targets = [torch.from_numpy(stored[f"targets{n}"]) for n in range(len(batch))]
    masks = [torch.from_numpy(stored[f"masks{n}"]) for n in range(len(batch))]

    def train() -> None:
        net.train()
        optimizer.zero_grad()
        losses = criterion(net, net(batch), targets, [mask.float() for mask in masks],
                           [0] * len(batch))
        loss = sum(losses.values())
        loss.backward()
        if torch.isfinite(loss).item():
            optimizer.step()

    def find() -> None:
        net.eval()
        with torch.no_grad():
            net(batch[:1])

    dataset = COCODetection(images, annotations, transform=SSDAugmentation(MEANS))

    def load() -> None:
        for n in range(min(20, len(dataset))):
            dataset[n]

    return {"train": train, "find": find, "load": load}


def main() -> None:
    """Answer until the input ends."""
    folder, *arguments = sys.argv[1:]
    sys.path[0] = folder
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    make_importable()
    answers, sys.stdout = sys.stdout, sys.stderr  # the original talks
    works = build_works(*arguments)
    for line in sys.stdin:
        start = time.process_time()
        works[line.strip()]()
        print(1e3 * (time.process_time() - start), file=answers, flush=True)


if __name__ == "__main__":
    main()
