"""All measurements in one table, with the machine and the versions: docs/performance.md holds one.

    python test/benchmark/run.py /data/coco [--config=yolact_resnet50] [--rounds=10] [--images=20]

Of each pair both are run in turn in this process; the best CPU time of the rounds counts, so that
other load on the machine does not, and the ratio is what to compare between machines. Behind the
table stand the loader (`bench_loader.py`) and what follows the network (`bench_eval.py`).
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import bench_eval  # noqa: E402
import bench_loader  # noqa: E402

from data.config import Config, get_config  # noqa: E402
from utils.amp import INFERENCE_TYPES, build_precision, inference_dtype  # noqa: E402
from utils.cli import ArgumentParser, Bounded, run_main  # noqa: E402
from utils.device import describe  # noqa: E402
from utils.inference.detector import LoadedModel  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402
from utils.optimizer import build_optimizer  # noqa: E402
from utils.weights.files import WeightsFile  # noqa: E402
from utils.weights.loading import LoadReport  # noqa: E402
from yolact import build_yolact  # noqa: E402

CPU = torch.device("cpu")


class Cost:
    """Best CPU milliseconds and fewest page faults of a piece of work."""

    milliseconds, faults = float("inf"), sys.maxsize

    def take(self, work: Callable[[], Any]) -> None:
        """Run it once more."""
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        self.milliseconds = min(self.milliseconds, 1e3 * (time.process_time() - start))
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


def bench_network(config: Config, rounds: int) -> None:
    """One image through the network as it was trained, and as it finds objects."""
    network = build_yolact(config).eval()
    loaded = LoadedModel(network, config, LoadReport(WeightsFile("none", "random", {}), (), (), ()))
    images = torch.randint(0, 256, (1, 3, config.max_size, config.max_size), dtype=torch.uint8)
    fastest = inference_dtype("auto", CPU)
    kinds = [kind for kind, dtype in INFERENCE_TYPES.items() if dtype in (torch.float32, fastest)]
    ready = {kind: loaded.on(CPU, kind) for kind in kinds}
    with torch.no_grad():
        found = costs({"plain": lambda: network(images),
                       **{kind: (lambda model=model: model(images))  # type: ignore[misc]
                          for kind, model in ready.items()}}, rounds)
    for kind in ready:
        row(f"network, --precision={kind}, as trained", found["plain"], found[kind])


def bench_training(config: Config, rounds: int) -> None:
    """Forward and backward pass of four images, plain, with channels last, and in bfloat16.

    The loss is a mean of squares, so that the network alone is measured.
    """
    network = build_yolact(config).train()
    images = torch.randint(0, 256, (4, 3, config.max_size, config.max_size), dtype=torch.uint8)

    def step(channels_last: bool, level: str) -> None:
        precision = build_precision(level, None, "auto" if level == "O0" else "bfloat16", CPU)
        network.channels_last = channels_last
        network.zero_grad()
        with precision.forward():
            predictions = network(images)
        precision.backward(sum((values.square().mean() for values in precision.widen(
            predictions).values()), torch.zeros(())))

    found = costs({"plain": lambda: step(False, "O0"), "ours": lambda: step(True, "O0"),
                   "half": lambda: step(True, "O1")}, rounds)
    row("training, four images, against plain layout", found["plain"], found["ours"])
    row("training, --opt_level=O1 --amp_dtype=bfloat16, against the same", found["plain"],
        found["half"])


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder in COCO's layout")
    parser.add_argument("--config", default="yolact_resnet50")
    parser.add_argument("--rounds", type=Bounded(int, 1), default=10)
    parser.add_argument("--images", type=Bounded(int, 1), default=20, help="of bench_eval.py")
    args = parser.parse_args(argv)
    config = get_config(args.config)
    torch.manual_seed(0)
    keep_freed_memory(CPU)  # as train.py and eval.py do
    print(f"{config.name}, {config.max_size} px; {_processor()}; {describe(CPU)}\n")
    print("| what, against what | CPU ms | ours | ratio | page faults |\n|---|---|---|---|---|")
    bench_optimizers(config, args.rounds)
    bench_network(config, args.rounds)
    bench_training(config, min(args.rounds, 2))
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
