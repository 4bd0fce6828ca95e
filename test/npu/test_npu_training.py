"""A training step, a detection and whole runs on the NPU against the CPU."""

from __future__ import annotations

import copy
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import eval as evaluation
import train
from data.shapes import write_dataset
from helpers import rounding
from helpers.deterministic import load_deterministic_weights, small_config
from helpers.loss_reference import golden_images, target_batch
from layers.detection import Detect
from layers.masks import assemble_masks
from layers.multibox_loss import MultiBoxLoss
from npu import counters
from utils.optimizer import FlatSGD
from yolact import build_yolact

CPU = torch.device("cpu")
ROUNDING = (1e-5, 5e-4, 2e-3, 5e-3)
"""Of the losses: differences grow with every step through 50 layers, as on any two devices."""
RATE = 1e-3
RANKS = 2


def bound_of_step(step):
    """Relative difference that the losses of a step may have on this card."""
    return max(ROUNDING[step], (step + 1) * rounding.network(0))


@pytest.fixture(autouse=True)
def only_on_an_npu(device):
    if device.type != "npu":
        pytest.skip("compares an NPU with the CPU; run with --device npu")


class OneSide:
    """Network, loss and optimiser of yolact_resnet50 at 138 px on one device."""

    def __init__(self, golden, device):
        data = golden("train4steps_resnet50_138")
        config = small_config("yolact_resnet50")
        network = load_deterministic_weights(build_yolact(config))
        network.freeze_bn()
        self.device, self.config = device, config
        self.network = network.to(device).train()
        self.images = torch.from_numpy(data["in_x"]).to(device)
        self.batch = target_batch(config, golden_images(data)).to(device)
        self.criterion = MultiBoxLoss.from_config(config)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = FlatSGD(trained, momentum=0.9, weight_decay=5e-4)

    def step(self):
        """Losses and gradients of one step, on the CPU."""
        losses = self.criterion(self.network(self.images), self.batch)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        gradients = {name: p.grad.to(CPU).clone() for name, p in self.network.named_parameters()
                     if p.grad is not None}
        self.optimizer.step(RATE)
        return {name: loss.item() for name, loss in losses.items()}, gradients

    @torch.no_grad()
    def find(self):
        """Predictions, detections and the first image's masks, on the CPU."""
        network = copy.deepcopy(self.network).eval()
        predictions = network(self.images)
        detect = Detect.from_config(self.config.replace(nms_conf_thresh=0.01))
        detect.compact = False
        found = detect(predictions)
        objects = found.to(CPU).of_image(0)
        masks = assemble_masks(predictions["proto"][0], objects.coefficients.to(self.device),
                               objects.boxes.to(self.device), 90, 120)
        return ({name: value.to(CPU) for name, value in predictions.items()}, found.to(CPU),
                masks.to(CPU))


