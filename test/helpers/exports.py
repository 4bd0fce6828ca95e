"""Exported folders, for tests; those that need ONNX skip where it is not installed."""

from __future__ import annotations

import pytest

from data.config import get_config
from helpers.deterministic import small_config, small_plus_config
from utils.cli import run_main
from utils.export.__main__ import main


def require_onnx():
    """The modules `onnx` and `onnxruntime`; the test skips without them."""
    return pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")


def export(weights, folder, *flags):
    """Export into `folder`; returns its path."""
    require_onnx()
    code = run_main(main, [str(weights), f"--out={folder}", *flags])
    assert code == 0
    return str(folder)


def small(name):
    """The configuration of a recipe with a small input."""
    if name == "yolact_shapes":
        return get_config(name, max_size=64)
    return small_plus_config(name) if "plus" in name else small_config(name)
