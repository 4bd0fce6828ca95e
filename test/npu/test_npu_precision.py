"""Half precision on the NPU: against float32 on the CPU, overflows, the first 910's register."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from data.shapes import write_dataset
from helpers import rounding
from helpers.deterministic import load_deterministic_weights, small_config
from helpers.loss_reference import golden_images, target_batch
from layers.multibox_loss import MultiBoxLoss
from npu import counters
from npu.test_npu_training import RANKS, free_port, relative
from train import train_step
from utils.amp import Precision, batch_norm_parameters, build_precision
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.optimizer import build_optimizer
from yolact import build_yolact

CPU = torch.device("cpu")
STEPS, RATE = 3, 1e-4


@pytest.fixture(autouse=True)
def only_on_an_npu(device):
    if device.type != "npu":
        pytest.skip("runs with --device npu")


def losses_of_steps(golden, device, precision):
    """Losses of the first steps of yolact_resnet50 at 138 px, on the CPU, and the parameters."""
    data = golden("train4steps_resnet50_138")
    config = small_config("yolact_resnet50")
    network = load_deterministic_weights(build_yolact(config))
    network.freeze_bn()
    network.to(device).train()
    batch = target_batch(config, golden_images(data)).to(device)
    optimizer = build_optimizer(config, network, last=batch_norm_parameters(network))
    precision.prepare(network, optimizer)
    batch.images = torch.from_numpy(data["in_x"]).to(device)
    found = []
    for _ in range(STEPS):
        losses = train_step(network, MultiBoxLoss.from_config(config), optimizer, [batch], RATE,
                            Sharing(Processes(), device), precision)
        found.append(torch.stack(list(losses.values())).to(CPU))
    assert bool(optimizer.step_finite)
    return torch.stack(found), optimizer.flat.to(CPU)


@pytest.fixture(scope="module")
def in_float32(golden):
    return losses_of_steps(golden, CPU, Precision())


@pytest.mark.parametrize("level, kind, largest", [
    ("O1", "float16", 0.01), ("O2", "float16", 0.01), ("O1", "bfloat16", 0.05)])
def test_steps_equal_float32_but_for_rounding(golden, device, in_float32, level, kind, largest):
    if kind == "bfloat16":
        rounding.skip_where_saturated()
    precision = build_precision(level, "1024", kind, device)
    losses, parameters = losses_of_steps(golden, device, precision)
    assert float((losses / in_float32[0] - 1).abs().max()) < largest
    assert relative(parameters, in_float32[1]) < 1e-3


ON_THE_FIRST_910 = """
import os, sys
sys.path[:0] = [{root!r}, {test!r}]
import torch
from npu import counters
from utils.amp import build_precision
from utils.device import half_type_problem, saturates, select_device, synchronize
from utils.optimizer import FlatSGD
from train import train_step
from utils.distributed.sharing import Sharing
from utils.distributed.processes import Processes

processes = Processes.from_env(os.environ)
device = select_device("npu", processes.local_rank)
processes.init(device)
assert saturates(device) and "no bfloat16" in half_type_problem(device, torch.bfloat16)

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
    def forward(self, images):
        if saturate == "forward":
            overflow()
        return {{"out": self.layer(images)}}

class Part:
    images = torch.ones(2, 4, device=device)
    num_positives = torch.ones(2, device=device)

def overflow():
    synchronize(device)  # the register has been emptied by now
    counters.set_overflow()

saturate = ""
def criterion(predictions, part, num_positives):
    out = predictions["out"] * 1
    if saturate == "loss":
        overflow()
    if saturate == "backward":
        out.register_hook(lambda gradient: overflow())
    return {{"B": out.pow(2).mean()}}

torch.manual_seed(0)
network = Network().to(device)
flat = FlatSGD(network.parameters())
precision = build_precision(sys.argv[1], None, "auto", device)
sharing = Sharing(processes, device)
verdicts = []
for step, kind in enumerate(["", "", "forward", "loss", "backward", "void", "huge", ""]):
    on_this_card = processes.rank == processes.world_size - 1  # the last one only
    saturate = kind if on_this_card else ""
    counters.set_overflow()  # by somebody else, before the forward pass
    before, part = flat.flat.clone(), Part()
    if saturate == "huge":  # the layer multiplies in half precision: this sets the register
        part.images = part.images * 1e5
    train_step(network, criterion, flat, [part], 0.01, sharing, precision, saturate == "void")
    verdicts.append(bool(flat.step_finite))
    assert torch.equal(before, flat.flat) != verdicts[-1]
