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


TRANSLATIONS = {"README.zh.md": "README.md"}
TRANSLATIONS.update({f"docs/zh/{path.name}": f"docs/{path.name}"
                     for path in sorted((ROOT / "docs" / "zh").glob("*.md"))})
FIELDS = re.compile(r"(?s)<!-- fields: begin -->.*<!-- fields: end -->")
"""A table of sentences of the code, which only the English page has."""

MONTH = "\u6708"
"""Behind the number that Chinese has for a month's name."""


def not_translated(document):
    """What both languages of a page have to share: code, tables' numbers and names, links."""
    text = FIELDS.sub("", (ROOT / document).read_text(encoding="utf-8"))
    code = [re.sub(r"\s+# .*", "", part) for language in ("text", "yaml", "python")
            for part in blocks(text, language)]
    rows = [sorted(re.findall(rf"`[^`]+`|\d+(?:[.,]\d+)*(?![\d ]*{MONTH})", row))
            for row in re.findall(r"(?m)^\|.*", text)]
    # A page and its translation count as one, and a link from one to the other as none.
    links = [str(other.relative_to(ROOT)) for _, other, _ in local_links(document)]
    links = [TRANSLATIONS.get(link, link) for link in links
             if {link, document} not in [set(pair) for pair in TRANSLATIONS.items()]]
    return {"commands": [command.text for command in commands(document)], "code": code,
            "rows": rows, "links": sorted(links)}


@pytest.mark.parametrize("translation", sorted(TRANSLATIONS))
def test_a_translation_says_the_same(translation):
    original = not_translated(TRANSLATIONS[translation])
    for name, found in not_translated(translation).items():
        assert found == original[name], name


@pytest.mark.parametrize("translation", sorted(TRANSLATIONS))
def test_links_of_a_translation_stay_in_its_language(translation):
    linked = {str(other.relative_to(ROOT)) for _, other, _ in local_links(translation)}
    original = TRANSLATIONS[translation]
    assert original in linked
    assert not (linked - {original}) & set(TRANSLATIONS.values())
    assert translation in {str(other.relative_to(ROOT)) for _, other, _ in local_links(original)}


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


def local_links(document):
    """Target as it is written, the file that it names, and the part behind `#`, of each link."""
    path = ROOT / document
    text = re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match(r"https?:", target):
            name, _, anchor = target.partition("#")
            yield target, (path.parent / name).resolve() if name else path, anchor


@pytest.mark.parametrize("document", DOCUMENTS + sorted(TRANSLATIONS))
def test_links_lead_somewhere(document):
    for target, other, anchor in local_links(document):
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_a_command_that_fails_is_noticed(place):
    code, output = run("python eval.py --trained_model=latest --image=absent.jpg:out.png", place)
    assert code != 0, output
    shutil.rmtree(str(place / "weights"))
    assert run("python eval.py --trained_model=latest --val_data=coco", place)[0] == 2
