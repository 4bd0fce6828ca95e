"""What a training says before and after: the text, word for word."""

from __future__ import annotations

import re

import pytest

from utils.engine.summary import (
    Plan,
    best_words,
    data_table,
    end_card,
    schedule_lines,
    without_flag,
)

PLAN = Plan(epoch_size=100, max_iter=2000, base_lr=0.001, schedule="step",
            lr_steps=(700, 1500, 2500), gamma=0.1, warmup_init=0.0001, warmup_until=50,
            final_lr=1e-5, save_interval=500, save_folder="weights/",
            validation_interval=200, validation_images=80)

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
    line = schedule_lines(PLAN._replace(unscaled_iter=1000))[0]
    assert line == ("Schedule     : 2000 iterations (20.0 epochs), 100 to an epoch; 1000 scaled to "
                    "this batch size, --no_autoscale keeps 1000")


@pytest.mark.parametrize("left_out, words", [(1, "1 image"), (3, "3 images")])
def test_images_that_fill_no_iteration_are_counted(left_out, words):
    line = schedule_lines(PLAN._replace(left_out=left_out))[0]
    assert line.endswith(f"100 to an epoch, {words} left over for another")


def test_the_start_card():
    heads = ("images", "objects", "classes", "empty", "crowds", "dropped")
    lines = data_table([("train", dict(zip(heads, (117266, 849942, 80, 1021, 10442, 7)))),
                        ("val", dict(zip(heads, (5000, 36335, 80, 48, 446, 0))))])
    lines += schedule_lines(PLAN)
    assert "\n".join(lines) == START


@pytest.mark.parametrize("changes, index, text", [
    (dict(schedule="cosine"), 1, "0.0001 rising to 0.001 by iteration 50 (0.5 epochs), then half a "
                                 "cosine to 1e-05"),
    (dict(warmup_until=0, lr_steps=()), 1, "0.001"),
    (dict(warmup_until=0, lr_steps=(100,)), 1, "0.001, x 0.1 at iteration 100 (1.0 epoch)"),
    (dict(max_iter=40), 1, "0.0001 rising towards 0.001, which iteration 50 would reach"),
    (dict(validation_interval=0), 2, "none (--validation_epoch=1 for every epoch)"),
    (dict(validation_interval=3000), 2, "none: the first would be at iteration 3000"),
    (dict(save_interval=1), 3, "every 1 iteration (0.0 epochs) and at the end, in weights/"),
])
def test_other_schedules(changes, index, text):
    assert schedule_lines(PLAN._replace(**changes))[index].split(": ", 1)[1] == text


END = """\
Done         : 2000 iterations (20.0 epochs); this session took 1:01:01, 25.4 images/s on average
Best mAP     : 29.62 (segmentation) at iteration 1800, runs/my run/weights/best.pth
Next         : score, draw
  python eval.py '--trained_model=runs/my run/weights/best.pth'
  python train.py '--data=/data/it'"'"'s'"""


def test_the_end_card():
    best = best_words(0.29621, 1800, "runs/my run/weights/best.pth")
    lines = end_card(2000, 20.0, 3661.2, 25.4, best, commands=[
        ("score", ["python", "eval.py", "--trained_model=runs/my run/weights/best.pth"]),
        ("draw", ["python", "train.py", "--data=/data/it's"])])
    assert "\n".join(lines) == END


def test_the_end_of_a_run_that_measured_nothing():
    assert end_card(10, 0.1, 3, 0.0) == [
        "Done         : 10 iterations (0.1 epochs); this session took 0:00:03, speed not measured "
        "(too few iterations)",
        "Best mAP     : not known: no validation (--validation_epoch)"]
    lines = end_card(10, 0.1, 3, 1.0, best_words(None, 10, None), why="by a signal")
    assert lines[1:] == [
        "Ended early  : by a signal",
        "Best mAP     : nothing to score (segmentation) at iteration 10, whose weights were not "
        "kept (--save_interval)"]


@pytest.mark.parametrize("skipped, words", [(1, "1 update of 10"), (4, "4 updates of 10")])
def test_the_end_card_counts_the_updates_that_were_left_out(skipped, words):
    lines = end_card(10, 0.1, 3, 1.0, skipped=skipped)
    assert lines[1] == "Skipped      : " + words + ": the loss or a gradient was not finite"


def test_no_line_looks_like_one_that_programs_search_for():
    text = START + END
    assert not re.search(r"avg_fps:| T: |^ *(box|mask) *\||box|mask", text)


@pytest.mark.parametrize("argv, kept", [
    (["--resume=latest", "--lr=1"], ["--lr=1"]),
    (["--resume", "latest", "--lr", "1"], ["--lr", "1"]),
    (["--lr=1", "--resume"], ["--lr=1"]), (["--resume", "--lr=1"], ["--lr=1"]),
    (["--resumed=1"], ["--resumed=1"]), ([], []),
])
def test_flags_are_taken_out_with_their_values(argv, kept):
    assert without_flag(argv, ("--resume",)) == kept
