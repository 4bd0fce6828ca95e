"""The launchers over the real programs: real COCO images, a small recipe, few steps, on the CPU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from helpers.paths import ROOT

SMALL = ("--config=yolact_shapes_config", "--node_device=cpu", "--num_workers=0", "--batch_size=4",
         "--no_autoscale")

pytestmark = pytest.mark.launch


class Workplace:
    """A folder with copies of the launchers and links to the programs."""

    def __init__(self, folder):
        self.root = folder
        (folder / "test").mkdir(parents=True)
        for script in (ROOT / "test").glob("*.sh"):
            shutil.copy(str(script), str(folder / "test" / script.name))
        for program in ("train.py", "eval.py"):
            os.symlink(str(ROOT / program), str(folder / program))
        self.env = {key: value for key, value in os.environ.items() if key not in (
            "ASCEND_DEVICE_ID", "RANK_ID", "RANK_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.env.update(PYTHON=sys.executable, OMP_NUM_THREADS="1")

    def start(self, script, *arguments):
        command = ["bash", "test/" + script] + [str(argument) for argument in arguments]
        return subprocess.Popen(command, cwd=str(self.root), env=self.env, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, universal_newlines=True)

    def run(self, script, *arguments):
        launcher = self.start(script, *arguments)
        try:
            out, err = launcher.communicate(timeout=240)
        finally:
            launcher.kill()
        return launcher.returncode, out, err

    def output(self, name):
        return (self.root / "test" / "output" / "0" / name).read_text()

    def case(self, name):
        lines = self.output(name + ".log").splitlines()
        return dict(line.split(" = ", 1) for line in lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("launch") / "place")


@pytest.fixture(scope="module")
def trained(place, coco_mini):
    """A short training, scored."""
    code, out, err = place.run("train_full_1p.sh", coco_mini, "--max_iter=30", "--lr=1e-3",
                               "--fps_start_iter=5", *SMALL)
    assert code == 0, err
    return out


def test_full_training_learns_and_reports_what_was_measured(trained, place):
    case = place.case("YOLACT_bs4_1p_acc")
    assert list(case) == ["Network", "RankSize", "BatchSize", "DeviceType", "CaseName",
                          "ActualFPS", "TrainingTime", "TrainAccuracy", "ActualLoss",
                          "E2ETrainingTime"]
    log = place.output("train_0.log")
    lines = [line for line in log.splitlines() if "avg_fps: " in line]
    assert len(lines) == 4
    assert "avg_fps: {} ||".format(case["ActualFPS"]) in lines[-1]
    assert float(case["ActualFPS"]) > 0
    assert float(case["TrainingTime"]) == pytest.approx(4000 / float(case["ActualFPS"]), abs=0.01)

    losses = [float(line) for line in
              place.output("train_YOLACT_bs4_1p_acc_loss.txt").splitlines()]
    assert case["ActualLoss"] == f"{losses[-1]:.3f}"
    assert len(losses) == 4 and losses[-1] < losses[0]

    assert "Final Performance images/sec : {}\n".format(case["ActualFPS"]) in trained
    assert "Final Train Accuracy : {}\n".format(case["TrainAccuracy"]) in trained
    assert re.search(r"^E2E Training Duration sec : \d+$", trained, re.M)
    table = {row: re.search(rf"^ *{row} \|([^|]*)\|", place.output("eval_0.log"), re.M)
             for row in ("box", "mask")}
    assert case["TrainAccuracy"] == "box mAP:{}, mask mAP:{}".format(
        table["box"].group(1), table["mask"].group(1))
    assert (place.root / "weights").is_dir()


def test_evaluation_alone_finds_the_same_accuracy(trained, place, coco_mini):
    weights = re.search(r"^Final weights : (.*)$", place.output("train_0.log"), re.M).group(1)
    before = place.case("YOLACT_bs4_1p_acc")["TrainAccuracy"]
    code, out, err = place.run("train_eval_1p.sh", coco_mini, "--pth_path=" + weights,
                               "--node_device=cpu", "--num_workers=0")
    assert code == 0, err
    assert f"Final Train Accuracy : {before}\n" in out
    assert place.case("YOLACT_bs8_1p_eval")["TrainAccuracy"] == before


def test_performance_alone(place, coco_mini):
    code, out, err = place.run("train_performance_1p.sh", f"--data_path={coco_mini}",
                               "--max_iter=12", "--fps_start_iter=2", *SMALL)
    assert code == 0, err
    case = place.case("YOLACT_bs4_1p_perf")
    assert float(case["ActualFPS"]) > 0 and "TrainAccuracy" not in case
    assert "Final Performance images/sec : {}\n".format(case["ActualFPS"]) in out


def test_a_mistake_ends_with_code_2_and_its_sentence(place, coco_mini):
    code, _, err = place.run("train_performance_1p.sh", coco_mini, "--config=yolact_bass")
    assert code == 2
    assert err.splitlines()[0].startswith("[Error] train.py ended with exit code 2;")
    assert "did you mean 'yolact_base'?" in err


def test_a_missing_folder_ends_with_code_2_and_its_name(place):
    code, _, err = place.run("train_full_1p.sh", "/no/such/coco", *SMALL)
    assert code == 2
    assert "/no/such/coco" in err and "Traceback" not in err


def test_stopping_the_launcher_saves_the_training(place, coco_mini):
    launcher = place.start("train_full_1p.sh", coco_mini, "--max_iter=5000",
                           "--save_folder=stopped", *SMALL)
    try:
        deadline = time.time() + 120
        log = place.root / "test" / "output" / "0" / "train_0.log"
        while not (log.exists() and "avg_fps: " in log.read_text()):
            assert time.time() < deadline and launcher.poll() is None
            time.sleep(0.1)
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 130, err
    saved = [path.name for path in (place.root / "stopped").iterdir()]
    assert any(name.endswith("_interrupt.pth") for name in saved), saved


def test_a_host_with_cann_is_not_left_to_its_cpu(place, tmp_path, monkeypatch):
    """CANN is here and torch_npu is not: no launcher and no program trains on the CPU unasked."""
    if find_spec("torch_npu") is not None:
        pytest.skip("this Python has torch_npu")
    monkeypatch.setitem(place.env, "ASCEND_HOME_PATH", "/cann")
    sentence = ("error: device 'auto' is not the CPU where there is CANN (ASCEND_HOME_PATH=/cann), "
                "but the Ascend NPU cannot be used: torch_npu is not installed for this Python; ")
    status, out, err = place.run("train_performance_1p.sh", tmp_path, *SMALL, "--node_device=auto")
    assert status == 2 and sentence in err and "Final" not in out
    for program in ("train.py", "eval.py"):
        done = subprocess.run([sys.executable, str(ROOT / program)], cwd=str(tmp_path),
                              env=place.env, stderr=subprocess.PIPE, universal_newlines=True)
        assert done.returncode == 2 and done.stderr.startswith(sentence), done.stderr
        assert done.stderr.count("\n") == 1