def relative(found, wanted):
    """Norm of the difference, relative to that of the wanted values."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def test_four_steps_equal_the_cpus(golden, device):
    ours, theirs = OneSide(golden, device), OneSide(golden, CPU)
    for step, exact in enumerate(ROUNDING):
        rtol = bound_of_step(step)
        losses, gradients = ours.step()
        wanted_losses, wanted_gradients = theirs.step()
        np.testing.assert_allclose(list(losses.values()), list(wanted_losses.values()), rtol=rtol)
        assert set(gradients) == set(wanted_gradients) and len(gradients) > 80
        worst = max(relative(gradients[name], wanted_gradients[name]) for name in gradients)
        if step == 0 or rounding.in_order():  # float16 takes them elsewhere within a few steps
            assert worst < max(10 * exact, 2 * rtol), (step, worst)
    weights = theirs.network.state_dict()
    for name, value in ours.network.state_dict().items():
        assert relative(value.to(CPU).float(), weights[name].float()) < bound_of_step(3), name


def test_predictions_detections_and_masks_equal_the_cpus(golden, device):
    ours, theirs = OneSide(golden, device), OneSide(golden, CPU)
    predictions, found, masks = ours.find()
    wanted_predictions, wanted, wanted_masks = theirs.find()
    for name, value in wanted_predictions.items():
        assert relative(predictions[name], value) < rounding.network(1e-4), name
    assert int(wanted.count.min()) > 10
    if not rounding.in_order():  # what is nearly equal comes in another order
        torch.testing.assert_close(found.scores, wanted.scores, rtol=rounding.network(0), atol=1e-3)
        return
    assert found.count.tolist() == wanted.count.tolist()
    assert torch.equal(found.classes, wanted.classes)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-5)
    assert masks.shape == wanted_masks.shape and wanted_masks.any()
    assert float((masks != wanted_masks).float().mean()) < 1e-4


@pytest.mark.launch
def test_real_images_are_learnt_from_and_scored(coco_mini, device, tmp_path, capsys):
    weights = str(tmp_path / "weights")
    flags = [f"--data={coco_mini}", "--config=yolact_shapes", "--batch_size=2",
             "--no_autoscale", "--num_workers=0", "--save_folder=" + weights, "--no_log",
             "--save_interval=4", "--node_device=npu"]
    assert train.main(flags + ["--max_iter=6"]) == 0
    whole = weights_in(weights)
    out = capsys.readouterr().out
    assert "device npu:0" in out and len(re.findall(r"^\[ ", out, re.MULTILINE)) == 2

    # Resumed at iteration 4, the run ends with the same weights, to the bit.
    os.unlink(newest(weights, ".pth"))
    os.unlink(newest(weights, ".state"))
    assert train.main(flags + ["--max_iter=6", "--resume=latest"]) == 0
    again = weights_in(weights)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert "at iteration 4" in capsys.readouterr().out

    assert evaluation.main(["--trained_model=latest", "--save_folder=" + weights,
                            f"--val_data={coco_mini}", "--max_images=6", "--no_bar",
                            "--num_workers=0", "--eval_device=npu"]) == 0
    out = capsys.readouterr().out
    assert "device npu:0" in out and re.search(r"^  mask \|", out, re.MULTILINE)


def newest(folder, suffix):
    names = [name for name in os.listdir(folder) if name.endswith(suffix)]
    return os.path.join(folder, max(names, key=lambda name: int(re.findall(r"\d+", name)[-1])))


def weights_in(folder):
    return torch.load(newest(folder, ".pth"), map_location="cpu")


WORKER = """
import sys
import torch
import torch.distributed as dist
import train

save = train.save

def compare_and_save(training, done, *args, **kwargs):
    mine = torch.cat([p.detach().reshape(-1) for p in training.learner.model.parameters()])
    everybodys = [torch.empty_like(mine) for _ in range(training.processes.world_size)]
    dist.all_gather(everybodys, mine)
    assert all(torch.equal(mine, other) for other in everybodys), "the ranks have drifted apart"
    print("iteration", done, "equal over", dist.get_backend(), "on", mine.device, flush=True)
    return save(training, done, *args, **kwargs)

