"""Score YOLACT: `python eval.py --trained_model=weights/x.pth --val_data=/data/coco`.

Lines printed here avoid two words that the launchers look for; see `utils.inference.evaluator`.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until run_main takes over

from utils.cli import before_torch, print_lines, run_main
from utils.inference.eval_flags import changed_settings, eval_parser, nms_kind, parse_eval_flags

before_torch(eval_parser if __name__ == "__main__" else None)

import argparse
import os
import sys
from typing import Sequence

import torch

from data.classes import match_categories
from data.datasets import open_dataset, refuse_empty
from utils.device import NpuModes, cards_of_host, describe, select_device, synchronize
from utils.device_graph import prepare_graphs
from utils.distributed.failures import record_failure
from utils.distributed.processes import Processes
from utils.errors import UserError, printable
from utils.files import refuse_unwritable_file
from utils.inference.detector import Detector, LoadedModel, StageTimes, load_model
from utils.inference.evaluation import Evaluation, choose_images
from utils.inference.evaluation_record import AUTO, NONE, ScoredEvaluation, keep_evaluation
from utils.inference.evaluator import CocoEvaluator
from utils.inference.predict import PredictionOptions, PredictionRun
from utils.inference.predictor import Predictor
from utils.memory import explain_out_of_memory, keep_freed_memory
from utils.run_folder import CONFIG, open_run_folder


def result_files(evaluation: Evaluation, evaluator: CocoEvaluator, weights: str,
                 args: argparse.Namespace) -> list[str]:
    """Files in COCO's result format that are asked for; refuses what could not end well."""
    files = [args.bbox_det_file, args.mask_det_file] if args.output_coco_json else []
    if args.detect and not files:
        raise UserError("--detect leaves out the scores: add --output_coco_json to write something")
    if not evaluator.has_ground_truth and not files:
        raise UserError(f"{evaluation.dataset.annotation_file} has no annotations to score "
                        "against; --output_coco_json writes the result files")
    if not files:
        refuse_empty(evaluation.dataset, evaluation.indices)
    evaluation.dataset.check_images_exist(evaluation.indices)
    outputs = files + ([args.per_class_file] if args.per_class_file and not args.detect else [])
    taken = [os.path.realpath(path) for path in (evaluation.dataset.annotation_file, weights)]
    for path in outputs:
        if os.path.realpath(path) in taken:
            raise UserError(f"'{path}' would be written over what is read here, or over another "
                            "result; give it a name of its own")
        taken.append(os.path.realpath(path))
        refuse_unwritable_file(path)
    if args.run_folder not in (NONE, AUTO):
        if os.path.isdir(args.run_folder) and os.listdir(args.run_folder) and (
                open_run_folder(args.run_folder) is None):
            raise UserError(f"--run_folder: '{args.run_folder}' holds other files and is no run "
                            "folder; name one, or a folder that is made")
        refuse_unwritable_file(os.path.join(args.run_folder, CONFIG))
    return files


def score(evaluation: Evaluation, detector: Detector, loaded: LoadedModel,
          args: argparse.Namespace, notes: Sequence[str]) -> int:
    """Evaluate on a dataset; the main process prints the scores and writes what was asked for."""
    dataset, is_main = evaluation.dataset, evaluation.processes.is_main
    truth = os.path.basename(dataset.annotation_file)
    evaluator = evaluation.evaluator()
    weights = loaded.source.path
    files = result_files(evaluation, evaluator, weights, args)
    if is_main:
        print_lines([describe(detector.device), *f"Weights : {loaded.report}".split("\n"), *notes,
                     f"{os.path.basename(weights)}: {len(evaluation.indices)} images of {truth}"])
    times = StageTimes((lambda: synchronize(detector.device)) if args.benchmark else None)
    evaluation.run(detector, evaluator, times)
    print(times.sentence(stages=args.benchmark), flush=True)
    if not is_main:
        return 0
    failed: UserError | None = None
    if files:
        try:
            evaluator.write_json(args.bbox_det_file, args.mask_det_file)
            print(f"Results of {len(evaluator)} images written in COCO's format", flush=True)
        except UserError as error:  # a full disk: the scores are said before
            failed = error
    if not args.detect and evaluator.has_ground_truth:
        results = evaluator.evaluate()
        print_lines([*results.notes, *results.statistics_table().split("\n"), "",
                     *results.table().split("\n")])
        if args.per_class_file:
            results.write_per_class(args.per_class_file)
        scored = ScoredEvaluation(evaluator, results, dataset, weights, loaded.source.origin,
                                  changed_settings(args))
        print_lines(keep_evaluation(args.run_folder, scored, loaded.config.name))
    elif not args.detect:
        print(f"{truth} has no annotations: nothing to score")
    if failed is not None:
        raise failed
    return 0


