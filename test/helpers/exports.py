"""Exported folders, for tests; those that need ONNX skip where it is not installed."""

from __future__ import annotations

import pytest

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