train.save = compare_and_save
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.launch
def test_two_cards_over_hccl_stay_equal_and_equal_the_cpus(tmp_path, device):
    if torch.npu.device_count() < RANKS:
        pytest.skip("one card only")
    data = tmp_path / "data"
    write_dataset(str(data), seed=3, train=13, val=4)
    outputs = {name: train_on_ranks(tmp_path / name, data, name) for name in ("npu", "cpu")}
    for rank, output in enumerate(outputs["npu"]):
        assert f"iteration 6 equal over hccl on npu:{rank}" in output
    found, wanted = (weights_in(str(tmp_path / name)) for name in ("npu", "cpu"))
    for name, value in wanted.items():
        apart = float((found[name].float() - value.float()).norm())
        assert apart <= 0.05 * float(value.float().norm()) + rounding.of_small(value), name


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_on_ranks(weights, data, device, *more):
    """Train on drawn shapes in RANKS processes; returns what each printed."""
    port = str(free_port())
    flags = [f"--data={data}", "--config=yolact_shapes", "--batch_size=2",
             "--no_autoscale", "--num_workers=0", "--max_iter=6", "--save_interval=3", "--no_log",
             f"--save_folder={weights}", "--node_device=" + device,
             # AdamW's first steps are as large however small a gradient is: rounding would show.
             "--set", "optimizer=sgd", "--lr=0.002", *more]
    workers = []
    for rank in range(RANKS):
        environment = dict(os.environ, PYTHONPATH=str(ROOT), RANK=str(rank),
                           WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=port)
        workers.append(subprocess.Popen(
            [sys.executable, "-c", WORKER] + flags, env=environment, cwd=str(ROOT),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True))
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * RANKS, "\n".join(outputs)
    return outputs


QUICK = ("test/parity/test_loss.py", "test/parity/test_nms.py", "test/parity/test_detect.py",
         "test/unit/layers/test_multibox_loss.py", "test/unit/layers/test_detection.py",
         "test/npu/test_npu_operators.py::test_operator_equals_the_cpu",
         "test/npu/test_npu_training.py::test_predictions_detections_and_masks_equal_the_cpus")
"""What runs again in every mode of torch_npu's queue and over poisoned memory."""

MODES = {
    "operators wait": {"ASCEND_LAUNCH_BLOCKING": "1"},
    "no queue": {"ASCEND_LAUNCH_BLOCKING": "0", "TASK_QUEUE_ENABLE": "0"},
    "queue": {"ASCEND_LAUNCH_BLOCKING": "0", "TASK_QUEUE_ENABLE": "1"},
    "two queues": {"ASCEND_LAUNCH_BLOCKING": "0", "TASK_QUEUE_ENABLE": "2"},
    "poisoned memory": {"NPUEMU_POISON": "1", "PYTORCH_NO_NPU_MEMORY_CACHING": "1"},
}


@pytest.mark.launch
@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_results_do_not_depend_on_the_mode(mode):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--device=npu", "-p", "no:cacheprovider"]
        + list(QUICK), env=dict(os.environ, **MODES[mode]), cwd=str(ROOT), timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_poison_shows_memory_that_nobody_wrote():
    if not counters.available():
        pytest.skip("only the emulator can poison memory")
    code = ("import torch, torch_npu; torch.npu.set_compile_mode(jit_compile=False); "
            "print(torch.empty(3, device='npu').isnan().all().item())")
    environment = dict(os.environ, **MODES["poisoned memory"])
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True,
                            stdout=subprocess.PIPE, universal_newlines=True)
    assert result.stdout.split()[-1] == "True"


def test_a_missing_operator_fails_the_whole_run(tmp_path):
    if not counters.available():
        pytest.skip("only the emulator can lack an operator")
    (tmp_path / "test_swallowed.py").write_text(
        "def test_swallowed(device):\n"
        "    import torch\n"
        "    try:\n        torch.ones(2, device=device).tanh().cpu()\n"
        "    except RuntimeError:\n        pass\n", encoding="utf-8")
    shutil.copy(str(ROOT / "test" / "conftest.py"), str(tmp_path / "conftest.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--device=npu", "-p", "no:cacheprovider",
               "--rootdir=" + str(tmp_path), str(tmp_path)]
    for refused, code in (("", 0), ("Tanh", 1)):
        environment = dict(os.environ, NPUEMU_REFUSE=refused,
                           PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "test")]))
        result = subprocess.run(command, env=environment, cwd=str(tmp_path),
                                stdout=subprocess.PIPE, universal_newlines=True)
        assert result.returncode == code, result.stdout
        assert ("aclnnTanh is not emulated" in result.stdout) == bool(code)
