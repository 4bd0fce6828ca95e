"""The comparison with published results: verdicts, exit codes, XML, runs that do not compare."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from utils.engine.observer import format_line

LOSSES = {"B": 1.5, "C": 2.0, "M": 2.5, "S": 0.5}
BASE = dict(config="yolact_base", classes=80, input=550, images=117266, batch=8, cards=8,
            steps=100000, fps=25.4, rank=0, evaluated=5000, box="31.98", mask="29.62")


def write_log(folder, name="train_0.log", **changes):
    run = dict(BASE, **changes)
    lines = [
        "device npu:0",
        "{config}: {classes} classes, 52814776 parameters, input {input} x {input}".format(**run),
        "{images} images, batch {batch} x {cards} cards, 1832 iterations an epoch; iterations 0 to "
        "100000 (54.6 epochs), learning rate 0.008".format(**run),
        format_line(0, 10, LOSSES, 6.5, "1:00:00", 2.5, 60.0, 60.0, 0),
        format_line(54, run["steps"], LOSSES, 6.5, "0:00:00", 2.5, 25.6, run["fps"], run["rank"]),
        "yolact_base_54_100000.pth: {evaluated} images of instances_val2017.json".format(**run),
        "       |  all  |  .50  |", "-------+-------+-------+"]
    if run["box"] is not None:
        lines += ["   box | {} | 50.00 |".format(run["box"]),
                  "  mask | {} | 48.00 |".format(run["mask"])]
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def check(*arguments):
    command = [sys.executable, str(ROOT / "test" / "check_baseline.py")]
    return subprocess.run(command + [str(argument) for argument in arguments],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)


@pytest.mark.parametrize("changes, code, shown", [
    ({}, 0, "31.98"),
    ({"box": "31.70", "mask": "29.40", "fps": 25.0}, 0, "ok"),
    ({"box": "31.67"}, 1, "below"),
    ({"mask": "20.00"}, 1, "below"),
    ({"fps": 20.0}, 1, "below"),
    ({"box": None}, 2, "missing"),
    ({"box": "n/a  "}, 2, "missing"),
    ({"config": "yolact_resnet50"}, 2, "config is yolact_resnet50, published is yolact_base"),
    ({"steps": 2000}, 2, "iterations is 2000, published is 100000"),
    ({"cards": 4}, 2, "cards is 4, published is 8"),
    ({"batch": 2}, 2, "batch is 2"),
    ({"classes": 4}, 2, "classes is 4"),
    ({"evaluated": 80}, 2, "evaluated is 80, published is 5000"),
    ({"images": 140}, 2, "images is 140"),
])
def test_verdicts(tmp_path, changes, code, shown):
    done = check(write_log(tmp_path, **changes))
    assert done.returncode == code, done.stdout + done.stderr
    assert shown in done.stdout


def test_speed_is_read_from_the_lines_of_rank_0(tmp_path):
    done = check(write_log(tmp_path, rank=3, fps=1.0))
    assert done.returncode == 0 and "60.00" in done.stdout


def test_a_log_that_holds_nothing(tmp_path):
    path = tmp_path / "empty.log"
    path.write_text("")
    done = check(path)
    assert done.returncode == 2
    assert done.stdout.count("missing") == 3 and "the logs do not say its config" in done.stdout


def test_numbers_of_the_case_file_count_where_nothing_else_has_them(tmp_path):
    case = tmp_path / "YOLACT_bs8_8p_acc.log"
    case.write_text("RankSize = 8\nBatchSize = 8\nActualFPS = 30.000\n"
                    "TrainAccuracy = box mAP: 40.00 , mask mAP: 35.00 \n")
    done = check(case, "--any_run")
    assert done.returncode == 0, done.stdout
    assert "40.00" in done.stdout and "35.00" in done.stdout and "Not comparable" in done.stdout


def test_one_number_only(tmp_path):
    log = write_log(tmp_path, fps=10.0)
    assert check(log, "--only=box mAP", "--only=mask mAP").returncode == 0
    assert check(log, "--only=FPS").returncode == 1


def test_named_baselines(tmp_path):
    log = write_log(tmp_path, config="yolact_im700", input=700, evaluated=20288, mask="31.30")
    assert check(log, "--baseline=im700_test_dev").returncode == 0
    done = check(log, "--baseline=nothing")
    assert done.returncode == 2 and "known: full_8p" in done.stderr


def test_every_baseline_has_a_tolerance_for_each_value():
    for entry in json.loads((ROOT / "test" / "baseline.json").read_text()).values():
        assert set(entry["values"]) == set(entry["tolerance"])
        assert entry["title"] and entry["run"]["config"]


def test_junit_file(tmp_path):
    target = tmp_path / "result.xml"
    check(write_log(tmp_path, mask="20.00", steps=2000), "--junit", target)
    suite = ElementTree.parse(str(target)).getroot()
    assert suite.tag == "testsuite"
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "1", "1")
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {"comparable": ["error"], "box mAP": [], "mask mAP": ["failure"], "FPS": []}


def test_a_file_that_is_not_there():
    done = check("/nowhere/train_0.log")
    assert done.returncode == 2 and "/nowhere/train_0.log" in done.stderr
