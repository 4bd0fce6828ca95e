"""Score YOLACT: `python eval.py --trained_model=weights/x.pth --val_data=/data/coco`.

Lines printed here avoid two words that the launchers look for; see `utils.inference.results`.
"""

from __future__ import annotations

import os

# Before torch: utils.device imports the NPU's plugin where one is wanted, and says what is wrong
# with it. Left to PyTorch, a plugin that finds no CANN ends `import torch`, on the CPU too.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import sys
from typing import List, Optional, Sequence

import torch

from data.classes import match_categories
from data.coco import CocoDataset
from data.config import Config
from data.datasets import open_dataset
from layers.detection import Detect
from layers.masks import boxes_to_pixels, encode_masks
from utils.cli import run_main
from utils.device import cards_of_host, describe, pin_memory_supported, select_device, synchronize
from utils.distributed.failures import recorded
from utils.distributed.processes import Processes
from utils.distributed.sharing import gather_state, shard
from utils.errors import UserError
from utils.files import refuse_unwritable
from utils.inference import pipeline
from utils.inference.eval_flags import changed_settings, nms_kind, parse_eval_flags
from utils.inference.evaluation_record import ScoredEvaluation, keep_evaluation
from utils.inference.evaluator import CocoEvaluator
from utils.inference.pipeline import StageTimes
from utils.inference.predict import batch_size_of, input_of, predict
from utils.inference.predictor import Finder, Launched, LoadedModel, Predictor, fetch, load_model
from utils.inference.results import CocoResults
from utils.memory import Demand, MemoryNeed, explained, parameter_bytes
from utils.progress import ImageProgress
from yolact import Yolact


def add_detections(finder: Finder, batch: pipeline.ImageBatch, launched: Launched,
                   evaluator: CocoEvaluator, times: StageTimes) -> None:
    """Fetch a batch's detections and hand them to the evaluator."""
    with times.stage("transfer"):
        found, proto, rescored = fetch(launched)
    with times.stage("run lengths"):
        for n, (image_id, (height, width)) in enumerate(zip(batch.image_ids, batch.sizes)):
            objects = found.of_image(n, finder.score_threshold)
            rles = encode_masks(proto[n], objects.coefficients, objects.boxes, height, width,
                                finder.crop)
            evaluator.add(image_id, boxes_to_pixels(objects.boxes, height, width).numpy(),
                          rles, objects.classes.tolist(), objects.scores.tolist(),
                          rescored[n, :len(rles)].tolist())


@torch.no_grad()
def collect(finder: Finder, dataset: CocoDataset, indices: Sequence[int], evaluator: CocoEvaluator,
            batch_size: int, num_workers: int, times: Optional[StageTimes] = None,
            show_progress: bool = False) -> None:
    """Add the detections of images `indices` to the evaluator. The model keeps its mode."""
    spent = times or StageTimes()
    images = pipeline.EvaluationImages(dataset, indices, finder.model.input_size)
    loader = pipeline.EvaluationLoader(images, batch_size, num_workers,
                                        pin_memory_supported(finder.device))
    progress = ImageProgress(len(indices), sys.stderr, enabled=show_progress)
    was_training = finder.model.training
    finder.model.eval()
    try:
        pipeline.run_pipelined(
            loader, lambda planes: finder.launch(planes, spent),
            lambda batch, launched: add_detections(finder, batch, launched, evaluator, spent),
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
                     processes: Processes = Processes(),  # noqa: B008
                     show_progress: bool = False) -> Optional[CocoResults]:
    """Score what `detect_dataset` finds; only the main process gets results, the others None."""
    evaluator = detect_dataset(model, config, dataset, device, max_images, batch_size,
                               num_workers, class_names, processes, show_progress)
    return evaluator.evaluate() if processes.is_main else None


def detect_dataset(model: Yolact, config: Config, dataset: CocoDataset, device: torch.device,
                   max_images: int = -1, batch_size: int = 4, num_workers: int = 2,
                   class_names: Optional[Sequence[str]] = None,
                   processes: Processes = Processes(),  # noqa: B008
                   show_progress: bool = False) -> CocoEvaluator:
    """Find objects in the first `max_images` images of `dataset` (-1: all), with Fast NMS.

    `class_names` are the network's, where they are known. The model keeps its mode. Several
    processes share the images; only the main one gets the detections of all.
    """
    ids, _ = match_categories(class_names, config.num_classes - 1, dataset.categories,
                              "the network", dataset.annotation_file)
    evaluator = CocoEvaluator.for_dataset(dataset, ids)
    collect_shared(Finder(model, Detect.from_config(config), device), dataset,
                   pipeline.choose_images(len(dataset), max_images), evaluator, batch_size,
                   num_workers, processes, show_progress=show_progress)
    return evaluator


