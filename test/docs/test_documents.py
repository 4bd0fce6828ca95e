"""Every command of every document is run, or it is said what else runs it, or why nothing can."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from documents import ELSEWHERE, NOT_HERE, ROOT, blocks, commands, documents
from world import World, run

DOCUMENTS = documents()
pytestmark = pytest.mark.launch


@pytest.fixture(scope="session")
def world(tmp_path_factory, coco_mini):
    return World(tmp_path_factory.mktemp("documents") / "world", coco_mini)


@pytest.fixture
def place(world, tmp_path):
    return world.copy(tmp_path / "place")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_do_what_the_document_says(document, world, tmp_path):
    places, failures = {}, []
    for command in commands(document):
        if command.elsewhere or command.impossible:
            continue
        # What goes on with a training finds that of the world, not one of another command.
        name = command.text if "--resume" in command.text else command.section
        if name not in places:
            places[name] = world.copy(tmp_path / f"place {len(places)}")
        line = command.shrunk()
        for path, stand_in in (("/data/coco", "coco"), ("/data/mine", "mydata")):
            line = line.replace(path, f"'{places[name] / stand_in}'")
        code, output = run(line, places[name])
        if code not in command.exit_codes() or code and "\nerror: " in output:
            failures.append(f"{command.text}\n  as {line}\n  exit code {code}\n{output[-2000:]}")
    assert not failures, "\n\n".join(failures)


TRANSLATIONS = {"README.zh.md": "README.md", "docs/deploy.zh.md": "docs/deploy.md"}


@pytest.mark.parametrize("translation", sorted(TRANSLATIONS))
def test_translations_have_the_same_commands(translation):
    def texts(document):
        return [command.text for command in commands(document)]

    assert texts(translation) == texts(TRANSLATIONS[translation])


@pytest.mark.parametrize("document", [
    document for document in DOCUMENTS
    if blocks((ROOT / document).read_text(encoding="utf-8"), "python")])
def test_python_of_a_document_runs(document, place):
    parts = blocks((ROOT / document).read_text(encoding="utf-8"), "python")
    code = "\n".join(parts).replace("weights/yolact_base_54_800000.pth", "weights/last.pth")
    (place / "document.py").write_text(code)
    exit_code, output = run(f"'{sys.executable}' document.py", place)
    assert exit_code == 0, output


def test_lists_of_exceptions_name_nothing_that_is_gone():
    found = [command for document in DOCUMENTS for command in commands(document)]
    for start, path in ELSEWHERE.items():
        assert any(command.text.startswith(start) for command in found), start
        assert (ROOT / path).exists(), path
    everything = "\n".join((ROOT / document).read_text(encoding="utf-8")
                           for document in DOCUMENTS)
    for part in NOT_HERE:
        assert part in everything, part


def anchors(path):
    """Names that a link may have behind `#`, as the usual hosts make them of headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS + sorted(TRANSLATIONS))
def test_links_lead_somewhere(document):
    path = ROOT / document
    text = re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def test_a_command_that_fails_is_noticed(place):
    code, output = run("python eval.py --trained_model=latest --image=absent.jpg:out.png", place)
    assert code != 0, output
    shutil.rmtree(str(place / "weights"))
    assert run("python eval.py --trained_model=latest --val_data=coco", place)[0] == 2
