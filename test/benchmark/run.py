"""All measurements in one table, with the machine and the versions: docs/performance.md holds one.

    python test/benchmark/run.py /data/coco [--config=yolact_resnet50] [--rounds=10] [--images=20]
                                 [--against=FOLDER]

Of each pair both are run in turn in this process; the best CPU time of the rounds counts, so that
other load on the machine does not, and the ratio is what to compare between machines. Behind the
table stand the loader (`bench_loader.py`) and what follows the network (`bench_eval.py`).
`--against` is a copy of the original (github.com/dbolya/yolact), for rows that compare with it.
"""

from __future__ import annotations

import contextlib
import copy
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import cv2
import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import bench_eval  # noqa: E402
import bench_loader  # noqa: E402

from data.batch import Batch, collate  # noqa: E402
from data.coco import CocoDataset  # noqa: E402
from data.config import Config, get_config  # noqa: E402
from data.datasets import dataset_paths  # noqa: E402
from data.loader import TrainDataset  # noqa: E402
from layers.anchors import make_priors  # noqa: E402
from train import train_step  # noqa: E402
from utils.amp import INFERENCE_TYPES, build_precision, inference_dtype  # noqa: E402
from utils.cli import ArgumentParser, Bounded, run_main  # noqa: E402
from utils.device import describe  # noqa: E402
from utils.distributed.processes import Processes  # noqa: E402
from utils.distributed.sharing import Sharing  # noqa: E402
from utils.engine.learner import assemble_learner  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.inference.detector import Detector, LoadedModel, StageTimes  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402
from utils.optimizer import build_optimizer  # noqa: E402
from utils.weights.files import WeightsFile  # noqa: E402
from utils.weights.loading import LoadReport  # noqa: E402
from yolact import Yolact, build_yolact  # noqa: E402

CPU = torch.device("cpu")


