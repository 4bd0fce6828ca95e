"""Detections from a network; for programs: `from utils.inference import Predictor`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.inference.evaluator import CocoEvaluator
    from utils.inference.predictor import Predictor

__all__ = ["CocoEvaluator", "Predictor"]
_HOMES = {"CocoEvaluator": "utils.inference.evaluator", "Predictor": "utils.inference.predictor"}


def __getattr__(name: str) -> Any:
    """Import what programs take from here when they do (PEP 562): the flags need none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
