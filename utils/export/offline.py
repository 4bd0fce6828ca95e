"""ModelZoo's offline flow: images as BIN files for ais_bench, and scores of the files it writes.

    python -m utils.export.offline preprocess MODEL --val_data=/data/coco --out=bin
    python3 -m ais_bench --model MODEL --input bin --output results --outfmt BIN --batchsize 1
    python -m utils.export.offline score MODEL --val_data=/data/coco --results=results

MODEL is a model of an exported folder, an .om or an .onnx. `bash test/infer_om.sh` does all three.
"""

from __future__ import annotations

import glob
import os
import sys
from typing import Sequence

import numpy as np
import torch

from data.classes import match_categories
from data.coco import CocoDataset
from data.datasets import open_dataset
from utils.cli import ArgumentParser, Bounded, run_main
from utils.errors import UserError
from utils.exported import prepare
from utils.files import refuse_unwritable
from utils.inference.detector import CPU, Detector, LoadedModel, load_model, to_network_input
from utils.inference.evaluation import Evaluation, choose_images
from utils.inference.exported_network import ExportedNetwork


def preprocess(network: ExportedNetwork, dataset: CocoDataset, indices: Sequence[int],
               folder: str) -> int:
    """Write the model's input for each image; returns the bytes of one."""
    refuse_unwritable(folder)
    size = 0
    for index in indices:
        sample = dataset[index]
        planes = to_network_input(sample.image, network.input_size)[None]
        values = prepare(planes, network.exported("auto").models[0]["input"])
        values.tofile(os.path.join(folder, f"{sample.image_id:012d}.bin"))
        size = values.nbytes
    return size


def find_results(folder: str) -> dict[str, str]:
    """Path, without `_0.bin`, of each image's results by its stem; in any folder below."""
    found = glob.glob(os.path.join(glob.escape(folder), "**", "*_0.bin"), recursive=True)
    paths = [path[:-len("_0.bin")] for path in found]
    by_stem = {os.path.basename(path): path for path in paths}
    if len(by_stem) < len(paths):
        raise UserError(f"'{folder}' holds several results of an image, such as "
                        f"{paths[0]}_0.bin; give the folder of one run of ais_bench")
    return by_stem


def read_results(network: ExportedNetwork, path: str) -> dict[str, np.ndarray]:
    """The outputs of one image, `path_0.bin` and so on in the model's order."""
    outputs = {}
    for number, described in enumerate(network.facts["outputs"]):
        file = f"{path}_{number}.bin"
        shape = [1, *described["shape"][1:]]
        kind = np.int32 if described["name"] in ("classes", "count") else np.float32
        try:
            values = np.fromfile(file, kind)
        except OSError as error:
            raise UserError(f"cannot read '{file}': {error.strerror}") from None
        if values.size != np.prod(shape):
            raise UserError(f"'{file}' holds {values.size} numbers, output {described['name']} has "
                            f"{np.prod(shape)}; is it of another model?")
        outputs[described["name"]] = values.reshape(shape)
    return outputs


def score(loaded: LoadedModel, network: ExportedNetwork, dataset: CocoDataset,
          indices: Sequence[int], results: str) -> list[str]:
    """Score what ais_bench wrote for these images; returns the lines of the table."""
    name = os.path.basename(network.path)
    category_ids, notes = match_categories(
        loaded.source.class_names, loaded.config.num_classes - 1, dataset.categories, name,
        os.path.basename(dataset.annotation_file))
    detector = Detector(network, loaded.build_detect("fast"), CPU)
    evaluator = Evaluation(dataset, category_ids, indices).evaluator()
    found = find_results(results)
    for index in indices:
        image_id = int(dataset.image_ids[index])
        stem = f"{image_id:012d}"
        if stem not in found:
            raise UserError(f"'{results}' has no {stem}_0.bin, the result of image {image_id}; run "
                            "ais_bench on all that preprocess wrote")
        outputs = read_results(network, found[stem])
        _, width, height = dataset.image_info(index)
        pending = detector.detections(network.predictions(outputs, CPU))
        objects = detector.objects(pending, 0, height, width)
        evaluator.add(image_id, objects.boxes, objects.rles, objects.classes.tolist(),
                      objects.scores.tolist(), objects.mask_scores.tolist())
    side = network.input_size
    return [f"{loaded.config.name}: {loaded.config.num_classes - 1} classes, "
            f"{network.facts['parameters']} parameters, input {side} x {side}", *notes,
            f"{name}: {len(indices)} images of "
            f"{os.path.basename(dataset.annotation_file)}", "", evaluator.evaluate().table()]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m utils.export.offline", description="Images for "
                            "ais_bench, and scores of what it writes.")
    parser.add_argument("step", choices=("preprocess", "score"))
    parser.add_argument("model", metavar="MODEL", help="model of an exported folder")
    parser.add_argument("--val_data", required=True, metavar="FOLDER|YAML",
                        help="dataset, as for eval.py")
    parser.add_argument("--max_images", type=Bounded(int, -1), default=-1, metavar="N",
                        help="at most this many; 0 or -1 is all")
    parser.add_argument("--out", default="bin", metavar="FOLDER",
                        help="preprocess: folder for the BIN files")
    parser.add_argument("--results", default="results", metavar="FOLDER",
                        help="score: ais_bench's --output")
    args = parser.parse_args(argv)
    loaded = load_model(args.model)
    network = loaded.model
    if not isinstance(network, ExportedNetwork):
        raise UserError(f"'{args.model}' is no exported model; python -m utils.export makes one")
    dataset = open_dataset(loaded.config.dataset, args.val_data, None, None, "val",
                           allow_empty=args.step == "preprocess")
    indices = choose_images(len(dataset), args.max_images)
    if args.step == "preprocess":
        size = preprocess(network, dataset, indices, args.out)
        print(f"{len(indices)} images written in {args.out}, {size} bytes each")
    else:
        with torch.no_grad():
            print("\n".join(score(loaded, network, dataset, indices, args.results)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
