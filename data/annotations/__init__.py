"""A COCO instances file, read, checked once and kept as flat arrays."""

from __future__ import annotations

from data.annotations.packed import Annotations, Category, load_annotations

__all__ = ["Annotations", "Category", "load_annotations"]
