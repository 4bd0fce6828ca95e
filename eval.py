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
from data.datasets import open_dataset
from layers.detection import Detect
from utils.cli import run_main
from utils.device import cards_of_host, describe, select_device, synchronize
from utils.distributed.failures import record_failure
from utils.distributed.processes import Processes
from utils.errors import UserError
from utils.files import refuse_unwritable
from utils.inference.detector import Detector
from utils.inference.eval_flags import changed_settings, nms_kind, parse_eval_flags
from utils.inference.evaluation import Evaluation, choose_images
from utils.inference.evaluation_record import (
    AUTO,
    ScoredEvaluation,
    folder_for,
    record_evaluation,
)
from utils.inference.pipeline import StageTimes
from utils.inference.predict import batch_size_of, input_of, predict
from utils.inference.predictor import LoadedModel, Predictor, load_model
from utils.memory import explain_out_of_memory


def score(args: argparse.Namespace, detector: Detector, loaded: LoadedModel,
          processes: Processes) -> int:
    """Evaluate on a dataset; the main process prints the scores and writes what was asked for."""
    config = loaded.config
    dataset = open_dataset(args.dataset or config.dataset, args.val_data, args.valid_images,
                           args.valid_info, "val", require_annotations=False)
    truth = os.path.basename(dataset.annotation_file)
    weights = os.path.basename(loaded.report.source.path)
    ids, notes = match_categories(loaded.class_names, config.num_classes - 1, dataset.categories,
                                  weights, truth, args.map_classes)
    evaluation = Evaluation(
        dataset, ids, choose_images(len(dataset), args.max_images, args.shuffle, args.seed),
        args.batch_size, args.num_workers, processes, not args.no_bar)
    evaluator = evaluation.evaluator()
    if args.detect and not args.output_coco_json:
        raise UserError("--detect leaves out the scores: add --output_coco_json to write something")
    if not evaluator.has_ground_truth and not args.output_coco_json:
        raise UserError(f"{dataset.annotation_file} has no annotations to score against; "
                        "--output_coco_json writes the result files")
    dataset.check_images_exist(evaluation.indices)
    for path in _outputs(args):
        refuse_unwritable(os.path.dirname(os.path.abspath(path)))
    if processes.is_main:
        print("\n".join([describe(detector.device), f"Weights : {loaded.report}"] + notes + [
            f"{weights}: {len(evaluation.indices)} images of {truth}"]), flush=True)

    times = StageTimes((lambda: synchronize(detector.device)) if args.benchmark else None)
    evaluation.run(detector, times, evaluator)
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
    keep_in_run_folder(args.run_folder, loaded, ScoredEvaluation(
        evaluator, results, dataset, loaded.report.source.path,
        None if loaded.origin is None else loaded.origin.iteration, changed_settings(args)))
    return 0


def _outputs(args: argparse.Namespace) -> List[str]:
    """Files that an evaluation writes when it is done."""
    written = [args.bbox_det_file, args.mask_det_file] if args.output_coco_json else []
    return written + ([args.per_class_file] if args.per_class_file and not args.detect else [])


def keep_in_run_folder(choice: str, loaded: LoadedModel, scored: ScoredEvaluation) -> None:
    """Add an evaluation to the run folder that `choice` (--run_folder) stands for, if any.

    Raises:
        UserError: a folder that was asked for by name cannot be written.
    """
    folder = folder_for(choice, scored.weights, loaded.origin, loaded.config.name)
    if folder is None:
        return
    try:
        print("\n".join(record_evaluation(folder, scored, loaded.origin, choice != AUTO)))
    except UserError as error:
        if choice != AUTO:
            raise
        print(f"Run folder : {folder.path} is left as it was ({error})", flush=True)


def predict_on(args: argparse.Namespace, detector: Detector, loaded: LoadedModel,
               processes: Processes) -> int:
    """Draw what is found in pictures or a video; the main process alone does it."""
    if not processes.is_main:
        return 0
    start = "\r\033[K" if sys.stderr.isatty() else ""  # what fails goes over the progress line
    return predict(Predictor.from_loaded(detector, loaded, batch_size_of(args)), args,
                   lambda line: print(line, flush=True),
                   lambda line: print(start + line, file=sys.stderr, flush=True), sys.stderr)


def _run(argv: List[str]) -> int:
    args = parse_eval_flags(argv)
    name = args.eval_device if args.cuda else "cpu"
    processes = Processes.from_env(devices_per_host=cards_of_host(name))
    device = select_device(name, processes.local_rank if args.device_id is None
                           else args.device_id)
    with record_failure(processes.rank), explain_out_of_memory(device):
        processes.init(device)
        try:
            return evaluate(args, processes, device)
        finally:
            processes.shutdown()


def evaluate(args: argparse.Namespace, processes: Processes, device: torch.device) -> int:
    """Do what the command line asks for; returns the exit code."""
    source = input_of(args)
    loaded = load_model(args.trained_model, args.save_folder, args.config, args.max_num_detections)
    detector = Detector(loaded.model.to(device), Detect.from_config(loaded.config, nms_kind(args)),
                    device, not args.no_crop, args.score_threshold)
    batch_size = args.batch_size if source is None else batch_size_of(args)
    with explain_out_of_memory(device, batch_size):
        if source is not None:
            return predict_on(args, detector, loaded, processes)
        return score(args, detector, loaded, processes)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run with these arguments; returns the exit code (2: something the user has to change)."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
