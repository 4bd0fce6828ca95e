"""docs/architecture.md names files and functions that are there."""

from __future__ import annotations

import ast
import re

import pytest

from helpers.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?::(\w+))?`", PAGE)))
FOLDERS = sorted(set(re.findall(r"`([\w/]+/)`", PAGE)))


def test_the_page_answers_twenty_questions():
    questions = re.findall(r"^\| ([^|]+\?) \| ", PAGE, re.M)
    assert len(set(questions)) == 20


@pytest.mark.parametrize("path, name", NAMED)
def test_a_named_place_is_there(path, name):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    if name:
        assert name in {node.name for node in tree.body
                        if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_named_folder_is_there(folder):
    assert (ROOT / folder).is_dir()
