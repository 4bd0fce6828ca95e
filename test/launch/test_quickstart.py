"""The quickstart: its order, what it uses again, how it fails; over a stand-in for Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT

SCRIPTS = ("common.sh", "env_npu.sh", "quickstart.sh")
LINE = ("[  0]      10 || B: 1.000 | C: 1.000 | M: 1.000 | S: 1.000 | T: 4.000 || ETA: 0:00:00 || "
        "timer: 0.100 || fps: 80.000 || avg_fps: 81.250 || GPU: 0")
STUB = r"""#!/bin/bash
[[ $1 == -u ]] && shift
echo "$*" >> "$STUB_FOLDER/calls"
case $1 in
    train.py)
        for flag in "$@"; do
            case $flag in
                --save_folder=*) folder=${flag#*=} ;;
            esac
        done
        mkdir -p "$folder"
        if [[ -n ${STUB_FAILS:-} ]]; then
            touch "$folder/yolact_shapes_0_5_interrupt.pth"
            echo "error: no memory"
            exit 3
        fi
        touch "$folder/yolact_shapes_0_10.pth"
        echo "device cpu (stand-in)"
        echo "Schedule     : 10 iterations (1.0 epoch), 10 to an epoch"
        echo "$STUB_LINE"
        echo "$STUB_LINE"
        echo "Final weights : ${folder}yolact_shapes_0_10.pth"
        ;;
    eval.py)
        echo "   box | 61.25 | 80.00 |"
        echo "  mask | 55.50 | 78.00 |"
        ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path):
    root = tmp_path / "my project"
    (root / "test").mkdir(parents=True)
    (root / "data").mkdir()
    for name in ("config.py", "shapes.py"):
        (root / "data" / name).write_text("")
    for name in SCRIPTS:
        shutil.copy(str(ROOT / "test" / name), str(root / "test" / name))
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def environment(**env):
        return dict(dict(os.environ, PYTHON=str(stub), STUB_FOLDER=str(tmp_path), STUB_LINE=LINE),
                    **env)

    def run(*arguments, **env):
        calls = tmp_path / "calls"
        if calls.exists():
            calls.unlink()
        done = subprocess.run(["bash", "test/quickstart.sh"] + list(arguments), cwd=str(root),
                              env=environment(**env), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
        done.calls = calls.read_text().splitlines() if calls.exists() else []
        return done

    run.root, run.env = root, environment
    return run


def test_one_command_does_everything_and_says_where_it_is(quickstart):
    done = quickstart("--venv", "none", "--seed=3", "--max_iter", "10")
    assert done.returncode == 0, done.stderr
    programs = [call.split()[0] for call in done.calls]
    assert programs == ["-c", "-m", "train.py", "eval.py",
                        str(quickstart.root).split()[0]]  # the picture, by its full path
    train = done.calls[2]
    folder = quickstart.root / "test" / "quickstart"
    for flag in ("--config=yolact_shapes", "--backbone_weights=none", "--seed=3", "--max_iter=10",
                 "--node_device=auto", f"--data={folder}/shapes",
                 f"--save_folder={folder}/seed_3_iterations_10/weights/"):
        assert flag in train
    assert train.rindex("--seed=3") > train.rindex("--seed=1234")
    card = done.stdout[done.stdout.index("YOLACT has been trained"):]
    for text in ("device cpu (stand-in)", "10 iterations of yolact_shapes, seed 3, in 0 min ",
                 "81.250 images/s", "box mAP     61.25 ", "mask mAP    55.50\n",
                 "test/quickstart/seed_3_iterations_10/weights/yolact_shapes_0_10.pth",
                 "ground_truth_and_prediction.png"):
        assert text in card


def test_lines_of_the_training_are_summed_up(quickstart):
    shown = "iteration 10 of 10, 0:00:00 left, loss 4.000\n"
    done = quickstart("--venv=none", "--max_iter=10")
    assert done.stdout.count(shown) == 1 and LINE not in done.stdout
    log = quickstart.root / "test" / "quickstart" / "seed_0_iterations_10" / "train.log"
    assert log.read_text().count(LINE) == 2


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script, a terminal")
def test_a_terminal_has_a_bar(quickstart):
    shell = "script -qec 'bash test/quickstart.sh --venv=none --max_iter=10' /dev/null"
    done = subprocess.run(shell, shell=True, cwd=str(quickstart.root), env=quickstart.env(),
                          stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60)
    assert (f"\r[{'=' * 30}] 10 / 10  0:00:00 left, loss 4.000\x1b[K" in done.stdout.decode())


def paste(card, quickstart, folder):
    """Run the closing text's commands in a new shell that has nothing on its PATH of ours."""
    lines = [line[2:] for line in card[card.index("What to type next"):].splitlines()[1:-1]]
    done = subprocess.run(["bash", "-ec", "\n".join(
        line for line in lines if "test/train_full_1p.sh" not in line)], cwd=str(folder),
        env=quickstart.env(PYTHON=""), stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    score, about = (folder / "calls").read_text().splitlines()[-2:]
    assert score.startswith("eval.py --trained_model=test/quickstart/seed_0/weights/")
    assert about == "train.py --help"


def test_what_to_type_next_works_in_a_new_shell(quickstart, tmp_path):
    card = quickstart("--venv=none").stdout
    paste(card, quickstart, tmp_path)
    assert f"PYTHON={tmp_path}/python bash test/train_full_1p.sh" in card


def test_the_closing_text_activates_the_environment(quickstart, tmp_path):
    venv, requirements = quickstart.root / ".venv", quickstart.root / "requirements.txt"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(str(tmp_path / "python"), str(venv / "bin" / "python"))
    (venv / "bin" / "activate").write_text(f"PATH='{venv}/bin':$PATH\n")
    shutil.copy(str(ROOT / "requirements.txt"), str(requirements))
    with requirements.open() as stream:
        stamp = subprocess.check_output(["cksum"], stdin=stream)
    (venv / "quickstart-stamp").write_bytes(stamp)
    done = quickstart(PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    paste(done.stdout, quickstart, tmp_path)
    assert "\n  bash test/train_full_1p.sh" in done.stdout


def test_a_second_run_trains_no_more(quickstart):
    first = quickstart("--venv=none")
    second = quickstart("--venv=none")
    assert second.returncode == 0
    assert "already trained" in second.stdout
    assert not any(call.startswith("train.py") for call in second.calls)
    assert first.stdout[first.stdout.index("YOLACT has"):] == (
        second.stdout[second.stdout.index("YOLACT has"):])
    (quickstart.root / "data" / "config.py").write_text("changed")
    assert any(call.startswith("train.py") for call in quickstart("--venv=none").calls)


def test_a_failed_training_fails_and_a_stopped_one_goes_on(quickstart):
    failed = quickstart("--venv=none", STUB_FAILS="1")
    assert failed.returncode == 3
    assert "train.py ended with exit code 3" in failed.stderr and "no memory" in failed.stderr
    assert not any(call.startswith("eval.py") for call in failed.calls)
    resumed = quickstart("--venv=none")
    assert resumed.returncode == 0
    assert "--resume=interrupt" in [call for call in resumed.calls if "train.py" in call][0]
    assert ", in 0 min" not in resumed.stdout


@pytest.mark.parametrize("arguments, sentence", [
    (["--sed", "3"], "unknown argument '--sed'"),
    (["--seed"], "--seed needs a value"),
    (["--seed=-1"], "--seed is '-1'"),
    (["--max_iter=0"], "--max_iter is '0'"),
])
def test_mistakes_are_one_sentence(quickstart, arguments, sentence):
    done = quickstart(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.calls == []


def test_a_python_that_cannot_be_used_is_named(quickstart):
    done = quickstart(PYTHON="/no/such/python")
    assert done.returncode == 2
    assert "/no/such/python" in done.stderr and "ensurepip" in done.stderr
