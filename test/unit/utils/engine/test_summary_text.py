"""What a training says before and after: the text, word for word."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from data.config import get_config
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.engine.saving import BestScore, SavePlan
from utils.engine.setup import Training, Validation
from utils.engine.summary import data_table, end_lines, next_lines, schedule_lines, without_flag
from utils.schedule import LearningRate


def make_training(left_out=0, interval=200, save_interval=500, asked=None, best=(), skipped=0,
                  early_stopping=0, world_size=1, **rate):
    """As the text sees it: 100 iterations an epoch, 80 validation images."""
    rate = dict(dict(max_iter=2000, lr_steps=(700, 1500, 2500), warmup_init=0.0001,
                     warmup_until=50, final_factor=0.01), **rate)
    schedule = LearningRate(0.001, **rate)
    val = SimpleNamespace(indices=range(80), dataset=dataset_of("val"))
    plan = SavePlan("mine", "weights/", save_interval)
    return Training(
        get_config("yolact_base").replace(max_iter=asked or schedule.max_iter,
                                          early_stopping=early_stopping),
        learner=None, sharing=Sharing(Processes(world_size=world_size), "cpu"), schedule=schedule,
        dataset=dataset_of("train"), loader=SimpleNamespace(epoch_size=100, left_out=left_out),
        validation=Validation(val, None, interval) if interval else None,
        records=SimpleNamespace(total_skipped=skipped), best=BestScore(*best),
        saver=SimpleNamespace(plan=plan, path=lambda done: f"weights/mine_{done}.pth"))


def dataset_of(name):
    return SimpleNamespace(images_dir=name, annotation_file=f"{name}.json",
                           image_path=lambda index: f"{name}/{index}.jpg")


START = """\
Data         : images  objects  classes  empty  crowds  dropped
  train      : 117266   849942       80   1021   10442        7
  val        :   5000    36335       80     48     446        0
Schedule     : 2000 iterations (20.0 epochs), 100 to an epoch
Learning rate: 0.0001 rising to 0.001 by iteration 50 (0.5 epochs), x 0.1 at iterations \
700 (7.0 epochs), 1500 (15.0 epochs)
Validation   : 80 images every 200 iterations (2.0 epochs)
Weights      : every 500 iterations (5.0 epochs) and at the end, in weights/"""


def test_iterations_that_the_batch_size_changes_are_explained():
    line = schedule_lines(make_training(asked=1000))[0]
    assert line == ("Schedule     : 2000 iterations (20.0 epochs), 100 to an epoch; 1000 scaled to "
                    "this batch size, --no_autoscale keeps 1000")


@pytest.mark.parametrize("left_out, words", [(1, "1 image"), (3, "3 images")])
def test_images_that_fill_no_iteration_are_counted(left_out, words):
    line = schedule_lines(make_training(left_out=left_out))[0]
    assert line.endswith(f"100 to an epoch, {words} left over for another")


def test_the_start_card():
    heads = ("images", "objects", "classes", "empty", "crowds", "dropped")
    lines = data_table([("train", dict(zip(heads, (117266, 849942, 80, 1021, 10442, 7)))),
                        ("val", dict(zip(heads, (5000, 36335, 80, 48, 446, 0))))])
    lines += schedule_lines(make_training())
    assert "\n".join(lines) == START


@pytest.mark.parametrize("changes, index, text", [
    (dict(schedule="cosine"), 1, "0.0001 rising to 0.001 by iteration 50 (0.5 epochs), then half a "
                                 "cosine to 1e-05"),
    (dict(warmup_until=0, lr_steps=()), 1, "0.001"),
    (dict(warmup_until=0, lr_steps=(100,)), 1, "0.001, x 0.1 at iteration 100 (1.0 epoch)"),
    (dict(max_iter=40), 1, "0.0001 rising towards 0.001, which iteration 50 would reach"),
    (dict(interval=0), 2, "none (--validation_epoch=1 for every epoch)"),
    (dict(interval=3000), 2, "none: the first would be at iteration 3000"),
    (dict(save_interval=1), 3, "every 1 iteration (0.0 epochs) and at the end, in weights/"),
])
def test_other_schedules(changes, index, text):
    assert schedule_lines(make_training(**changes))[index].split(": ", 1)[1] == text


END = """\
Done         : 2000 iterations (20.0 epochs); this session took 1:01:01, 25.4 images/s on average
Best mAP     : 29.62 (segmentation) at iteration 1800, runs/my run/weights/best.pth"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run with its best weights."""
    monkeypatch.chdir(tmp_path)
    best = tmp_path / "runs" / "my run" / "weights" / "best.pth"
    best.parent.mkdir(parents=True)
    best.write_bytes(b"")
    return "runs/my run"


def test_the_end_card(run):
    training = make_training(best=(0.29621, 0.3, 1800))
    assert "\n".join(end_lines(training, 2000, 3661.2, 25.4, run)) == END


