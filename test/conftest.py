"""Fixtures shared by all tests: the device under test, golden numbers, real COCO images."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device the tests run on: cpu, cuda or npu")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--device-only", action="store_true",
                     help="leave out unit and parity tests that do not look at --device: they do "
                          "the same everywhere, and the run on the CPU has them")


def pytest_configure(config):
    """Fail a run on the emulated NPU if anything was missing there."""
    if config.getoption("--device").startswith("npu"):
        from npu.refusals import Refusals
        from utils.device import select_device

        if not hasattr(config, "workerinput"):  # workers of pytest-xdist report to its main process
            config.pluginmanager.register(Refusals())
        select_device("npu")  # now: tests that put stand-ins in the plugin's place come later


def looks_at_the_device(item):
    """Whether a test asks for the fixture, or its file for the option; and all of test/npu."""
    return ("device" in item.fixturenames or "npu" in item.path.parts
            or '"--device"' in item.path.read_text(encoding="utf-8"))


def pytest_collection_modifyitems(config, items):
    """Leave out tests marked slow unless `--slow` or `-m` asks for them; see --device-only."""
    if config.getoption("--device-only"):
        dropped = [item for item in items if not looks_at_the_device(item)]
        items[:] = [item for item in items if looks_at_the_device(item)]
        config.hook.pytest_deselected(items=dropped)
    if os.environ.get("PYTORCH_NO_NPU_MEMORY_CACHING"):
        for item in items:
            if item.get_closest_marker("allocator"):
                item.add_marker(pytest.mark.skip(reason="PYTORCH_NO_NPU_MEMORY_CACHING turns the "
                                                        "allocator off"))
    if config.getoption("--slow") or config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard():
    """A shell starts background jobs with SIGINT ignored, and so would be what the tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def own_folders(tmp_path_factory):
    """What the data check remembers and runs without a place stay out of the user's folders, and
    gigabytes of them not longer than the tests of a file.
    """
    place = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.setenv("YOLACT_RUNS", str(place / "runs"))
        yield
    shutil.rmtree(str(place), ignore_errors=True)


@pytest.fixture(scope="session")
def device(request):
    from utils.device import select_device

    return select_device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def golden():
    """Load `test/golden/<name>.npz` as a dict of arrays."""

    def load(name):
        with np.load(str(ROOT / "test" / "golden" / (name + ".npz")), allow_pickle=False) as data:
            return {key: data[key] for key in data.files}

    return load


@pytest.fixture(scope="session")
def coco_mini():
    """Folder with real COCO images in COCO's layout; tests skip where it is not at hand."""
    folder = Path(os.environ.get("YOLACT_COCO_MINI", str(ROOT.parent / "shared" / "coco_mini")))
    if not (folder / "annotations").is_dir():
        pytest.skip("no COCO images: set YOLACT_COCO_MINI to a folder in COCO's layout")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folder with 13 drawn images to train with and 4 to score, in COCO's layout; not changed."""
    from data.shapes import write_dataset

    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=3, train=13, val=4)
    return folder