def score(args: argparse.Namespace, finder: Finder, loaded: LoadedModel,
          processes: Processes) -> int:
    """Evaluate on a dataset; the main process prints the scores and writes what was asked for."""
    config = loaded.config
    dataset = open_dataset(args.dataset or config.dataset, args.val_data, args.valid_images,
                           args.valid_info, "val", require_annotations=False)
    truth = os.path.basename(dataset.annotation_file)
    weights = os.path.basename(loaded.report.source.path)
    ids, notes = match_categories(loaded.class_names, config.num_classes - 1, dataset.categories,
                                  weights, truth, args.map_classes)
    evaluator = CocoEvaluator.for_dataset(dataset, ids)
    if args.detect and not args.output_coco_json:
        raise UserError("--detect leaves out the scores: add --output_coco_json to write something")
    if not evaluator.has_ground_truth and not args.output_coco_json:
        raise UserError(f"{dataset.annotation_file} has no annotations to score against; "
                        "--output_coco_json writes the result files")
    chosen = pipeline.choose_images(len(dataset), args.max_images, args.shuffle, args.seed)
    dataset.check_images_exist(chosen)
    for path in _outputs(args):
        refuse_unwritable(os.path.dirname(os.path.abspath(path)))
    if processes.is_main:
        print("\n".join([describe(finder.device), f"Weights : {loaded.report}"] + notes + [
            f"{weights}: {len(chosen)} images of {truth}"]), flush=True)

    times = StageTimes((lambda: synchronize(finder.device)) if args.benchmark else None)
    collect_shared(finder, dataset, chosen, evaluator, args.batch_size, args.num_workers,
                   processes, times, processes.is_main and not args.no_bar)
    print(times.sentence(stages=args.benchmark), flush=True)
    if not processes.is_main:
        return 0
    if args.output_coco_json:
        evaluator.write_json(args.bbox_det_file, args.mask_det_file)
        print(f"Results of {len(evaluator)} images written in COCO's format", flush=True)
    if args.detect:
        return 0
    if not evaluator.has_ground_truth:
        print(f"{truth} has no annotations: nothing to score")
        return 0
    results = evaluator.evaluate()
    if args.per_class_file:
        results.write_per_class(args.per_class_file)
    print("\n".join(results.notes + [results.statistics_table(), "", results.table()]), flush=True)
    lines = keep_evaluation(args.run_folder, ScoredEvaluation(
        evaluator, results, dataset, loaded.report.source.path, loaded.origin,
        changed_settings(args)), config.name)
    if lines:
        print("\n".join(lines), flush=True)
    return 0


def _outputs(args: argparse.Namespace) -> List[str]:
    """Files that an evaluation writes when it is done."""
    written = [args.bbox_det_file, args.mask_det_file] if args.output_coco_json else []
    return written + ([args.per_class_file] if args.per_class_file and not args.detect else [])


def predict_on(args: argparse.Namespace, finder: Finder, loaded: LoadedModel,
               processes: Processes) -> int:
    """Draw what is found in pictures or a video; the main process alone does it."""
    if not processes.is_main:
        return 0
    start = "\r\033[K" if sys.stderr.isatty() else ""  # what fails goes over the progress line
    return predict(Predictor.from_loaded(finder, loaded, batch_size_of(args)), args,
                   lambda line: print(line, flush=True),
                   lambda line: print(start + line, file=sys.stderr, flush=True), sys.stderr)


def _run(argv: List[str]) -> int:
    args = parse_eval_flags(argv)
    name = args.eval_device if args.cuda else "cpu"
    processes = Processes.from_env(devices_per_host=cards_of_host(name))
    device = select_device(name, processes.local_rank if args.device_id is None
                           else args.device_id)
    with recorded(processes.rank), explained(device):
        processes.init(device)
        try:
            return evaluate(args, processes, device)
        finally:
            processes.shutdown()


def evaluate(args: argparse.Namespace, processes: Processes, device: torch.device) -> int:
    """Do what the command line asks for; returns the exit code."""
    source = input_of(args)
    loaded = load_model(args.trained_model, args.save_folder, args.config, args.max_num_detections)
    finder = Finder(loaded.model.to(device), Detect.from_config(loaded.config, nms_kind(args)),
                    device, not args.no_crop, args.score_threshold)
    weights = MemoryNeed(parameter_bytes(loaded.model), 0)
    batch_size = args.batch_size if source is None else batch_size_of(args)
    with explained(device, Demand(batch_size, lambda: weights, parts=0)):
        if source is not None:
            return predict_on(args, finder, loaded, processes)
        return score(args, finder, loaded, processes)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run with these arguments; returns the exit code (2: something the user has to change)."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
