"""Print what a training step and a detection ask of an NPU, and fail where it is too much.

    python test/npu/audit.py --config yolact_base --batch_size 4 [--device npu|cpu] [--max_size S]
        [--opt_level O1] [--fused_loss] [--soc 910B|910A]

Where there is no NPU it is emulated (test/npu/make_env.sh); with --device cpu only what PyTorch's
dispatcher shows is counted.

Per step: operators by name and number, whether torch_npu runs them itself or on the CPU, shapes
that depend on values, signatures not met before, times that the host waits, copies and their bytes.
On the emulator also each kernel with its types and shapes, its place in the code, and whether the
card runs it on its cores or on its auxiliary CPU, which is slower by a factor of tens
(test/npu/kernels.py). Exit code 1 if a gate is broken, 2 for a mistake in the flags.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Before torch: a blocking launch would count as a wait of the host, and so hide the real ones.
os.environ["ASCEND_LAUNCH_BLOCKING"] = "0"
os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
TEST = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TEST), str(TEST.parent)]

import argparse  # noqa: E402
from collections import Counter  # noqa: E402
from typing import Dict, List, Sequence  # noqa: E402

import torch  # noqa: E402

from helpers.recorder import SHAPE_FROM_VALUES, Step, available  # noqa: E402
from layers.anchors import make_priors  # noqa: E402
from npu.audit_scene import OBJECTS, Measured, Scene, shrunk  # noqa: E402
from npu.kernels import (  # noqa: E402
    AUXILIARY,
    CORE,
    SOCS,
    UNAVOIDABLE_910A,
    UNKNOWN,
    kernels_of,
)
from utils.amp import build_precision  # noqa: E402
from utils.cli import ArgumentParser, Bounded, add_switch, run_main  # noqa: E402
from utils.device import describe, select_device  # noqa: E402
from utils.engine.learner import choose_row_losses  # noqa: E402
from utils.errors import UserError  # noqa: E402

MOST_OPERATORS = {"yolact_resnet50": 1300}
"""Per training step, all of them, views included; the original: 2931."""
MOST_IN_LOSS = 120
"""Of the forward pass of the loss; the original: 1507 forward and backward."""
MOST_FOR_RESCORING = 80
"""More of them where YOLACT++ has a network and a loss for the quality of masks."""
MOST_BYTES_TO_HOST = 4096
"""A copy to the host between log lines has to be small: verdicts and losses, no masks."""
WARM_UP = 2
"""Steps that may meet new signatures."""
DYNAMIC_KERNELS = ("Nonzero", "NonzeroV2", "MaskedSelect")
FIELDS_OF_A_BATCH = 12

NATIVE, COMPOSITE, FALLBACK = "native", "composite", "CPU FALLBACK"


def placement(operator: str) -> str:
    """Where torch_npu runs an operator like "aten.add.Tensor": its own kernel, others, the CPU."""
    if not hasattr(torch, "npu"):
        return UNKNOWN
    namespace, name, overload = operator.split(".")[:3]
    qualified = "{}::{}{}".format(namespace, name, "" if overload == "default" else "." + overload)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if has_kernel(qualified, "PrivateUse1"):
        return NATIVE
    keys = ("CompositeImplicitAutograd", "CompositeExplicitAutograd",
            "CompositeExplicitAutogradNonFunctional")
    return COMPOSITE if any(has_kernel(qualified, key) for key in keys) else FALLBACK


def dynamic(measured: Measured) -> List[str]:
    """Operators whose result's shape depends on values."""
    from_values = tuple("aten." + name + "." for name in SHAPE_FROM_VALUES) + ("aten.index",)
    found = [place for place in measured.whole.syncs if place.startswith(from_values)]
    return found + ["aclnn" + name for name in DYNAMIC_KERNELS if name in measured.kernels]


def fallbacks(step: Step) -> List[str]:
    """Operators that torch_npu would run on the CPU."""
    return sorted(name for name in step.operators if placement(name) == FALLBACK)


def waits(measured: Measured) -> int:
    """Times that the host waited for the device."""
    seen = len(measured.whole.syncs)
    return seen if measured.traffic is None else max(seen, measured.traffic.synchronisations)