assert verdicts == [True, True, False, False, False, False, False, True], verdicts
assert precision.scale is None or float(precision.scale.value) == 2048
print("rank", processes.rank, "done", flush=True)
processes.shutdown()
"""


def run_ranks(script, count, *arguments, **more):
    port, workers = str(free_port()), []
    for rank in range(count):
        env = dict(os.environ, PYTHONPATH=str(ROOT), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                   RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), **more)
        workers.append(subprocess.Popen(
            [sys.executable, "-c", script] + list(arguments), env=env, cwd=str(ROOT),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True))
    try:
        outputs = [worker.communicate(timeout=400)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(outputs)
    return outputs


@pytest.mark.launch
@pytest.mark.parametrize("count, level", [(1, "O0"), (1, "O1"), (RANKS, "O0")])
def test_a_device_that_saturates_tells_by_its_register(count, level):
    """Of an overflow in the forward pass, the loss or the backward pass, in float32 too."""
    if not counters.available():
        pytest.skip("only the emulator can be another device")
    script = ON_THE_FIRST_910.format(root=str(ROOT), test=str(ROOT / "test"))
    for rank, output in enumerate(run_ranks(script, count, level, NPUEMU_SOC="Ascend910A")):
        assert f"rank {rank} done" in output


DEFAULTS = """
import torch, torch_npu
from utils.device import select_device
torch.npu.set_device(0)
before = torch.npu.is_jit_compile_false()
formats = torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT")
device = select_device("npu")
print(before, torch.npu.is_jit_compile_false(), formats, torch.npu.utils.is_support_inf_nan(),
      torch.npu.is_bf16_supported(), (torch.full((2,), 3e38, device=device) * 10).tolist())
"""


@pytest.mark.launch
@pytest.mark.parametrize("soc, told", [
    ("Ascend910A", "False True b'' False False [3.4028234663852886e+38, 3.4028234663852886e+38]"),
    ("Ascend910B1", "True True b'disable' True True [inf, inf]")])
def test_each_card_has_the_defaults_of_its_own(soc, told):
    """Compile mode and formats are torch_npu's; `select_device` takes one mode for all."""
    if not counters.available():
        pytest.skip("only the emulator can be another device")
    # Among the lines: torch_npu may have something to log behind it.
    assert told in run_ranks(DEFAULTS, 1, NPUEMU_SOC=soc)[0].splitlines()


OVERFLOW_ON_ONE = """
import sys
import torch
import torch.distributed as dist
import train

step, steps = train.train_step, []

def overflowing(network, criterion, *args, **kwargs):
    steps.append(1)
    rank, huge = dist.get_rank(), len(steps) == 3
    def spoilt(*more):
        losses = criterion(*more)
        if rank == 1 and huge:
            losses["B"] = losses["B"] * 1e34  # finite, but for the gradient times the scale
        return losses
    return step(network, spoilt, *args, **kwargs)

train.train_step = overflowing
save = train.save

def compare_and_save(training, done, *args, **kwargs):
    learner = training.learner
    scale = learner.precision.scale.value.reshape(1)
    mine = torch.cat([learner.optimizer.flat, scale])
    everybodys = [torch.empty_like(mine) for _ in range(training.processes.world_size)]
    dist.all_gather(everybodys, mine)
    assert all(torch.equal(mine, other) for other in everybodys), "the ranks have drifted apart"
    applied = int(learner.optimizer.steps)
    assert float(scale) == 32768 and applied == 3, (scale, applied)
    print("equal over", dist.get_backend(), flush=True)
    return save(training, done, *args, **kwargs)

train.save = compare_and_save
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.launch
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_an_overflow_on_one_card_skips_the_step_on_both(tmp_path, level):
    if torch.npu.device_count() < RANKS:
        pytest.skip("one card only")
    rounding.skip_where_saturated()
    data = tmp_path / "data"
    write_dataset(str(data), seed=3, train=13, val=4)
    outputs = run_ranks(
        OVERFLOW_ON_ONE, RANKS, f"--data={data}", "--config=yolact_shapes",
        "--batch_size=2", "--no_autoscale", "--num_workers=0", "--max_iter=4", "--no_log",
        "--save_folder={}".format(tmp_path / "weights"), "--node_device=npu",
        "--opt_level=" + level, "--amp_dtype=bfloat16", "--loss_scale=dynamic")
    for output in outputs:
        assert "equal over hccl" in output
        assert re.search(r"iteration 2: gradient overflow at scale 65536, the scale is now 32768",
                         output)
