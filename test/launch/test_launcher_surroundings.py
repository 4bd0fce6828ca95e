"""The launchers where people use them: other folders, odd numbers, two at once, tools missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import pytest

from helpers.launcher_place import TRAIN_LOG, Workplace, run_command
from helpers.paths import ROOT
from utils.engine import train_flags
from utils.inference import eval_flags


@pytest.fixture
def place(tmp_path):
    return Workplace(tmp_path)


def test_paths_of_flags_are_those_of_the_caller(place, tmp_path):
    mine = tmp_path / "my place"
    (mine / "old").mkdir(parents=True)
    (mine / "old" / "x.pth").touch()
    done = run_command(["bash", str(place.root / "test" / "train_full_1p.sh"), str(place.data),
                        "--save-folder=new", "--project", "runs", "--resume=old/x.pth",
                        "--weights=w/there.pth", "--log_folder=/logs", "--name=old"],
                       mine, place.env)
    assert done.returncode == 0, done.stderr
    assert place.arguments_of("train.py")[6:] == [
        f"--save_folder={mine}/new", "--project", f"{mine}/runs", f"--resume={mine}/old/x.pth",
        "--weights=w/there.pth", "--log_folder=/logs", "--name=old"]


def test_all_flags_that_name_files_are_known_to_the_launchers():
    """A new flag with a path is to be taken as the caller sees it, too."""
    text = (ROOT / "test" / "common.sh").read_text()
    function = text[text.index("flags_from_caller() {"):].split("\n}\n", 1)[0]
    known = set(re.findall(r"--\w+", function))
    of_launcher = {"--data", "--val_data", "--trained_model"}
    pairs = {"--image", "--images", "--video"}  # IN:OUT, for eval.py itself
    for build in (train_flags.train_parser, eval_flags.eval_parser):
        for action in build()._actions:
            flags = set(action.option_strings)
            if action.dest in ("save_folder", "log_folder") or re.search(
                    "FOLDER|FILE|JSON|CSV", str(action.metavar)):
                assert flags & (known | of_launcher | pairs), flags


def test_the_way_to_evaluate_again_can_be_pasted(place, tmp_path):
    place.write("eval.py.exit", "3")
    mine = tmp_path / "my place"
    (mine / "a b").mkdir(parents=True)
    first = run_command(["bash", str(place.root / "test" / "train_eval_1p.sh"), "a b",
                         "--pth_path=$(touch ran).pth"], mine, place.env)
    assert first.returncode == 3
    command = first.stderr.splitlines()[-1].split(": ", 1)[1]
    place.write("eval.py.exit", "0")
    again = run_command(["bash", "-c", command], tmp_path, place.env)
    assert again.returncode == 0, again.stderr
    assert place.arguments_of("eval.py")[:2] == ["--trained_model=$(touch ran).pth",
                                                 f"--val_data={mine}/a b"]
    assert not (tmp_path / "ran").exists() and not (mine / "ran").exists()


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_through_a_link_and_with_another_shell(place, tmp_path, shell):
    link = tmp_path / "train.sh"
    link.symlink_to(place.root / "test" / "train_performance_1p.sh")
    done = run_command([shell, str(link), str(place.data)], tmp_path, place.env)
    assert done.returncode == 0, done.stderr
    assert "CaseName" in place.output("YOLACT_bs8_1p_perf.log")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None,
                    reason="mounts a file system that is read-only")
def test_an_output_folder_that_is_read_only_is_said(place):
    folder = place.root / "test" / "output" / "0"
    folder.mkdir(parents=True)
    done = run_command(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec bash "$@"',
         str(folder), str(place.root / "test" / "train_performance_1p.sh"), str(place.data)],
        place.root, place.env)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        f"[Error] the folder {folder} cannot be written; the logs go there")


def test_numbers_with_leading_zeros(place):
    done = place.run("train_full_1p.sh", place.data, "--batch_size=08", ASCEND_DEVICE_ID="09")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("device id is 9\n") and done.stderr == ""
    assert "TrainingTime = 314.96\n" in place.output("YOLACT_bs8_1p_acc.log", device=9)


@pytest.mark.parametrize("value", ["0", "all", "a[$(touch ran)]"])
def test_the_launchers_for_one_card_do_not_read_nproc(place, value):
    done = place.run("train_full_1p.sh", place.data, NPROC=value)
    assert done.returncode == 0 and done.stderr == ""
    assert f"--num_workers={min(8, len(os.sched_getaffinity(0)))}" in place.arguments_of("train.py")
    assert not (place.root / "ran").exists()


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1e3", "99999999999", "a[$(touch ran)]"])
def test_a_number_of_cards_that_is_none(place, value):
    for name in ("ranks.sh", "train_full_8p.sh"):
        shutil.copy(str(ROOT / "test" / name), str(place.root / "test" / name))
    done = place.run("train_full_8p.sh", place.data, NPROC=value, RANK_SIZE="x")
    assert done.returncode == 1
    assert done.stdout.startswith(f"[Error] NPROC is '{value or 'x'}', expected a whole number")
    assert not (place.root / "ran").exists()
    assert not (place.root / "test" / "output").exists()


def test_a_second_launcher_leaves_the_first_its_output(place):
    place.write("train.py.endless", "")
    first = subprocess.Popen(place.command("train_full_1p.sh", place.data), cwd=str(place.root),
                             env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.time() + 30
        while not (place.stub / "started").exists():
            assert time.time() < deadline and first.poll() is None
            time.sleep(0.05)
        log = place.output("train_0.log")
        for script in ("train_performance_1p.sh", "train_eval_1p.sh"):
            second = place.run(script, place.data, "--pth_path=w.pth")
            assert second.returncode == 1
            assert "[Error] another launcher" in second.stdout and "--device_id" in second.stdout
        assert place.output("train_0.log") == log
        (place.stub / "train.py.endless").unlink()
        assert place.run("train_performance_1p.sh", place.data, "--device_id=1").returncode == 0
    finally:
        first.terminate()
        first.communicate(timeout=30)
    assert place.run("train_performance_1p.sh", place.data).returncode == 0


@pytest.mark.parametrize("missing", ["tail", "awk"])
def test_a_missing_tool_is_said_before_the_training(place, tmp_path, missing):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "rm", "mkdir", "date", "sed", "tail", "awk", "kill",
                 "cat", "flock", "nproc", "uname", "hostname", "realpath"):
        if name != missing and shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    done = place.run("train_full_1p.sh", place.data, PATH=str(tools))
    assert done.returncode == 1
    assert done.stdout == ("[Error] the launchers need these commands, which are not on PATH: "
                           + missing + "\n")
    assert not (place.stub / "train.py.args").exists()


@pytest.mark.parametrize("streams", ["| head -n 1", "> /dev/full 2>&1", ">&- 2>&-"])
def test_results_are_written_where_nobody_reads(place, streams):
    """The reader goes while it trains, or was never there."""
    place.write("train.py.log", TRAIN_LOG * 2000)  # more than a pipe holds
    command = f"bash test/train_full_1p.sh '{place.data}' {streams}"
    done = run_command(["bash", "-c", f"set -o pipefail; {command}"], place.root, place.env)
    assert done.returncode == 0, done.stderr
    assert "TrainAccuracy = box mAP: 31.98" in place.output("YOLACT_bs8_1p_acc.log")