def evaluation_of(args: argparse.Namespace, loaded: LoadedModel,
                  processes: Processes) -> tuple[Evaluation, list[str]]:
    """What is to be scored, and sentences about the classes."""
    config = loaded.config
    dataset = open_dataset(args.dataset or config.dataset, args.val_data, args.valid_images,
                           args.valid_info, "val", allow_empty=True)
    category_ids, notes = match_categories(
        loaded.source.class_names, config.num_classes - 1, dataset.categories,
        os.path.basename(loaded.source.path), os.path.basename(dataset.annotation_file),
        args.map_classes)
    chosen = choose_images(len(dataset), args.max_images, args.shuffle, args.seed)
    notes = [dataset.origin] * bool(dataset.origin) + notes
    if dataset.report.dropped:  # the reasons may have words that launchers look for
        notes.append(f"{dataset.report.dropped} of {dataset.report.annotations} annotations cannot "
                     "be used and are not scored; python -m data.check says why")
    return Evaluation(dataset, category_ids, chosen, args.batch_size, args.num_workers, processes,
                      show_progress=not args.no_bar), notes


def predict(predictor: Predictor, args: argparse.Namespace, loaded: LoadedModel) -> int:
    """Draw what is found in images or a video; returns the exit code."""
    start = "\r\033[K" if sys.stderr.isatty() else ""  # what fails goes over the progress line
    print(f"Weights : {loaded.report}", flush=True)
    options = PredictionOptions(
        top_k=args.top_k, score_threshold=args.score_threshold, masks=args.display_masks,
        boxes=args.display_bboxes, text=args.display_text, scores=args.display_scores,
        speed=args.display_fps, json=args.output_json, polygons=args.json_masks == "polygon",
        crops=args.crops, benchmark=args.benchmark, show_progress=not args.no_bar)
    run = PredictionRun(predictor, options, lambda line: print_lines([line]),
                        lambda line: print(start + printable(line), file=sys.stderr, flush=True),
                        sys.stderr)
    if args.image is not None:
        return run.image(args.image)
    return run.images(args.images) if args.images is not None else run.video(args.video)


def evaluate(args: argparse.Namespace, processes: Processes, device: torch.device) -> int:
    """Do what the command line asks for; returns the exit code."""
    if args.device_graph:
        prepare_graphs(device)
    loaded = load_model(args.trained_model, args.save_folder, args.config, args.max_num_detections)
    batch_size = args.batch_size
    if args.image is not None or args.video is not None:
        batch_size = 1 if args.image is not None else args.video_multiframe
    nms, crop = nms_kind(args), not args.no_crop
    with explain_out_of_memory(device, batch_size):
        if any(source is not None for source in (args.image, args.images, args.video)):
            # The main process alone does it.
            return 0 if not processes.is_main else predict(Predictor(
                loaded, device, score_threshold=args.score_threshold, batch_size=batch_size,
                nms=nms, crop=crop, precision=args.precision), args, loaded)
        detector = Detector(loaded.on(device, args.precision), loaded.build_detect(nms), device,
                            crop, args.score_threshold)
        if args.device_graph:
            detector.record_on_device()
        evaluation, notes = evaluation_of(args, loaded, processes)
        return score(evaluation, detector, loaded, args, notes)


def _run(argv: list[str]) -> int:
    args = parse_eval_flags(argv)
    name = args.eval_device if args.cuda else "cpu"
    processes = Processes.from_env(devices_per_host=cards_of_host(name))
    device = select_device(name, processes.local_rank if args.device_id is None
                           else args.device_id,
                           NpuModes(args.jit_compile, args.internal_format))
    keep_freed_memory(device)
    with record_failure(processes.rank), explain_out_of_memory(device):
        processes.init(device)
        try:
            return evaluate(args, processes, device)
        finally:
            processes.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments; returns the exit code (2: something the user has to change)."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
