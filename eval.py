"""Score YOLACT: `python eval.py --trained_model=weights/x.pth --val_data=/data/coco`.

Lines printed here avoid two words that the launchers look for; see `utils.coco_results`.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import cv2
import torch
from torch import Tensor

from data.coco import CocoDataset
from data.config import Config, get_config
from data.datasets import open_dataset
from data.image_file import read_image
from layers.detection import Detect, Detections, ImageDetections
from layers.mask_iou import mask_scores
from layers.masks import assemble_masks, boxes_to_pixels, encode_masks
from utils import checkpoint, inference
from utils.class_match import match_categories
from utils.cli import run_main
from utils.coco_metrics import CocoEvaluator
from utils.coco_results import CocoResults
from utils.device import describe, device_count, pin_memory_supported, select_device, synchronize
from utils.distributed_eval import gather_state, shard
from utils.drawing import draw_instances
from utils.errors import UserError
from utils.eval_flags import nms_kind, parse_eval_flags, split_image_flag
from utils.failures import recorded
from utils.files import write_whole
from utils.inference import StageTimes
from utils.processes import Processes
from utils.weight_loading import LoadReport, load_network
from yolact import Yolact, build_yolact

CPU = torch.device("cpu")
Launched = Tuple[Detections, Tensor, Tensor]
"""Detections, prototypes, and scores of the masks in the order of the detections."""


def fetch(launched: Launched) -> Launched:
    """Copy to the CPU; waits for the device."""
    return launched[0].to(CPU), launched[1].to(CPU), launched[2].to(CPU)


@dataclass
class Finder:
    """A network with everything between its predictions and the objects of an image."""

    model: Yolact
    detect: Detect
    device: torch.device
    crop: bool = True
    score_threshold: float = 0.0

    def launch(self, images: Tensor, times: StageTimes) -> Launched:
        """Queue uint8 images `[B,3,S,S]`; detections and prototypes are still on the device."""
        with times.stage("network"):
            predictions = self.model(images.to(self.device, non_blocking=True))
        with times.stage("detection"):
            found, proto = self.detect(predictions), predictions["proto"]
            if self.model.maskiou_net is None:
                return found, proto, found.scores
            return found, proto, mask_scores(self.model.maskiou_net, found, proto, self.crop)

    def finish(self, batch: inference.ImageBatch, launched: Launched, evaluator: CocoEvaluator,
               times: StageTimes) -> None:
        """Fetch a batch's detections and hand them to the evaluator."""
        with times.stage("transfer"):
            found, proto, rescored = fetch(launched)
        with times.stage("run lengths"):
            for n, (image_id, (height, width)) in enumerate(zip(batch.image_ids, batch.sizes)):
                objects = found.of_image(n, self.score_threshold)
                rles = encode_masks(proto[n], objects.coefficients, objects.boxes, height, width,
                                    self.crop)
                evaluator.add(image_id, boxes_to_pixels(objects.boxes, height, width).numpy(),
                              rles, objects.classes.tolist(), objects.scores.tolist(),
                              rescored[n, :len(rles)].tolist())


@torch.no_grad()
def collect(finder: Finder, dataset: CocoDataset, indices: Sequence[int], evaluator: CocoEvaluator,
            batch_size: int, num_workers: int, times: Optional[StageTimes] = None,
            show_progress: bool = False) -> None:
    """Add the detections of images `indices` to the evaluator. The model keeps its mode."""
    spent = times or StageTimes()
    images = inference.EvaluationImages(dataset, indices, finder.model.input_size)
    loader = inference.EvaluationLoader(images, batch_size, num_workers,
                                        pin_memory_supported(finder.device))
    progress = inference.ProgressLine(len(indices), sys.stderr, show_progress)
    was_training = finder.model.training
    finder.model.eval()
    try:
        inference.run_pipelined(
            loader, lambda planes: finder.launch(planes, spent),
            lambda batch, launched: finder.finish(batch, launched, evaluator, spent),
            spent, progress)
    finally:
        finder.model.train(was_training)


def collect_shared(finder: Finder, dataset: CocoDataset, indices: Sequence[int],
                   evaluator: CocoEvaluator, batch_size: int, num_workers: int,
                   processes: Processes, times: Optional[StageTimes] = None,
                   show_progress: bool = False) -> None:
    """`collect` with all processes together; the main one's evaluator gets the detections."""
    part = CocoEvaluator.for_dataset(dataset, evaluator.category_ids)
    collect(finder, dataset, shard(indices, batch_size, processes), part, batch_size, num_workers,
            times, show_progress)
    image_ids = [int(dataset.image_ids[index]) for index in indices]
    evaluator.merge(gather_state(part.state(), image_ids, processes, finder.device))


def evaluate_dataset(model: Yolact, config: Config, dataset: CocoDataset, device: torch.device,
                     max_images: int = -1, batch_size: int = 4, num_workers: int = 2,
                     class_names: Optional[Sequence[str]] = None,
                     processes: Processes = Processes()) -> Optional[CocoResults]:  # noqa: B008
    """Score `model` on the first `max_images` images of `dataset` (-1: all), with Fast NMS.

    `class_names` are the network's, where they are known. The model keeps its mode. Several
    processes share the images; only the main one gets results, the others None.
    """
    ids, _ = match_categories(class_names, config.num_classes - 1, dataset.categories,
                              "the network", dataset.annotation_file)
    evaluator = CocoEvaluator.for_dataset(dataset, ids)
    collect_shared(Finder(model, Detect.from_config(config), device), dataset,
                   inference.choose_images(len(dataset), max_images), evaluator, batch_size,
                   num_workers, processes)
    return evaluator.evaluate() if processes.is_main else None


