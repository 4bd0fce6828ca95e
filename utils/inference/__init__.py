"""Detections from a network; for programs: `from utils.inference import Predictor`."""

from __future__ import annotations

from utils.inference.evaluator import CocoEvaluator
from utils.inference.predictor import Predictor

__all__ = ["CocoEvaluator", "Predictor"]
