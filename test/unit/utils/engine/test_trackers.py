"""MLflow and Weights & Biases: the real packages, without a server."""

from __future__ import annotations

import sys
import time

import pytest

from utils.engine.record import RunRecord
from utils.engine.trackers import TRACKERS, Tracker, open_tracker, require_tracker
from utils.errors import UserError

TRAIN = dict(iteration=10, epoch=0, lr=0.1, losses={"B": 1.5}, total=1.5, skipped=0, seconds=0.5,
             data_seconds=0.1, fps=4.0, avg_fps=5.0, memory=2 ** 20, loss_scale=None)
SCORES = dict(images=4, box={"AP": 0.5, "AP75": None}, mask={"AP": 0.25, "AP75": 0.2})


def record_sessions(name, folder):
    """A training that was stopped after iteration 20 and goes on from 10."""
    for iterations in ((10, 20), (20, 30)):
        tracker = open_tracker(name, "a1b2-c3", "shapes", {"lr": 0.1, "sides": (160,)}, str(folder))
        record = RunRecord(tracker=tracker)
        for iteration in iterations:
            record.write("train", **dict(TRAIN, iteration=iteration, total=float(iteration)))
        record.write("val", iteration=iterations[-1], epoch=1, **SCORES)
        record.finish()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--track={name} needs the package {name}"):
        require_tracker(name)


def test_mlflow_goes_on_in_the_run_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    record_sessions("mlflow", tmp_path)
    run, = mlflow.search_runs(output_format="list")
    assert run.info.run_name == "shapes" and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "sides": "(160,)"}
    found = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/total")
    assert sorted((metric.step, metric.value) for metric in found) == [  # sent in any order
        (10, 10.0), (20, 20.0), (20, 20.0), (30, 30.0)]
    assert run.data.metrics["val/mask.AP"] == 0.25 and "val/box.AP75" not in run.data.metrics


def test_mlflow_without_its_server_is_one_sentence(monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.raises(UserError, match="^--track=mlflow: .*127.0.0.1"):
        open_tracker("mlflow", "a", "a", {})


def test_wandb_goes_on_in_the_run_of_the_training(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    record_sessions("wandb", tmp_path)
    paths = list(tmp_path.glob("wandb/offline-run-*/run-a1b2-c3.wandb"))
    assert len(paths) == 2
    for path in paths:
        deadline = time.monotonic() + 60  # another process of the package writes it, in its time
        while b"val/mask.AP" not in path.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)
        data = path.read_bytes()
        assert b"train/losses.B" in data and b"val/mask.AP" in data and b"val/box.AP75" not in data


def test_a_tracker_that_fails_is_said_once_and_left_out(capsys):
    class Failing(Tracker):
        name = "the tracker"

        def log(self, numbers, iteration):
            raise KeyError("lost connection")

        def close(self):
            raise KeyError("lost connection")

    record = RunRecord(tracker=Failing())
    for iteration in (10, 20):
        record.write("train", **dict(TRAIN, iteration=iteration))
    assert record.finish() == []
    assert capsys.readouterr().out == (
        "Warning: the tracker cannot be written ('lost connection'); the training goes on\n")
