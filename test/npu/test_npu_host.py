"""What a user meets on an Ascend host where something is wrong: one sentence, exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from data.shapes import write_dataset
from npu import counters

pytestmark = pytest.mark.launch
TRAIN = ("train.py", "--data=/nowhere", "--node_device=npu")
EVAL = ("eval.py", "--trained_model=x.pth", "--val_data=/nowhere", "--eval_device=npu")


@pytest.fixture(autouse=True)
def only_on_an_npu(device):
    if device.type != "npu":
        pytest.skip("about an Ascend host; run with --device npu")


def run(*command, without=(), **env):
    environment = {key: value for key, value in os.environ.items() if key not in without}
    result = subprocess.run([sys.executable] + list(command), cwd=str(ROOT), timeout=300,
                            env=dict(environment, PYTHONPATH=str(ROOT), **env),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def sentence_of(result):
    assert result.returncode == 2, result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("command", [TRAIN, EVAL], ids=["train", "eval"])
def test_the_plugin_without_cann(command):
    """Whatever the variable says that lets PyTorch load the plugin by itself."""
    if not counters.available():
        pytest.skip("this host has CANN")
    for without in (("LD_LIBRARY_PATH",), ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")):
        sentence = sentence_of(run(*command, without=without))
        assert re.match(r"error: device 'npu' was asked for, but torch_npu is installed but "
                        r"unusable \(lib.*\.so: cannot open shared object file.*\); install CANN "
                        r"and source its set_env.sh", sentence)


@pytest.mark.parametrize("command", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_card_that_does_not_exist(command):
    assert re.match(r"error: Ascend NPU device 99 was asked for, but this host has \d+ \(numbered",
                    sentence_of(run(*command, "--device_id=99")))


@pytest.mark.parametrize("env", [{"RANK_ID": "1", "RANK_SIZE": "99"},
                                 {"RANK": "98", "WORLD_SIZE": "99", "LOCAL_RANK": "98"}])
def test_more_processes_than_cards(env):
    assert re.search(r"but (this|the) host has \d+ cards?", sentence_of(run(*TRAIN, **env)))


def test_an_untested_combination_is_one_line(tmp_path):
    """CANN 8.3 beside the plugin that the emulator is for; the run goes on."""
    if not counters.available():
        pytest.skip("this host has its own versions")
    info = tmp_path / "x86_64-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir()
    info.write_text("version=8.3.RC1\n")
    code = ("import os\nfrom utils.device import describe, select_device\n"
            "device = select_device('npu')\nos.environ['ASCEND_TOOLKIT_HOME'] = '{}'\n"
            "select_device('npu')\nprint(describe(device))".format(tmp_path))
    result = run("-c", code, without=("ASCEND_HOME_PATH",))
    assert "CANN 8.3.RC1, driver" in result.stdout
    assert re.search(r"warning: .*CANN 8.3.RC1, .*: not a combination that Ascend lists as "
                     r"supported; the nearest is torch \S+, torch_npu \S+, CANN \S+\n",
                     result.stderr)


LIMITED = """
import sys
from utils.device import select_device
import train, torch
device = select_device("npu")
total = torch.npu.mem_get_info(device)[1]
torch.npu.set_per_process_memory_fraction((160 << 20) / total, device)
sys.exit(train.main(sys.argv[1:]))
"""


def test_out_of_memory_advises_what_then_runs(tmp_path):
    """32 images of 160 px take 260 MiB, and this process may have 160 MiB."""
    write_dataset(str(tmp_path / "data"), seed=3, train=32, val=2)
    flags = ["--data={}".format(tmp_path / "data"), "--config=yolact_shapes", "--num_workers=0",
             "--max_iter=1", "--no_autoscale", "--no_log", "--no_run_folder", "--node_device=npu",
             "--save_folder={}".format(tmp_path / "weights")]
    sentence = sentence_of(run("-c", LIMITED, *flags, "--batch_size=32"))
    assert sentence.startswith("error: out of memory on npu:0: it has ")
    advised = re.search(r"Use (--batch_size=\d+) (--accumulate=\d+), which keeps 32 images a step",
                        sentence)
    assert advised, sentence
    assert run("-c", LIMITED, *flags, *advised.groups()).returncode == 0
