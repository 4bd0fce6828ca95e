"""Trainings that go on: what --resume means, and whose files are whose."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

import train
from data.shapes import write_dataset
from helpers.ranks import run_ranks
from utils.checkpoint import load_state

STEPS = 8


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=3, train=8, val=1)
    return folder


@pytest.fixture
def flags(shapes, tmp_path, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLACT_RUNS", "runs")
    return [f"--data={shapes}", "--config=yolact_shapes", "--batch_size=2", "--no_autoscale",
            "--num_workers=0", f"--max_iter={STEPS}", "--no_log", "--save_interval=100",
            "--set", "schedule=step", "--set", "lr_steps=",
            "--node_device={}".format(request.config.getoption("--device"))]


@pytest.fixture
def stopped_at(monkeypatch):
    """Sends SIGTERM to this process in a step of the next training."""
    real = train.train_step

    def stop_at(number):
        steps = []

        def step(*arguments, **more):
            steps.append(None)
            if len(steps) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments, **more)

        monkeypatch.setattr(train, "train_step", step)

    yield stop_at


def weights(path):
    return torch.load(path)


def assert_equal(left, right):
    assert list(left) == list(right)
    for key in left:
        assert torch.equal(left[key], right[key]), key


def test_resume_alone_needs_no_other_flag(flags, stopped_at, capsys):
    assert train.main(flags + ["--save_folder=whole", "--name=whole"]) == 0
    stopped_at(3)
    assert train.main(flags) == 130
    stopped_at(0)
    out = capsys.readouterr().out
    assert "train.py --resume=runs/yolact_shapes\n" in out  # the command to paste
    assert train.main(["--resume"]) == 0
    out = capsys.readouterr().out
    assert "Resumed : weights/yolact_shapes_0_3_interrupt.pth at iteration 3" in out
    assert "Run folder : runs/yolact_shapes\n" in out
    assert_equal(weights("weights/yolact_shapes_2_8.pth"), weights("whole/yolact_shapes_2_8.pth"))
    assert train.main(["--resume"]) == 2
    assert "no unfinished training" in capsys.readouterr().err


def test_a_finished_run_is_trained_longer_as_if_it_had_been_asked_for(flags, capsys):
    """A constant rate: with it, the longer training is the same up to where the shorter ends."""
    assert train.main(flags + ["--save_folder=whole", "--max_iter=12", "--no_run_folder"]) == 0
    assert train.main(flags + ["--num_workers=1"]) == 0
    capsys.readouterr()
    assert train.main(["--resume=runs/yolact_shapes", "--max_iter=12", "--num_workers=0",
                       "--set=nms_top_k=300"]) == 0
    out = capsys.readouterr().out
    assert "Changed : max_iter from 8 to 12" in out
    assert "Changed : nms_top_k from 200 to 300; scores before and after are not comparable" in out
    assert_equal(weights("weights/yolact_shapes_3_12.pth"), weights("whole/yolact_shapes_3_12.pth"))
    # The run folder has the new length: what goes on again has it, too.
    assert train.main(["--resume=runs/yolact_shapes"]) == 0
    assert "Changed" not in capsys.readouterr().out


def test_a_run_folder_that_was_moved_is_gone_on_with(flags, stopped_at):
    stopped_at(3)
    assert train.main(flags) == 130
    stopped_at(0)
    os.rename("runs/yolact_shapes", "moved")
    assert train.main(["--resume=moved", "--max_iter=4"]) == 0
    assert not os.listdir("runs")
    with open("moved/results.csv", encoding="utf-8") as stream:
        assert len(stream.read().splitlines()) == 2
    assert os.path.samefile("weights/yolact_shapes_1_4.pth", "moved/weights/last.pth")


def test_a_run_folder_without_a_state_starts_nothing_afresh(flags, capsys):
    """A kill in the middle of keeping weights leaves it so."""
    assert train.main(flags + ["--max_iter=1"]) == 0
    os.unlink("runs/yolact_shapes/weights/last.state")
    assert train.main(["--resume=runs/yolact_shapes", "--max_iter=2"]) == 2
    assert "has no weights/last.state to go on from" in capsys.readouterr().err
    assert os.listdir("runs") == ["yolact_shapes"]


def test_what_may_not_change_is_refused_with_what_helps(flags, capsys):
    assert train.main(flags + ["--max_iter=1"]) == 0
    for other in ("--set=fpn_features=32", "--batch_size=4", "--seed=7"):
        assert train.main(["--resume=runs/yolact_shapes", "--max_iter=2", other]) == 2
        error = capsys.readouterr().err
        assert "cannot resume 'runs/yolact_shapes/weights/last.pth'" in error
        assert "--weights=runs/yolact_shapes/weights/last.pth" in error


def test_a_second_training_replaces_nothing_of_the_first(flags, capsys):
    assert train.main(flags + ["--max_iter=1"]) == 0
    first = weights("weights/yolact_shapes_0_1.pth")
    assert train.main(flags + ["--max_iter=1", "--seed=5"]) == 0
    out = capsys.readouterr().out
    assert ("'weights/' has files of another training with this configuration; none is replaced, "
            "this one writes to 'weights/yolact_shapes-2'") in out
    assert "Final weights : weights/yolact_shapes-2/yolact_shapes_0_1.pth" in out
    assert_equal(weights("weights/yolact_shapes_0_1.pth"), first)
    ids = [load_state(f"{folder}/yolact_shapes_0_1.pth")["training"]
           for folder in ("weights", "weights/yolact_shapes-2")]
    assert ids[0] != ids[1]
    # Each goes on in its own place.
    for run, place in (("yolact_shapes", "weights/"), ("yolact_shapes-2", "weights/yolact_shapes-2")
                       ):
        assert train.main([f"--resume=runs/{run}", "--max_iter=2"]) == 0
        out = capsys.readouterr().out
        assert f"Final weights : {os.path.join(place, 'yolact_shapes_0_2.pth')}" in out.replace(
            "//", "/")


def test_resume_without_a_run_folder_says_what_to_do(flags, stopped_at, capsys):
    stopped_at(2)
    assert train.main(flags + ["--no_run_folder"]) == 130
    assert train.main(["--resume"]) == 2
    assert "repeat its flags with --resume=weights/" in capsys.readouterr().err
    assert train.main(["--resume=weights"]) == 2
    assert "a folder without weights/last.pth" in capsys.readouterr().err


def test_an_empty_resume_is_none(flags):
    assert train.main(flags + ["--resume=", "--max_iter=1"]) == 0


def test_a_training_in_a_thread_of_a_notebook(flags):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main(flags + ["--max_iter=1"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_processes_that_would_go_on_from_different_files_do_not(shapes, tmp_path):
    """Two hosts that do not share a folder: here, a folder for each rank."""
    given = [f"--data={shapes}", "--config=yolact_shapes", "--node_device=cpu", "--num_workers=0",
             "--no_autoscale", "--no_log", "--project=runs", "--batch_size=2"]
    at_home = ("import os, sys; os.chdir('host' + os.environ['RANK'])\n"
               "import train; sys.exit(train.main(sys.argv[1:]))")
    for rank, steps in ((0, 2), (1, 1)):
        (tmp_path / f"host{rank}").mkdir()
        codes, _ = run_ranks(1, at_home, given + [f"--max_iter={steps}"], tmp_path, RANK=rank)
        assert codes == [0]
    codes, texts = run_ranks(2, at_home, given + ["--max_iter=3", "--resume=latest"], tmp_path)
    assert codes == [2, 2]
    for text in texts:
        assert "rank 0 would go on from 'weights/yolact_shapes_0_2.pth'" in text
        assert "rank 1 from 'weights/yolact_shapes_0_1.pth'" in text


def test_later_weights_without_a_state_are_said(flags, capsys):
    flags = flags + ["--save_interval=4"]
    assert train.main(flags) == 0
    os.unlink("weights/yolact_shapes_2_8.state")
    assert train.main(flags + ["--resume=latest"]) == 0
    out = capsys.readouterr().out
    assert "Note: left out, for there is no .state beside: yolact_shapes_2_8.pth" in out
    assert "yolact_shapes_1_4.pth at iteration 4" in out
