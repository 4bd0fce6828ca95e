"""test/infer_om.sh: ModelZoo's offline flow over stand-ins for ATC and ais_bench."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

import eval as evaluation
from data.shapes import main as write_shapes
from helpers.ais_bench_stand_in import install
from helpers.exports import require_onnx
from helpers.paths import ROOT
from helpers.prediction_weights import save_plus_weights, save_weights
from utils.cli import run_main
from utils.export.offline import main as offline

require_onnx()
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert write_shapes([str(folder), "--train=1", "--val=5"]) == 0
    return folder


CLASSES = ["circle", "square", "triangle", "star"], [1, 2, 3, 4]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"), *CLASSES)


def scores(text):
    return re.findall(r"(?m)^ *(box|mask) \| *([\d.]+)", text)


@pytest.fixture
def launch(tmp_path):
    """Run the launcher in a copy of the project's shape; returns the finished process."""
    place = tmp_path / "place"
    shutil.copytree(str(ROOT / "test"), str(place / "test"), ignore=lambda folder, names: [
        name for name in names if not name.endswith(".sh")])
    for name in ("data", "utils", "layers", "yolact.py", "backbone.py"):
        os.symlink(str(ROOT / name), str(place / name))
    variables = install(tmp_path / "ascend")
    env = dict(os.environ, PYTHON=sys.executable, ASCEND_DEVICE_ID="0",
               PYTHONPATH=variables["PYTHONPATH"],
               PATH=variables["PATH"] + os.pathsep + os.environ["PATH"])

    def run(*arguments):
        done = subprocess.run(["bash", str(place / "test" / "infer_om.sh"), *map(str, arguments)],
                              env=env, cwd=str(tmp_path), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=300)
        return done, place / "test" / "output" / "0"
    return run


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_flow_scores_as_eval_does(batch_size, launch, data, weights, capsys):
    done, output = launch(data, f"--pth_path={weights}", f"--batch_size={batch_size}")
    assert done.returncode == 0, done.stdout
    assert evaluation.main([f"--trained_model={weights}", f"--val_data={data}",
                            "--eval_device=cpu", "--num_workers=0", "--per_class_file="]) == 0
    expected = scores(capsys.readouterr().out)
    assert len(expected) == 2 and scores((output / "score.log").read_text()) == expected
    box, mask = (value for _, value in expected)
    assert re.search("------------------ Final result ------------------\n"
                     "Final Performance images/sec : 163.4\n"
                     f"Final Accuracy : box mAP: +{box} , mask mAP: +{mask} \n", done.stdout)
    logs = [str(output / name) for name in (f"YOLACT_bs{batch_size}_1p_infer.log", "score.log")]
    check = subprocess.run([sys.executable, str(ROOT / "test" / "check_baseline.py"), *logs,
                            "--baseline=om_310p_bs1"], stdout=subprocess.PIPE,
                           universal_newlines=True)
    assert check.returncode == 2  # another run than the published one, and it says in what
    assert re.search(f"box mAP +32.07 +0.30 +{box}  below", check.stdout)
    assert re.search(r"FPS +163.40 +3.30 +163.40  ok", check.stdout)
    assert "config is yolact_shapes, published is yolact_base; " in check.stdout
    assert ("batch is 2, published is 1" in check.stdout) == (batch_size == 2)
    case = (output / f"YOLACT_bs{batch_size}_1p_infer.log").read_text().splitlines()
    assert case[0] == "Network = YOLACT" and len(case) == 5


def test_yolact_plus_has_its_own_name(launch, data, tmp_path, capsys):
    weights = save_plus_weights(tmp_path / "weights", *CLASSES)
    done, output = launch(data, f"--pth_path={weights}")
    assert done.returncode == 0, done.stdout
    assert evaluation.main([f"--trained_model={weights}", f"--val_data={data}",
                            "--eval_device=cpu", "--num_workers=0", "--per_class_file="]) == 0
    expected = scores(capsys.readouterr().out)
    assert len(expected) == 2 and scores((output / "score.log").read_text()) == expected
    case = (output / "YOLACT-plus_bs1_1p_infer.log").read_text().splitlines()
    assert case[0] == "Network = YOLACT-plus" and "CaseName = YOLACT-plus_bs1_1p_infer" in case


def test_a_step_that_fails_ends_the_flow(launch, data, tmp_path):
    done, output = launch(data, f"--pth_path={tmp_path / 'absent.pth'}")
    assert done.returncode == 2 and "[Error] export ended with exit code 2" in done.stdout
    assert "no weights file" in done.stdout and not (output / "bin").exists()
    done, _ = launch(data)
    assert done.returncode == 1 and 'para "pth_path" must be confing' in done.stdout


def test_without_atc_the_flow_ends_and_says_so(launch, data, weights, tmp_path):
    (tmp_path / "ascend" / "atc").unlink()
    done, output = launch(data, f"--pth_path={weights}")
    assert done.returncode == 2 and not (output / "bin").exists()
    assert "ATC is not installed here. Where CANN is: source " in done.stdout
    assert re.search(r"\[Error\] ATC made no .*/export/model_310P3.om; see ", done.stdout)


@pytest.mark.parametrize("arguments, sentence", [
    (["preprocess", "{weights}"], "is no exported model"),
    (["score", "{folder}", "--results={folder}"], "_0.bin, the result of image"),
    (["rate", "{folder}"], "step is 'rate', expected one of preprocess, score"),
])
def test_bad_input(arguments, sentence, weights, data, tmp_path, capsys):
    from helpers.exports import export

    folder = export(weights, tmp_path / "out")
    words = [word.format(weights=weights, folder=folder) for word in arguments]
    assert run_main(offline, [*words, f"--val_data={data}", f"--out={tmp_path / 'bin'}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
