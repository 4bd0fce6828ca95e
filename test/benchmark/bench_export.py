"""Speed and size of exported networks against PyTorch, on the CPU.

    python test/benchmark/bench_export.py [--config=yolact_resnet50] [--max_size=550] [--rounds=5]

All ways are timed in turn on the same image and number of threads (OMP_NUM_THREADS). What counts is
the median over the rounds of the time that the processors spent, which hardly depends on what else
they do. Weights are random; only the host's detection depends on them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import cv2
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from backbone import BatchNorm2d, Bottleneck  # noqa: E402
from data.config import Config, get_config  # noqa: E402
from layers.detection import Detect  # noqa: E402
from utils.checkpoint import CheckpointName, save_checkpoint  # noqa: E402
from utils.cli import run_main  # noqa: E402
from utils.export.__main__ import main as export  # noqa: E402
from utils.export.check import example_images  # noqa: E402
from utils.export.graph import prepared  # noqa: E402
from utils.export.run import Segmenter, soft_masks  # noqa: E402
from utils.exported import ExportedModel  # noqa: E402
from yolact import Yolact, build_yolact  # noqa: E402

BOX = np.array([[0.2, 0.2, 0.7, 0.8]], np.float32)
FORMS = {"raw": [], "raw half": ["--half"], "detections": ["--outputs=detections"]}


def random_network(config: Config) -> Yolact:
    """Random weights that keep the values in range, as those of a trained network do."""
    torch.manual_seed(0)
    network = build_yolact(config)
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, Bottleneck):  # else 33 blocks multiply the rounding of --half by 250
            nn.init.constant_(module.bn3.weight, 0.2)
    with torch.no_grad():
        network(torch.from_numpy(example_images(config.max_size, 2)))
        for parameter in network.prediction_layers[0].parameters():
            parameter.mul_(0.01)
    return network.eval()


def milliseconds(ways: Dict[str, Callable[[], Any]], rounds: int) -> Dict[str, float]:
    """Median of each way's processor time, all of them in turn; the first round does not count."""
    spent: Dict[str, List[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            start = time.process_time()
            work()
            if number:
                spent[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(times) for name, times in spent.items()}


def export_all(config: Config, folder: str, weights: str) -> Dict[str, str]:
    """Export in every form; prints what it costs and returns the folders."""
    folders = {}
    for form, flags in FORMS.items():
        out = os.path.join(folder, form.replace(" ", "_"))
        start = time.perf_counter()
        if run_main(export, [weights, f"--out={out}", "--input=uint8", *flags]) != 0:
            sys.exit(1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        size = os.path.getsize(os.path.join(out, "model.onnx")) / 1e6
        print(f"-- {form}: {size:.1f} MB, exported and checked in "
              f"{time.perf_counter() - start:.0f} s, peak of the process {peak:.2f} GiB")
        folders[form] = out
    return folders


def main() -> None:
    """Export, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="yolact_resnet50")
    parser.add_argument("--max_size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = get_config(args.config)
    if args.max_size is not None:
        config = config.replace(max_size=args.max_size)
    network = random_network(config)
    planes = example_images(config.max_size, 1)
    images = torch.from_numpy(planes)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights = save_checkpoint(CheckpointName(config.name, 0, 1).path(folder),
                                  network.state_dict(),
                                  {"config": config.to_dict(), "class_names": None})
        folders = export_all(config, folder, weights)
        models = {form: ExportedModel(out, "cpu") for form, out in folders.items()}
        folded, detect = prepared(network), Detect.from_config(config)
        host = Segmenter(folders["raw"], "cpu")
        predictions = network(images)
        some = slice(0, None, predictions["conf"].shape[1] // 100)
        predictions["conf"][:, :, 0] += 10  # background, as a trained network sees it
        predictions["conf"][:, some, 1] += 20  # about 100 candidates
        outputs = {name: values[0] for name, values in models["raw"](planes).items()}
        outputs["conf"] = predictions["conf"].softmax(2)[0].numpy()
        ways: Dict[str, Callable[[], Any]] = {
            "PyTorch": lambda: network(images),
            "PyTorch, normalisation folded": lambda: folded(images),
            **{f"ONNX Runtime, {form}": (lambda model=model: model(planes))  # type: ignore[misc]
               for form, model in models.items()},
            "detection on the host, PyTorch": lambda: detect(predictions),
            "detection on the host, run.py": lambda: host.detections(outputs),
            "masks of 640 x 480, run.py": lambda: [
                cv2.resize(mask, (640, 480)) > 0.5 for mask in soft_masks(
                    outputs["proto"], *(values[:100] for values in (
                        outputs["mask"], np.tile(BOX, (100, 1)))))]}
        found = milliseconds(ways, args.rounds)
    print(f"{config.name}, {config.max_size} px, batch 1, {torch.get_num_threads()} threads")
    for name, value in found.items():
        print(f"{name:36s} {value:8.1f} ms  {found['PyTorch'] / value:6.2f} x PyTorch")


if __name__ == "__main__":
    main()
