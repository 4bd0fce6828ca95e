"""CPU time of evaluation beside the network: suppression, masks with run lengths, COCOeval.

    python test/benchmark/bench_eval.py ../shared/coco_mini [--images=20]

Prints CPU milliseconds per image (all threads) at 550 px, 100 detections an image. Prototypes are
random but smooth; boxes are the images' own annotations, moved a little, so that sizes are real.
The plain way is `assemble_masks` and `pycocotools.mask.encode`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pycocotools.mask
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.coco import CocoDataset  # noqa: E402
from data.config import get_config  # noqa: E402
from data.datasets import dataset_paths  # noqa: E402
from layers.anchors import make_priors  # noqa: E402
from layers.detection import NMS_KINDS, Detect  # noqa: E402
from layers.masks import assemble_masks, boxes_to_pixels, encode_masks  # noqa: E402
from utils.inference.detector import Detector  # noqa: E402
from utils.inference.evaluation import Evaluation  # noqa: E402
from utils.inference.evaluator import CocoEvaluator  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402
from yolact import build_yolact  # noqa: E402

DETECTIONS = 100


def cpu_milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Best of `repeats`, in CPU time of the whole process."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def make_predictions(candidates: int) -> Dict[str, Tensor]:
    """Predictions of a 550 px network with about this many confident priors, in clusters."""
    priors = make_priors(get_config("yolact_base"))
    generator = torch.Generator().manual_seed(0)
    conf = torch.randn(1, len(priors), 81, generator=generator)
    conf[:, :, 0] += 12
    seeds = torch.randint(len(priors), (max(candidates // 10, 1),), generator=generator)
    near = (seeds.unsqueeze(1) + torch.arange(10)).reshape(-1).clamp(max=len(priors) - 1)
    classes = torch.randint(1, 81, (len(seeds), 1), generator=generator).expand(-1, 10).reshape(-1)
    conf[0, near, classes] += 14
    return {"loc": 0.3 * torch.randn(1, len(priors), 4, generator=generator), "conf": conf,
            "mask": torch.zeros(1, len(priors), 32), "priors": priors}


def bench_suppression() -> None:
    """Softmax, decoding and suppression; with and without leaving out priors on the host."""
    for candidates in (100, 1000):
        predictions = make_predictions(candidates)
        for nms in NMS_KINDS:
            detect = Detect(81, 0.05, 0.5, 200, DETECTIONS, nms)
            used = cpu_milliseconds(lambda: detect(predictions), 5)  # noqa: B023
            detect.compact = False
            static = cpu_milliseconds(lambda: detect(predictions), 3)  # noqa: B023
            print(f"suppression {nms:11s} about {candidates:4d} candidates: {used:5.1f} ms  "
                  f"(static shapes: {static:.1f} ms)")


Scene = Tuple[Tensor, Tensor, Tensor, int, int]


def make_scenes(dataset: CocoDataset, count: int) -> List[Scene]:
    """Prototypes, coefficients and boxes for the first `count` images with objects."""
    generator = torch.Generator().manual_seed(0)
    scenes: List[Scene] = []
    for n in range(len(dataset)):
        boxes = torch.from_numpy(dataset[n].boxes)
        if not len(boxes) or len(scenes) == count:
            continue
        coarse = torch.randn(1, 32, 12, 12, generator=generator)
        proto = F.interpolate(coarse, (138, 138), mode="bilinear", align_corners=False)
        rows = torch.randint(len(boxes), (DETECTIONS,), generator=generator)
        moved = boxes[rows] + 0.02 * torch.randn(DETECTIONS, 4, generator=generator)
        coefficients = torch.tanh(torch.randn(DETECTIONS, 32, generator=generator))
        _, width, height = dataset.image_info(n)
        scenes.append((proto[0].permute(1, 2, 0).relu().contiguous(), coefficients, moved, height,
                       width))
    return scenes


def encode_plain(scene: Scene) -> List[Dict[str, Any]]:
    """Masks at the image's size, then run lengths from their pixels."""
    return [pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            for mask in assemble_masks(*scene).numpy()]


