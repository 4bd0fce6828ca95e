"""What eval.py writes beside its scores: into files of its own."""

from __future__ import annotations

import pytest

import eval as evaluation
from data.shapes import main as write_shapes
from helpers.prediction_weights import save_weights
from utils.inference.eval_flags import parse_eval_flags


@pytest.mark.parametrize("flags, words", [
    (["--output_coco_json", "--bbox_det_file=a.json", "--mask_det_file=a.json"], "another result"),
    (["--output_coco_json", "--bbox_det_file={truth}"], "over what is read here"),
    (["--per_class_file={weights}"], "over what is read here"),
    (["--run_folder={truth}"], "cannot write"),
    (["--run_folder={data}"], "data' holds other files and is no run folder"),
])
def test_results_replace_neither_each_other_nor_what_is_read(tmp_path, capsys, monkeypatch, flags,
                                                             words):
    monkeypatch.chdir(tmp_path)
    data, weights = tmp_path / "data", save_weights(tmp_path / "weights")
    write_shapes([str(data), "--train=1", "--val=2"])
    truth = data / "annotations" / "instances_val2017.json"
    before = truth.read_bytes()
    capsys.readouterr()
    places = {"data": data, "truth": truth, "weights": weights}
    code = evaluation.main([f"--trained_model={weights}", f"--val_data={data}", "--num_workers=0",
                            "--eval_device=cpu", "--map_classes",
                            *(flag.format(**places) for flag in flags)])
    out, err = capsys.readouterr()
    assert code == 2 and words in err and err.count("\n") == 1 and "images/s" not in out
    assert truth.read_bytes() == before


def test_an_empty_run_folder_is_none():
    assert parse_eval_flags(["--run_folder="]).run_folder == "none"


@pytest.mark.parametrize("flags", [["--output_coco_json", "--mask_det_file=/dev/full"],
                                   ["--per_class_file=/dev/full"]])
def test_scores_are_said_although_the_disk_is_full(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    data, weights = tmp_path / "data", save_weights(tmp_path / "weights")
    write_shapes([str(data), "--train=1", "--val=2"])
    code = evaluation.main([f"--trained_model={weights}", f"--val_data={data}", "--num_workers=0",
                            "--eval_device=cpu", "--map_classes", *flags])
    out, err = capsys.readouterr()
    assert code == 2 and "  mask | " in out and "cannot write '/dev/full'" in err
