"""The report opened from disk in a real browser, without a screen: Chromium, where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from helpers.report_files import POLICY, write_run
from utils.report import build_report

pytest.importorskip("jinja2")

CHROMIUM = next((path for path in map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")) if path), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]

# Added to a copy of the page: what the browser made of it, as text in the page.
PROBE = """<script>
window.addEventListener("load", function () {
  var found = {
    images: Array.from(document.images).map(function (image) { return image.naturalWidth; }),
    alts: Array.from(document.images).filter(function (image) { return !image.alt; }).length,
    fetched: performance.getEntriesByType("resource").map(function (entry) { return entry.name; }),
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    text: document.body.innerText.length,
    scripts: document.scripts.length,
    ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color
  };
  var element = document.createElement("pre");
  element.id = "probe";
  element.textContent = JSON.stringify(found);
  document.body.appendChild(element);
});
</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("browser") / "runs")
    build_report(folder)
    return folder.file("report.html")


def browse(path, user_data, *flags):
    """Run Chromium on a file; returns its standard output and the console's lines."""
    done = subprocess.run(
        [CHROMIUM] + FLAGS + [f"--user-data-dir={user_data}"] + list(flags)
        + ["file://" + path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    errors = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, errors
    return done.stdout.decode("utf-8"), [line for line in errors.splitlines() if "CONSOLE" in line]


def probe(page, tmp_path, *flags):
    """What the probe finds in a copy of the page that lets it run."""
    with open(page, encoding="utf-8") as stream:
        source = stream.read()
    assert source.count("</body>") == 1
    source = source.replace("</body>", PROBE).replace(POLICY, "script-src 'unsafe-inline'")
    copy = tmp_path / "copy.html"
    copy.write_text(source, encoding="utf-8")
    text, console = browse(str(copy), tmp_path / "profile", "--dump-dom", *flags)
    assert console == []
    found = re.search(r'<pre id="probe">(.*?)</pre>', text)
    assert found is not None, text[-500:]
    return json.loads(found.group(1).replace("&amp;", "&").replace("&lt;", "<"))


def test_it_loads_without_a_word_on_the_console(page, tmp_path):
    text, console = browse(page, tmp_path / "profile", "--dump-dom")
    assert console == []
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_console_is_heard(page, tmp_path):
    """The test above could fail: what the policy forbids is reported."""
    broken = tmp_path / "broken.html"
    with open(page, encoding="utf-8") as stream:
        broken.write_text(stream.read().replace(
            "</body>", "<img src='https://example.invalid/x.png'></body>"), encoding="utf-8")
    _, console = browse(str(broken), tmp_path / "profile", "--dump-dom")
    assert any("example.invalid" in line for line in console)


@pytest.mark.parametrize("width", [1280, 500])
def test_images_are_decoded_nothing_is_fetched_and_it_fits(page, tmp_path, width):
    found = probe(page, tmp_path, f"--window-size={width},900")
    with open(page, encoding="utf-8") as stream:
        assert len(found["images"]) == stream.read().count("<img ") >= 2
    assert min(found["images"]) > 100 and found["alts"] == 0
    assert [name for name in found["fetched"] if not name.startswith("data:")] == []
    assert found["wider"] <= 0  # nothing sticks out sideways
    assert found["text"] > 1000 and found["scripts"] == 1  # the probe's own


def test_it_is_dark_where_the_reader_wants_it(page, tmp_path):
    def lightness(color):
        return sum(int(number) for number in re.findall(r"\d+", color)[:3])

    dark = probe(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert lightness(dark["ground"]) < 150 and lightness(dark["ink"]) > 600
    light = probe(page, tmp_path, "--blink-settings=preferredColorScheme=1")
    assert lightness(light["ground"]) > 700 and lightness(light["ink"]) < 150


def test_it_is_seen(page, tmp_path):
    shot = str(tmp_path / "shot.png")
    browse(page, tmp_path / "profile", "--window-size=1280,1600", "--screenshot=" + shot)
    picture = cv2.imread(shot)
    assert picture.shape[:2] == (1600, 1280)
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 200  # text and plots, not a blank
    assert os.path.getsize(shot) > 50000