def summary(measured: Measured) -> str:
    """One line about a step."""
    whole = measured.whole
    text = "{:<32} {:>5} operators ({} launch kernels), {} new signatures, {} waits".format(
        measured.name + ":", whole.total, whole.kernels, len(whole.new_signatures), waits(measured))
    if measured.traffic is not None:
        to_device, to_host = measured.traffic.to_device, measured.traffic.to_host
        text += (f", to device {to_device.calls} copies {to_device.bytes / 1e6:.3f} MB, to host "
                 f"{to_host.calls} copies {to_host.bytes} B, {sum(measured.kernels.values())} "
                 "aclnn calls")
    return text


def table(measured: Measured) -> str:
    """Operators of a step by name, most frequent first."""
    lines = [f"operators of {measured.name}:"]
    parts = dict(measured.parts)
    for name, step in parts.items():
        lines.append(f"  {name:<12}{step.total:>5}, views among them {sum(step.views.values())}")
    rest = measured.whole.total - sum(step.total for step in parts.values())
    lines.append("  {:<12}{:>5}".format("all else", rest))
    counted: Dict[str, int] = measured.whole.operators
    for name, count in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        lines.append("  {:>5}  {:<50} {}{}".format(
            count, name, placement(name), " view" if name in measured.whole.views else ""))
    return "\n".join(lines)


def kernel_table(measured: Measured, socs: Sequence[str]) -> str:
    """Calls of a step with their places, and where each card runs their kernels; equal ones are
    one line.
    """
    lines = [f"kernels of {measured.name}: times, on {', on '.join(socs)}, operator, place"]
    for (call, place), times in Counter(measured.calls).items():
        where = [_worst([found for _, found in kernels_of(call, soc)]) for soc in socs]
        lines.append(f"  {times:>3} {' '.join(f'{text:<13}' for text in where)} {call}  {place}")
    return "\n".join(lines)


def _worst(places: Sequence[str]) -> str:
    return next((place for place in (AUXILIARY, UNKNOWN) if place in places), CORE)


def off_core(measured: Measured, soc: str, where: str) -> List[str]:
    """Kernels that run elsewhere than on the cores, each with its call and place."""
    return [f"{kernel}: {call}  {place}" for call, place in measured.calls
            for kernel, found in kernels_of(call, soc) if found == where]


class Gates:
    """Checks that are printed one a line and remembered when broken."""

    def __init__(self) -> None:
        self.broken = 0

    def check(self, what: str, found: int, most: int, details: Sequence[str] = ()) -> None:
        """`found` may be `most` at the largest."""
        passed = found <= most
        self.broken += not passed
        print("{}  {}: {} (at most {})".format("pass" if passed else "FAIL", what, found, most))
        if not passed:
            for line in sorted(set(details))[:20]:
                print("        " + line)


def check_each(gates: Gates, steps: List[Measured], fields: int) -> None:
    """Gates that hold for every step alone; the first two may meet new signatures."""
    missing = sorted({name for step in steps for name in fallbacks(step.whole)})
    gates.check("operators that fall back to the CPU", len(missing), 0, missing)
    shapes = [place for step in steps for place in dynamic(step)]
    gates.check("shapes that depend on values", len(shapes), 0, shapes)
    settled = steps[WARM_UP:]
    new = [str(signature) for step in settled for signature in step.whole.new_signatures]
    gates.check(f"new signatures after step {WARM_UP}", len(new), 0, new)
    places = [place for step in settled for place in step.whole.syncs]
    gates.check("waits of the host in one step", max(map(waits, settled)), 0, places)
    for step in settled:
        if step.traffic is None:
            continue
        to_device, to_host = step.traffic.to_device, step.traffic.to_host
        gates.check(step.name + ": copies to the device", to_device.calls, fields)
        gates.check(step.name + ": copies to the host", to_host.calls, 1)
        gates.check(step.name + ": bytes to the host", to_host.bytes, MOST_BYTES_TO_HOST)


def check_kernels(gates: Gates, step: Measured, socs: Sequence[str], training: bool) -> None:
    """Gates of where kernels run; a detection on 910A is told, but not judged."""
    lost = sum(step.kernels.values()) - len(step.calls)
    gates.check("kernels without a place in the code", abs(lost), 0)
    for soc in socs:
        found = off_core(step, soc, AUXILIARY)
        if soc == "910A" and training:
            for kernel, (most, reason) in UNAVOIDABLE_910A.items():
                known = [line for line in found if line.startswith(kernel)][:most]
                found = [line for line in found if line not in known]
                for line in known:
                    print(f"      on 910A, {reason}: {line}")
        most = 0 if soc != "910A" or training else len(found)
        gates.check(f"kernels on the auxiliary CPU of a {soc}", len(found), most, found)
        unknown = off_core(step, soc, UNKNOWN)
        gates.check(f"kernels not in the table of {soc}", len(unknown), 0, unknown)