def bench_masks(scenes: List[Scene]) -> None:
    """Both ways in turn on the same images."""
    plain, ours, differing, pixels = [], [], 0, 0
    for scene in scenes:
        plain.append(cpu_milliseconds(lambda: encode_plain(scene), 2))  # noqa: B023
        ours.append(cpu_milliseconds(lambda: encode_masks(*scene), 2))  # noqa: B023
        found = [dict(rle, counts=rle["counts"].encode()) for rle in encode_masks(*scene)]
        wrong = pycocotools.mask.decode(found) != pycocotools.mask.decode(encode_plain(scene))
        differing, pixels = differing + int(wrong.sum()), pixels + wrong.size
    print(f"masks and run lengths, {len(scenes)} images, {DETECTIONS} detections: "
          f"{np.mean(ours):.1f} ms  (plain way: {np.mean(plain):.1f} ms, "
          f"{np.mean(plain) / np.mean(ours):.1f} times); {differing} of {pixels} pixels differ")
    proto, coefficients, boxes, _, _ = scenes[0]
    full = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(DETECTIONS, 1)
    for name, some in (("real", boxes), ("full-size", full)):
        print("4000 x 3000 image, {} boxes: {:.1f} ms".format(name, cpu_milliseconds(
            lambda: encode_masks(proto, coefficients, some, 3000, 4000), 2)))  # noqa: B023


def bench_scoring(dataset: CocoDataset, scenes: List[Scene]) -> None:
    """COCOeval of both kinds on these images."""
    evaluator = CocoEvaluator(dataset.annotation_file, [c.id for c in dataset.categories])
    with_objects = [n for n in range(len(dataset)) if len(dataset[n].boxes)]
    rng = np.random.default_rng(0)
    for n, scene in zip(with_objects, scenes):
        labels = rng.choice(dataset[n].labels, DETECTIONS) - 1
        evaluator.add(int(dataset.image_ids[n]), boxes_to_pixels(*scene[2:]).numpy(),
                      encode_masks(*scene), labels.tolist(), rng.random(DETECTIONS).tolist())
    print(f"COCOeval of both kinds, {len(evaluator)} images: "
          f"{cpu_milliseconds(evaluator.evaluate, 1) / 1000:.2f} CPU-seconds")


def bench_evaluation(dataset: CocoDataset, scenes: List[Scene]) -> None:
    """Everything but the network: predictions of about 1,000 candidates come from memory."""
    config = get_config("yolact_resnet50")
    model = build_yolact(config)
    predictions = dict(make_predictions(1000), proto=scenes[0][0].unsqueeze(0))
    predictions["mask"] = torch.tanh(torch.randn(predictions["mask"].shape))
    model.forward = lambda images: predictions  # type: ignore[method-assign]
    evaluation = Evaluation(dataset, [category.id for category in dataset.categories],
                            range(len(scenes)), batch_size=1, num_workers=0)
    detector = Detector(model, Detect.from_config(config), torch.device("cpu"))
    evaluator = evaluation.evaluator()
    found = cpu_milliseconds(lambda: evaluation.run(detector, evaluator), 1)
    scored = cpu_milliseconds(evaluator.evaluate, 1)
    count = len(evaluator)
    print(f"evaluation without the network, {count} images: {found / count:.1f} ms to find, "
          f"{scored / count:.1f} ms to score")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder in COCO's layout")
    parser.add_argument("--images", type=int, default=20)
    args = parser.parse_args(argv)
    keep_freed_memory(torch.device("cpu"))
    dataset = CocoDataset(*dataset_paths("coco2017", args.data, "val"))
    scenes = make_scenes(dataset, args.images)
    with torch.no_grad():
        bench_suppression()
        bench_masks(scenes)
        bench_scoring(dataset, scenes)
        bench_evaluation(dataset, scenes)


if __name__ == "__main__":
    main()