def load_model(
        args: argparse.Namespace) -> Tuple[Yolact, Config, Optional[List[str]], LoadReport]:
    """Network, its configuration, its class names if they are known, and what was loaded."""
    wanted = get_config(args.config) if args.config else None
    name = wanted.name if wanted else None
    path = checkpoint.find_checkpoint(args.trained_model, args.save_folder, name)
    stored = checkpoint.load_for_inference(path, name)
    if stored.config is not None and name in (None, stored.config["name"]):
        config = Config.from_dict(stored.config)
    elif stored.config_name is not None:
        config = get_config(stored.config_name)
    else:
        raise UserError("'{}' does not say which configuration it belongs to; give it with "
                        "--config".format(path))
    contents = stored.weights.contents
    changes = {} if contents is None or contents.num_classes is None else {
        "num_classes": contents.num_classes + 1}
    if args.max_num_detections is not None:
        changes["max_num_detections"] = args.max_num_detections
        changes["nms_top_k"] = max(config.nms_top_k, args.max_num_detections)
    config = config.replace(**changes)
    model = build_yolact(config)
    report = load_network(model, stored.weights)
    return model.eval(), config, stored.class_names, report


def score(args: argparse.Namespace, finder: Finder, config: Config,
          class_names: Optional[List[str]], loaded: LoadReport, processes: Processes) -> int:
    """Evaluate on a dataset; the main process prints the scores and writes what was asked for."""
    dataset = open_dataset(args.dataset or config.dataset, args.val_data, args.valid_images,
                           args.valid_info, "val", require_annotations=False)
    truth = os.path.basename(dataset.annotation_file)
    weights = os.path.basename(loaded.source.path)
    ids, notes = match_categories(class_names, config.num_classes - 1, dataset.categories,
                                  weights, truth, args.map_classes)
    evaluator = CocoEvaluator.for_dataset(dataset, ids)
    if not evaluator.has_ground_truth and not args.output_coco_json:
        raise UserError("{} has no annotations to score against; --output_coco_json writes the "
                        "result files".format(dataset.annotation_file))
    chosen = inference.choose_images(len(dataset), args.max_images, args.shuffle, args.seed)
    if processes.is_main:
        print("\n".join([describe(finder.device), "Weights : {}".format(loaded)] + notes + [
            "{}: {} images of {}".format(weights, len(chosen), truth)]), flush=True)

    times = StageTimes((lambda: synchronize(finder.device)) if args.benchmark else None)
    collect_shared(finder, dataset, chosen, evaluator, args.batch_size, args.num_workers,
                   processes, times, processes.is_main and not args.no_bar)
    print(times.sentence(stages=args.benchmark), flush=True)
    if not processes.is_main:
        return 0
    if args.output_coco_json:
        evaluator.write_json(args.bbox_det_file, args.mask_det_file)
        print("Results of {} images written in COCO's format".format(len(evaluator)), flush=True)
    if not evaluator.has_ground_truth:
        print("{} has no annotations: nothing to score".format(truth))
        return 0
    results = evaluator.evaluate()
    if args.per_class_file:
        results.write_per_class(args.per_class_file)
    print("\n".join(results.notes + [results.statistics_table(), "", results.table()]), flush=True)
    return 0


@torch.no_grad()
def draw(args: argparse.Namespace, finder: Finder, config: Config,
         class_names: Optional[List[str]]) -> int:
    """Draw the best objects of one image."""
    source, target = split_image_flag(args.image)
    image = read_image(source)
    height, width = image.shape[:2]
    planes = torch.from_numpy(inference.to_network_input(image, config.max_size)).unsqueeze(0)
    found, proto, rescored = fetch(finder.launch(planes, StageTimes()))
    objects = found.of_image(0, finder.score_threshold)
    scores, best = rescored[0, :len(objects.scores)].sort(descending=True)
    best = best[scores >= finder.score_threshold][:args.top_k]
    objects = ImageDetections(*(rows[best] for rows in objects))
    masks = assemble_masks(proto[0], objects.coefficients, objects.boxes, height, width,
                           finder.crop)
    names = class_names or ["class {}".format(n + 1) for n in range(config.num_classes - 1)]
    picture = draw_instances(image, boxes_to_pixels(objects.boxes, height, width).numpy(),
                             masks.numpy(), [names[n] for n in objects.classes.tolist()],
                             scores[:len(best)].tolist(), names)
    written, data = cv2.imencode(os.path.splitext(target)[1] or ".png", picture)
    assert written
    write_whole(target, lambda stream: stream.write(data.tobytes()))
    print("{} objects drawn in {}".format(len(masks), target))
    return 0


def _run(argv: List[str]) -> int:
    args = parse_eval_flags(argv)
    name = args.eval_device if args.cuda else "cpu"
    processes = Processes.from_env(devices_per_host=device_count(name))
    device = select_device(name, processes.local_rank if args.device_id is None
                           else args.device_id)
    with recorded(processes.rank):
        processes.init(device)
        try:
            return evaluate(args, processes, device)
        finally:
            processes.shutdown()


def evaluate(args: argparse.Namespace, processes: Processes, device: torch.device) -> int:
    """Do what the command line asks for; returns the exit code."""
    model, config, class_names, loaded = load_model(args)
    finder = Finder(model.to(device), Detect.from_config(config, nms_kind(args)), device,
                    not args.no_crop, args.score_threshold)
    if args.image is not None:
        return draw(args, finder, config, class_names)
    return score(args, finder, config, class_names, loaded, processes)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run with these arguments; returns the exit code (2: something the user has to change)."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