def check_training(gates: Gates, steps: List[Measured], config: str, batch_size: int,
                   rescores: bool) -> None:
    """Gates of the training step."""
    settled = steps[WARM_UP:]
    totals = sorted({step.whole.total for step in settled})
    gates.check("different operator counts with {} objects per image".format(
        ", ".join(str(count) for count in sorted(set(OBJECTS)))), len(totals), 1,
        [f"counts: {totals}"])
    if config in MOST_OPERATORS and batch_size == 4:
        gates.check("operators in a step", max(totals), MOST_OPERATORS[config])
    gates.check("operators in the loss, forward",
                max(step.parts["loss"].total for step in settled),
                MOST_IN_LOSS + (MOST_FOR_RESCORING if rescores else 0))


def run_emulated(argv: Sequence[str]) -> int:
    """Start again in the environment of the tests on an NPU, which is made where it is missing."""
    script = 'environment=$(bash "$1") && eval "$environment" && shift && exec "$PYTHON" "$@"'
    return subprocess.call(["bash", "-c", script, "audit", str(TEST / "npu" / "make_env.sh"),
                            os.path.abspath(__file__), *argv, "--device=npu"])


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="audit.py", description=__doc__.splitlines()[0],
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="yolact_base")
    parser.add_argument("--batch_size", type=Bounded(int, 1), default=4)
    parser.add_argument("--device", default=None,
                        help="npu or cpu; default: npu, emulated where there is none")
    parser.add_argument("--max_size", type=Bounded(int, 1), default=None,
                        help="input side, for a quicker run; default: the recipe's")
    parser.add_argument("--opt_level", default="O0", help="O0, O1 or O2")
    parser.add_argument("--amp_dtype", default="auto", help="float16 or bfloat16")
    parser.add_argument("--loss_scale", default=None, help="dynamic or a number")
    add_switch(parser, "--fused_loss", help="with the plugin's cross entropy, as train.py has it")
    parser.add_argument("--soc", choices=SOCS, default=None, help="card whose kernels are judged "
                        "and that is emulated; default: both, on an emulated 910B")
    args = parser.parse_args(argv)
    if args.soc is not None:
        os.environ["NPUEMU_SOC"] = {"910A": "Ascend910A", "910B": "Ascend910B1"}[args.soc]
    if args.device is None:
        try:
            args.device = select_device("npu").type
        except UserError:
            return run_emulated(argv)
    if not available():
        raise UserError(f"torch {torch.__version__} cannot record operators; use torch 2.x")
    config = shrunk(args.config, args.max_size)
    device = select_device(args.device)
    precision = build_precision(args.opt_level, args.loss_scale, args.amp_dtype, device)
    row_losses = choose_row_losses(args.fused_loss, device, args.batch_size,
                                   len(make_priors(config)))
    scene = Scene(config, args.batch_size, device, precision, row_losses)
    print("{}, batch {}, {} px, precision {}, {}{}".format(
        config.name, args.batch_size, config.max_size, precision.name,
        "fused loss, " if args.fused_loss else "", describe(device)))
    print("emulated, not measured on Ascend" if scene.meter.emulated else
          "measured by PyTorch's dispatcher on " + device.type)

    steps, detections = scene.train(), scene.find()
    print("\n".join([""] + [summary(step) for step in steps + detections]))
    print("\n" + table(steps[-1]) + "\n\n" + table(detections[-1]) + "\n")
    # The fused loss exists from 910B on.
    socs = (args.soc,) if args.soc else SOCS[:1] if args.fused_loss else SOCS
    if scene.meter.emulated:
        print(kernel_table(steps[-1], socs) + "\n\n" + kernel_table(detections[-1], socs) + "\n")
    gates = Gates()
    print("training")
    check_each(gates, steps, FIELDS_OF_A_BATCH)
    if scene.meter.emulated:
        check_kernels(gates, steps[-1], socs, training=True)
    check_training(gates, steps, args.config, args.batch_size,
                   scene.network.maskiou_net is not None)
    print("detection")
    check_each(gates, detections, 1)
    if scene.meter.emulated:
        check_kernels(gates, detections[-1], socs, training=False)
    print(f"{gates.broken} gates broken" if gates.broken else "all gates hold")
    return 1 if gates.broken else 0


if __name__ == "__main__":
    sys.exit(run_main(_run, sys.argv[1:]))
