"""The launchers for several cards, and that for fine-tuning, over the real programs.

Real images, a small recipe, few steps, two processes on the CPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers.ranks import ROOT, clean_environ

pytestmark = [pytest.mark.launch, pytest.mark.slow]
SMALL = ("--config=yolact_shapes_config", "--node_device=cpu", "--num_workers=0",
         "--no_autoscale", "--no_log")


class Place:
    """A folder with copies of the launchers and links to the programs."""

    def __init__(self, folder):
        self.root = folder
        (folder / "test").mkdir(parents=True)
        for script in (ROOT / "test").glob("*.sh"):
            shutil.copy(str(script), str(folder / "test" / script.name))
        for name in ("train.py", "eval.py", "utils"):
            os.symlink(str(ROOT / name), str(folder / name))

    def run(self, script, *arguments, **env):
        command = ["bash", "test/" + script] + [str(argument) for argument in arguments]
        done = subprocess.run(command, cwd=str(self.root), timeout=400, stdout=subprocess.PIPE,
                              env=clean_environ(PYTHON=sys.executable, **env),
                              stderr=subprocess.PIPE, universal_newlines=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def output(self, name, number=0):
        return (self.root / "test" / "output" / str(number) / name).read_text()

    def case(self, name, number=0):
        return dict(line.split(" = ", 1) for line in self.output(name + ".log", number)
                    .splitlines())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("launch") / "place")


@pytest.fixture(scope="module")
def trained(place, coco_mini):
    return place.run("train_full_8p.sh", coco_mini, "--batch_size=2", "--max_iter=20",
                     "--lr=1e-3", "--fps_start_iter=5", *SMALL, NPROC=2)


def test_full_training_on_two_cards(place, trained):
    case = place.case("YOLACT_bs2_2p_acc")
    assert (case["RankSize"], case["BatchSize"]) == ("2", "2")
    assert float(case["ActualFPS"]) > 0
    assert float(case["TrainingTime"]) == pytest.approx(4000 / float(case["ActualFPS"]), abs=0.01)
    assert "Final Train Accuracy : {}\n".format(case["TrainAccuracy"]) in trained
    for rank in (0, 1):
        lines = re.findall(r"^\[.*GPU: (\d)$", place.output(f"train_{rank}.log", rank),
                           re.M)
        assert lines == [str(rank)] * 3
    done = subprocess.run(
        [sys.executable, str(ROOT / "test" / "check_baseline.py"), "--any_run"]
        + [str(path) for path in (place.root / "test" / "output" / "0").glob("*.log")],
        stdout=subprocess.PIPE, universal_newlines=True)
    assert done.returncode in (0, 1), done.stdout
    assert "config is yolact_shapes" in done.stdout and "cards is 2" in done.stdout
    assert "missing" not in done.stdout and "the logs do not say" not in done.stdout


def test_evaluation_on_two_cards_finds_the_same(place, trained, coco_mini):
    before = place.case("YOLACT_bs2_2p_acc")["TrainAccuracy"]
    weights = re.search(r"^Final weights : (.*)$", place.output("train_0.log"), re.M).group(1)
    place.run("train_eval_8p.sh", coco_mini, "--pth_path=" + weights, "--node_device=cpu",
              "--num_workers=0", NPROC=2)
    assert place.case("YOLACT_bs8_2p_eval")["TrainAccuracy"] == before
    place.run("train_eval_1p.sh", coco_mini, "--pth_path=" + weights, "--node_device=cpu",
              "--num_workers=0")
    assert place.case("YOLACT_bs8_1p_eval")["TrainAccuracy"] == before


def test_two_jobs_on_one_host_do_not_meet(place, coco_mini):
    """Other cards, other folders, another port, each found without being told."""
    commands = [["bash", "test/train_performance_8p.sh", str(coco_mini), "--batch_size=2",
                 "--max_iter=6", "--fps_start_iter=1", f"--device_id={first}"]
                + list(SMALL) for first in (10, 20)]
    jobs = [subprocess.Popen(command, cwd=str(place.root), stdout=subprocess.DEVNULL,
                             env=clean_environ(PYTHON=sys.executable, NPROC=1))
            for command in commands]
    assert [job.wait(300) for job in jobs] == [0, 0]
    for first in (10, 20):
        assert float(place.case("YOLACT_bs2_1p_perf", first)["ActualFPS"]) > 0


def test_fine_tuning_starts_from_the_weights_of_other_classes(place, trained, tmp_path):
    from data.shapes import write_dataset

    weights = re.search(r"^Final weights : (.*)$", place.output("train_0.log"), re.M).group(1)
    write_dataset(str(tmp_path / "shapes"), seed=1, train=8, val=4)
    place.run("train_finetune_1p.sh", tmp_path / "shapes", "--pth_path=" + weights,
              "--batch_size=2", "--max_iter=4", "--fps_start_iter=1",
              "--save_folder=tuned", *SMALL)
    assert "TrainAccuracy" in place.case("YOLACT_bs2_1p_acc")
