"""CPU time of the whole sample path against decoding the same files alone.

    python test/benchmark/bench_loader.py --data /data/coco [--config yolact_base]

One process, one thread. Each image is decoded by `cv2.imread` and then taken through the path
(read, augment, targets, collate), one after the other, in several passes; a stage's time is CPU
time (`time.process_time`), and for each image the smallest of `--repeats` takes counts, so that
other load on the machine does not.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.batch import (
    PackedBatch,
    collate,  # noqa: E402
    pack,
)
from data.coco import CocoDataset  # noqa: E402
from data.config import Config, get_config  # noqa: E402
from data.datasets import dataset_paths  # noqa: E402
from data.loader import TrainDataset  # noqa: E402
from layers.anchors import make_priors  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402

STAGES = ("imread", "read", "augment", "targets", "collate")


def best_of(repeats: int, stage: Callable[[], Any], times: List[float]) -> Any:
    """Run `stage` several times, note the smallest CPU time in seconds, return the last result."""
    smallest = float("inf")
    result = None
    for _ in range(repeats):
        start = time.process_time()
        result = stage()
        smallest = min(smallest, time.process_time() - start)
    times.append(smallest)
    return result


def _seeded(stage: Callable[[Any, np.random.Generator], Any], value: Any, seed: List[int]) -> Any:
    return stage(value, np.random.default_rng(seed))


def measure(dataset: CocoDataset, config: Config, epochs: int, repeats: int) -> Dict[str, Any]:
    """Mean milliseconds per image of each stage, and the bytes of an image in a batch."""
    samples = TrainDataset.from_config(dataset, config, lambda recipe: make_priors(recipe).numpy())
    augment, make_targets = samples.paths[config.max_size]
    times: Dict[str, List[float]] = {stage: [] for stage in STAGES}
    objects, batch = 0, None
    for epoch in range(epochs):
        for index in range(len(dataset)):
            path = dataset.image_path(index)
            best_of(repeats, functools.partial(cv2.imread, path), times["imread"])
            sample = best_of(repeats, functools.partial(dataset.__getitem__, index), times["read"])
            seed = [0, epoch, index]
            augmented = best_of(repeats, functools.partial(_seeded, augment, sample, seed),
                                times["augment"])
            targets = best_of(repeats, functools.partial(_seeded, make_targets, augmented, seed),
                              times["targets"])
            batch = best_of(repeats, functools.partial(_collate, targets), times["collate"])
            objects += len(augmented.boxes)
    assert batch is not None
    result: Dict[str, Any] = {stage: 1e3 * float(np.mean(times[stage])) for stage in STAGES}
    result["images"] = epochs * len(dataset)
    result["objects"] = objects / result["images"]
    result["slots"] = batch.gt_boxes.shape[1]
    result["bytes"] = {name: value.numel() * value.element_size()
                       for name, value in vars(batch).items()}
    return result


def _collate(targets: Dict[str, Any]) -> PackedBatch:
    return pack(collate([targets]))


def report(config: Config, found: Dict[str, Any], max_ratio: float) -> int:
    """Print what was measured; returns the exit code."""
    path = sum(found[stage] for stage in STAGES[1:])
    ratio = path / found["imread"]
    print("{}: {} images, {:.1f} objects each after augmentation".format(
        config.name, found["images"], found["objects"]))
    for stage in STAGES:
        print(f"{stage:<10}{found[stage]:7.3f} ms")
    print("{:<10}{:7.3f} ms, {:.0f} images per CPU-second".format("path", path, 1e3 / path))
    print(f"path / imread = {ratio:.2f}")
    print("{} bytes per image with {} ground-truth slots:".format(
        sum(found["bytes"].values()), found["slots"]))
    print(", ".join(f"{name} {size}" for name, size in found["bytes"].items()))
    if max_ratio and ratio > max_ratio:
        print(f"more than {max_ratio:.2f} times cv2.imread")
        return 1
    return 0


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder in COCO's layout")
    parser.add_argument("--config", default="yolact_base")
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--epochs", type=int, default=3, help="passes over the images")
    parser.add_argument("--repeats", type=int, default=3, help="takes of each stage and image")
    parser.add_argument("--max_ratio", type=float, default=0.0,
                        help="fail if the path costs more than this many times cv2.imread")
    args = parser.parse_args(argv)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    config = get_config(args.config)
    dataset = CocoDataset(*dataset_paths(config.dataset, args.data, args.split))
    config = config.replace(num_classes=len(dataset.categories) + 1)
    return report(config, measure(dataset, config, args.epochs, args.repeats), args.max_ratio)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line entry; returns the exit code."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
