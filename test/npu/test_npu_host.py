"""What a user meets on an Ascend host where something is wrong: one sentence, exit code 2."""

from __future__ import annotations

import os
import re
import shutil
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


def run(*command, without=(), cwd=ROOT, **env):
    environment = {key: value for key, value in os.environ.items() if key not in without}
    result = subprocess.run([sys.executable] + list(command), cwd=str(cwd), timeout=300,
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


@pytest.fixture
def emulated():
    if not counters.available():
        pytest.skip("a card that is in use can only be had on the emulator")


@pytest.mark.parametrize("program, held, meaning", [
    ("train", "0", "another process or container holds it; npu-smi info shows which"),
    ("eval", "0", "another process or container holds it; npu-smi info shows which"),
    ("train", "driver", "the driver failed (CANN's error 507899): another container may hold it")])
def test_a_card_in_use(program, held, meaning, tmp_path, emulated):
    """The exception is torch_npu's own, from the code and the text that CANN gives it."""
    write_dataset(str(tmp_path / "data"), seed=3, train=4, val=2)
    flags = {"train": ["--data={}".format(tmp_path / "data"), "--node_device=npu"],
             "eval": ["--trained_model=x.pth", "--val_data={}".format(tmp_path / "data"),
                      "--eval_device=npu"]}[program]
    here = tmp_path / "here"
    here.mkdir()
    result = run(str(ROOT / (program + ".py")), *flags, cwd=here, NPUEMU_BUSY=held)
    assert sentence_of(result).startswith(
        "error: Ascend NPU device 0 cannot be used: " + meaning)
    assert result.stderr.count("error: ") == 1 and not list(here.iterdir())


def test_one_of_two_cards_in_use_ends_both_ranks(tmp_path, emulated):
    write_dataset(str(tmp_path / "data"), seed=3, train=8, val=2)
    (tmp_path / "test").mkdir()
    for script in (ROOT / "test").glob("*.sh"):
        shutil.copy(str(script), str(tmp_path / "test"))
    for name in ("train.py", "utils"):
        os.symlink(str(ROOT / name), str(tmp_path / name))
    started = subprocess.run(
        ["bash", "test/train_performance_8p.sh", str(tmp_path / "data"), "--config=yolact_shapes",
         "--node_device=npu", "--num_workers=0", "--batch_size=2", "--max_iter=3"],
        cwd=str(tmp_path), timeout=300, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, env=dict(os.environ, NPROC="2", NPUEMU_BUSY="1",
                                          PYTHON=sys.executable))
    assert started.returncode == 2, started.stderr
    assert re.match(r"\[Error\] rank 1: exit code 2: error: Ascend NPU device 1 cannot be used: "
                    r"another process or container holds it; .*\n +rank 0: ended because another "
                    r"rank had failed", started.stderr), started.stderr
    assert not (tmp_path / "weights").exists()


TAKEN = f"{64 * 1024 - 200:d}"
"""MiB of the emulated card's 64 GiB; 200 are left."""


def shapes_flags(folder, *more):
    write_dataset(str(folder / "data"), seed=3, train=32, val=2)
    return ["train.py", "--data={}".format(folder / "data"), "--config=yolact_shapes",
            "--num_workers=0", "--max_iter=1", "--no_autoscale", "--no_log", "--no_run_folder",
            "--node_device=npu", "--save_folder={}".format(folder / "weights")] + list(more)


def test_a_card_whose_memory_another_process_has(tmp_path, emulated):
    flags = shapes_flags(tmp_path)
    sentence = sentence_of(run(*flags, "--batch_size=32", NPUEMU_TAKEN=TAKEN))
    assert re.match(r"error: out of memory on npu:0: this process had \d+ MiB, and may use \d+ MiB "
                    r"of 64.0 GiB, of which others hold 63.8 GiB; ", sentence), sentence
    advised = re.search(r"Use (--batch_size=\d+) (--accumulate=\d+), which keeps 32 images a step",
                        sentence)
    assert advised, sentence
    assert run(*flags, *advised.groups(), NPUEMU_TAKEN=TAKEN).returncode == 0


@pytest.mark.allocator
def test_the_automatic_batch_takes_what_is_free(tmp_path, emulated):
    flags = shapes_flags(tmp_path, "--batch_size=auto")
    result = run(*flags, NPUEMU_TAKEN=TAKEN)
    assert result.returncode == 0, result.stderr
    found = re.search(r"Batch size auto : (\d+) per card, by what fits: .*; \d+ MiB of free memory "
                      r"of npu:0 \(others hold 63.8 GiB of its "
                      r"64.0 GiB\) may be used", result.stdout)
    assert found and 1 <= int(found.group(1)) < 32, result.stdout


def test_an_untested_combination_is_one_line(tmp_path):
    """CANN 8.3 beside the plugin that the emulator is for; the run goes on."""
    if not counters.available():
        pytest.skip("this host has its own versions")
    info = tmp_path / "x86_64-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir()
    info.write_text("version=8.3.RC1\n")
    code = ("import os\nfrom utils.device import describe, select_device\n"
            f"device = select_device('npu')\nos.environ['ASCEND_TOOLKIT_HOME'] = '{tmp_path}'\n"
            "select_device('npu')\nprint(describe(device))")
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


@pytest.mark.allocator
def test_out_of_memory_advises_what_then_runs(tmp_path):
    """32 images of 160 px take 260 MiB, and this process may have 160 MiB."""
    write_dataset(str(tmp_path / "data"), seed=3, train=32, val=2)
    flags = ["--data={}".format(tmp_path / "data"), "--config=yolact_shapes", "--num_workers=0",
             "--max_iter=1", "--no_autoscale", "--no_log", "--no_run_folder", "--node_device=npu",
             "--save_folder={}".format(tmp_path / "weights")]
    sentence = sentence_of(run("-c", LIMITED, *flags, "--batch_size=32"))
    assert sentence.startswith("error: out of memory on npu:0: this process had ")
    advised = re.search(r"Use (--batch_size=\d+) (--accumulate=\d+), which keeps 32 images a step",
                        sentence)
    assert advised, sentence
    assert run("-c", LIMITED, *flags, *advised.groups()).returncode == 0