def test_the_end_of_a_run_that_measured_nothing():
    assert end_lines(make_training(interval=0), 2000, 3, 0.0, None) == [
        "Done         : 2000 iterations (20.0 epochs); this session took 0:00:03, speed not "
        "measured (too few iterations)",
        "Best mAP     : not known: no validation (--validation_epoch)"]
    assert end_lines(make_training(), 10, 3, 0.0, None)[-1] == (
        "Best mAP     : not known: no validation came to its end")  # it was interrupted
    lines = end_lines(make_training(best=(None, None, 10)), 10, 3, 1.0, None)
    assert lines[1:] == [
        "Ended early  : by a signal",
        "Best mAP     : nothing to score (segmentation) at iteration 10, whose weights were not "
        "kept (--save_interval)"]


@pytest.mark.parametrize("since, words", [(1, "1 validation"), (3, "3 validations")])
def test_a_run_that_found_nothing_better(since, words):
    training = make_training(best=(0.5, 0.5, 10, since), early_stopping=since)
    assert end_lines(training, 700, 3, 1.0, None)[1] == (
        f"Ended early  : {words} in a row found nothing better (--early_stopping={since})")


@pytest.mark.parametrize("skipped, words", [(1, "1 update of 2000"), (4, "4 updates of 2000")])
def test_the_end_card_counts_the_updates_that_were_left_out(skipped, words):
    lines = end_lines(make_training(skipped=skipped), 2000, 3, 1.0, None)
    assert lines[1] == "Skipped      : " + words + ": the loss or a gradient was not finite"


def args_of(*flags, **values):
    return SimpleNamespace(train_performance=False, **dict(
        dict(cuda=True, node_device="auto", device_id=None, valid_images=None, valid_info=None,
             data=None, command_line=["python", "train.py", *flags]), **values))


def words_of(lines):
    """Titles, and the commands' words behind the interpreter."""
    assert lines[0].startswith("Next         : ")
    return dict(zip(lines[0][15:].split(", "), [line.split(" ", 3)[3] for line in lines[1:]]))


def test_commands_after_the_end(run):
    training = make_training(best=(0.3, 0.3, 1800))
    found = words_of(next_lines(args_of(), training, 2000, "weights/mine_2000.pth", run))
    assert list(found) == ["score", "draw an image", "train longer", "export"]
    assert found["score"].endswith("eval.py '--trained_model=runs/my run/weights/best.pth' "
                                   "--valid_images=train --valid_info=train.json")
    assert found["draw an image"].endswith("'--image=val/0.jpg:runs/my run/prediction.png' "
                                           "--score_threshold=0.3")
    assert found["train longer"].endswith("train.py '--resume=runs/my run' --max_iter=4000")
    assert found["export"].endswith(" -m utils.export 'runs/my run/weights/best.pth' "
                                    "'--out=runs/my run/export'")


def test_no_line_looks_like_one_that_programs_search_for():
    text = START + END
    assert not re.search(r"avg_fps:| T: |^ *(box|mask) *\||box|mask", text)


@pytest.mark.parametrize("more, done, run_folder, title, words", [
    ((), 70, None, "go on", "--lr=1 --resume=weights/last.pth"),
    ((), 2000, None, "train longer", "--lr=1 --resume=weights/last.pth --max_iter=4000"),
    ((0.5, 0.5, 60, 1), 70, None, "train on without early stopping",
     "--lr=1 --resume=weights/last.pth --early_stopping=0"),
])
def test_commands_that_train_on(more, done, run_folder, title, words):
    training = make_training(best=more, early_stopping=1)
    lines = next_lines(args_of("--lr=1", "--resume", "latest"), training, done,
                       "weights/last.pth", run_folder)
    assert words_of(lines)[title].endswith(f"train.py {words}")
    assert not next_lines(args_of(), training, done, None, None)


def test_flags_of_the_device_and_of_the_images_are_kept():
    args = args_of(node_device="npu", device_id=3, valid_images="v", valid_info="v.json")
    lines = next_lines(args, make_training(), 2000, "a.pth", None)
    assert lines[1].endswith("--trained_model=a.pth --eval_device=npu --device_id=3 "
                             "--valid_images=v --valid_info=v.json")
    assert "--eval_device=cpu" in next_lines(args_of(cuda=False), make_training(), 9, "a.pth",
                                             None)[1]


def test_a_training_of_several_processes_goes_on_in_as_many(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    training = make_training(world_size=4)
    line = next_lines(args_of(), training, 70, "a.pth", None)[-1]
    assert " -m torch.distributed." in line and "--nproc_per_node=4 " in line
    for name, value in dict(LOCAL_WORLD_SIZE=2, GROUP_RANK=1, MASTER_ADDR="one",
                            MASTER_PORT=29).items():
        monkeypatch.setenv(name, str(value))
    line = next_lines(args_of(), training, 70, "a.pth", None)[-1]
    assert ("--nproc_per_node=2 --nnodes=2 --node_rank=1 --master_addr=one --master_port=29 "
            in line)


@pytest.mark.parametrize("argv, kept", [
    (["--resume=latest", "--lr=1"], ["--lr=1"]),
    (["--resume", "latest", "--lr", "1"], ["--lr", "1"]),
    (["--lr=1", "--resume"], ["--lr=1"]), (["--resume", "--lr=1"], ["--lr=1"]),
    (["--resumed=1"], ["--resumed=1"]), ([], []),
])
def test_flags_are_taken_out_with_their_values(argv, kept):
    assert without_flag(argv, "--resume") == kept
