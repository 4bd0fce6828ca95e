"""A training of two processes writes one run folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from data.shapes import write_dataset
from helpers.paths import ROOT
from utils.run_folder import RunFolder

pytestmark = pytest.mark.launch


def test_only_the_main_process_writes(tmp_path, request):
    if request.config.getoption("--device") != "cpu":
        pytest.skip("two cards: test_launchers_ranks.py")
    write_dataset(str(tmp_path / "shapes"), seed=3, train=13, val=4)
    flags = ["--data=shapes", "--config=yolact_shapes", "--batch_size=2", "--no_autoscale",
             "--num_workers=0", "--max_iter=6", "--no_log", "--node_device=cpu",
             "--validation_epoch=1", "--project=runs"]
    port = f"29{os.getpid() % 1000:03d}"
    ranks = []
    for rank in range(2):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        ranks.append(subprocess.Popen(
            [sys.executable, str(ROOT / "train.py")] + flags, env=env, cwd=str(tmp_path),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True))
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert os.listdir(str(tmp_path / "runs")) == ["yolact_shapes"]
    assert "Run folder" in outputs[0] and "Run folder" not in outputs[1]
    rows = RunFolder(str(tmp_path / "runs" / "yolact_shapes"), "").results()
    assert [row["iteration"] for row in rows] == [3, 6]
    assert all(row["images_scored"] == 4 for row in rows)