class Cost:
    """Best CPU milliseconds and fewest page faults of a piece of work."""

    milliseconds, faults = float("inf"), sys.maxsize

    def take(self, work: Callable[[], Any]) -> None:
        """Run it once more; work of another process returns its milliseconds."""
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        spent = work()
        if not isinstance(spent, float):
            spent = 1e3 * (time.process_time() - start)
        self.milliseconds = min(self.milliseconds, spent)
        self.faults = min(self.faults,
                          resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def costs(ways: Dict[str, Callable[[], Any]], rounds: int) -> Dict[str, Cost]:
    """All ways in turn; the first round, which builds what is kept, does not count."""
    found = {name: Cost() for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            (found[name] if number else Cost()).take(work)
    return found


def row(what: str, before: Cost, ours: Cost) -> None:
    """Print a line of the table."""
    print(f"| {what} | {before.milliseconds:.1f} | {ours.milliseconds:.1f} | "
          f"{before.milliseconds / ours.milliseconds:.2f} | {ours.faults} |", flush=True)


def with_gradients(config: Config) -> nn.Module:
    """A network with a gradient for every parameter."""
    network = build_yolact(config)
    for parameter in network.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return network


def bench_optimizers(config: Config, rounds: int) -> None:
    """A step of 1e-3; PyTorch's with the same test for gradients that are not finite."""
    for name in ("sgd", "adamw"):
        mine, other = (with_gradients(config) for _ in range(2))
        ours, values = build_optimizer(config.replace(optimizer=name), mine), other.parameters()
        theirs: torch.optim.Optimizer = (
            torch.optim.SGD(values, 1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
            if name == "sgd" else torch.optim.AdamW(values, 1e-3, fused=True))
        grads = [p.grad for p in other.parameters() if p.grad is not None]

        def guarded(theirs: Any = theirs, grads: Any = grads) -> None:
            if torch.stack(torch._foreach_norm(grads)).norm() < 1e18:
                theirs.step()

        found = costs({"fused": theirs.step, "guarded": guarded,
                       "ours": lambda ours=ours: ours.step(1e-3)}, rounds)  # type: ignore[misc]
        row(f"{name}, PyTorch's fused", found["fused"], found["ours"])
        row(f"{name}, the same with a test for NaN", found["guarded"], found["ours"])


def random_model(config: Config) -> LoadedModel:
    """A network that nobody has trained, as if it came from a file."""
    return LoadedModel(build_yolact(config).eval(), config,
                       LoadReport(WeightsFile("none", "random", {}), (), (), ()))


def fast_types() -> List[str]:
    """The values of --precision that this processor has instructions for."""
    known = (torch.float32, inference_dtype("auto", CPU))
    return [kind for kind, dtype in INFERENCE_TYPES.items() if dtype in known]


def bench_network(config: Config, rounds: int) -> None:
    """One image through the network as it was trained, and as it finds objects."""
    loaded = random_model(config)
    network = loaded.model
    images = torch.randint(0, 256, (1, 3, config.max_size, config.max_size), dtype=torch.uint8)
    ready = {kind: loaded.on(CPU, kind) for kind in fast_types()}
    with torch.no_grad():
        found = costs({"plain": lambda: network(images),
                       **{kind: (lambda model=model: model(images))  # type: ignore[misc]
                          for kind, model in ready.items()}}, rounds)
    for kind in ready:
        row(f"network, --precision={kind}, as trained", found["plain"], found[kind])


def bench_training(config: Config, rounds: int) -> None:
    """Forward and backward pass of four images: plain, arranged for the CPU, and in bfloat16.

    The loss is a mean of squares, so that the network alone is measured.
    """
    plain = build_yolact(config).train()
    arranged = copy.deepcopy(plain)
    arranged.use_channels_last()
    images = torch.randint(0, 256, (4, 3, config.max_size, config.max_size), dtype=torch.uint8)

    def step(network: Yolact, level: str) -> None:
        precision = build_precision(level, None, "auto" if level == "O0" else "bfloat16", CPU)
        network.zero_grad()
        with precision.forward():
            predictions = network(images)
        precision.backward(sum((values.square().mean() for values in precision.widen(
            predictions).values()), torch.zeros(())))

    found = costs({"plain": lambda: step(plain, "O0"), "ours": lambda: step(arranged, "O0"),
                   "half": lambda: step(arranged, "O1")}, rounds)
    row("training, four images, against the network as built", found["plain"], found["ours"])
    row("training, --opt_level=O1 --amp_dtype=bfloat16, against the same", found["plain"],
        found["half"])


@contextlib.contextmanager
def original(folder: str, config: Config, place: Sequence[str], augmented: Sequence[Any]
             ) -> Iterator[Callable[[str], Callable[[], float]]]:
    """The original on the same samples, see `original.py`: from a work's name to the work."""
    arrays: Dict[str, Any] = {"images": np.stack([sample.image for sample in augmented])}
    for n, sample in enumerate(augmented):
        labels = (sample.labels - 1)[:, None].astype(np.float32)  # without background
        arrays[f"targets{n}"] = np.hstack((sample.boxes, labels))
        arrays[f"masks{n}"] = sample.masks
    with tempfile.TemporaryDirectory() as scratch:
        samples = str(Path(scratch) / "samples.npz")
        np.savez(samples, **arrays)
        command = [sys.executable, str(Path(__file__).with_name("original.py")), folder,
                   config.name, *place, samples]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              bufsize=1) as process:
            assert process.stdin is not None and process.stdout is not None
            lines, answers = process.stdin, process.stdout

            def ask(work: str) -> float:
                lines.write(work + "\n")
                return float(answers.readline())

            yield lambda work: lambda: ask(work)


def bench_original(config: Config, data: str, folder: str, rounds: int) -> None:
    """Whole training steps of four images, finding boxes in one, and loading twenty."""
    place = dataset_paths(config.dataset, data, "train")
    dataset = CocoDataset(*place)
    samples = TrainDataset.from_config(dataset, config, lambda recipe: make_priors(recipe).numpy())
    augment, make_targets = samples.paths[config.max_size]
    rng = np.random.default_rng(0)
    augmented = [augment(dataset[n], rng) for n in range(4)]
    batch = collate([make_targets(sample, rng) for sample in augmented])
    loaded, kinds = random_model(config), fast_types()

    def find(detector: Detector) -> None:
        detector.launch(batch.images[:1], StageTimes())

    def load() -> None:
        for n in range(min(20, len(dataset))):
            collate([samples[0, n, config.max_size]])

    detectors = {kind: Detector(loaded.on(CPU, kind), loaded.build_detect("fast"), CPU)
                 for kind in kinds}
    steps = {"float32": step_of(config, batch, "O0")}
    if "bfloat16" in kinds:
        steps["bfloat16"] = step_of(config, batch, "O1")
    with original(folder, config, [str(part) for part in place], augmented) as theirs:
        found = costs({"theirs": theirs("train"), **steps}, min(rounds, 3))
        for kind in steps:
            row(f"training step, four images, {kind}, the original's", found["theirs"], found[kind])
        found = costs({"theirs": theirs("find"), **{
            kind: (lambda detector=detector: find(detector))
            for kind, detector in detectors.items()}}, rounds)
        for kind in kinds:
            row(f"boxes of one image, {kind}, the original's", found["theirs"], found[kind])
        found = costs({"theirs": theirs("load"), "ours": load}, min(rounds, 3))
        row("twenty training samples, the original's", found["theirs"], found["ours"])


def step_of(config: Config, batch: Batch, level: str) -> Callable[[], None]:
    """A whole training step on `batch`, without a value for `Cost.take`."""
    precision = build_precision(level, None, "auto" if level == "O0" else "bfloat16", CPU)
    learner = assemble_learner(config, build_yolact(config), precision, Processes(), CPU)
    sharing = Sharing(Processes(), CPU)

    def step() -> None:
        train_step(learner.network, learner.criterion, learner.optimizer, [batch], 1e-3, sharing,
                   precision)

    return step


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder in COCO's layout")
    parser.add_argument("--config", default="yolact_resnet50")
    parser.add_argument("--rounds", type=Bounded(int, 1), default=10)
    parser.add_argument("--images", type=Bounded(int, 1), default=20, help="of bench_eval.py")
    parser.add_argument("--against", metavar="FOLDER", help="a copy of the original")
    args = parser.parse_args(argv)
    if args.against is not None and not (Path(args.against) / "yolact.py").is_file():
        raise UserError(f"--against={args.against}: no copy of the original (has no yolact.py)")
    config = get_config(args.config)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory(CPU)  # as train.py and eval.py do
    print(f"{config.name}, {config.max_size} px; {_processor()}; {describe(CPU)}\n")
    print("| what, against what | CPU ms | ours | ratio | page faults |\n|---|---|---|---|---|")
    bench_optimizers(config, args.rounds)
    bench_network(config, args.rounds)
    bench_training(config, min(args.rounds, 2))
    if args.against is not None:
        bench_original(config, args.data, args.against, args.rounds)
    print(flush=True)
    bench_eval.main([args.data, f"--images={args.images}"])
    print(flush=True)
    return bench_loader.main(["--data", args.data, "--epochs=1"])


def _processor() -> str:
    """Its name, and what of its instructions matters here."""
    words = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in words if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    known = set(facts.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    return ", ".join([facts.get("model name", platform.machine()), *sorted(known)])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line entry; returns the exit code."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
