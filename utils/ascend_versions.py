"""Which versions of torch, its plugin, CANN and driver a host has, and which belong together.

The table is Ascend's own (COMPATIBILITY.md of gitcode.com/Ascend/pytorch, as of plugin 2.12.0).
Which drivers go with a CANN depends on the card and is not in it: the driver is named, not judged.
"""

from __future__ import annotations

import glob
import os
import re
from typing import Iterator, Mapping, NamedTuple

from utils.files import first_match

# CANN: (plugin, ..). The torch is the plugin without its suffix.
TABLE: dict[str, tuple[str, ...]] = {
    "9.1.0": ("2.12.0", "2.11.0", "2.10.0", "2.10.0.post4", "2.9.0.post3", "2.9.0.post6",
              "2.7.1.post5", "2.7.1.post8"),
    "9.0.0": ("2.10.0", "2.9.0.post2", "2.8.0.post4", "2.7.1.post4"),
    "8.5.0": ("2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5"),
    "8.3.RC1": ("2.8.0", "2.7.1", "2.6.0.post3", "2.1.0.post17"),
    "8.2.RC1": ("2.6.0", "2.5.1.post1", "2.1.0.post13"),
    "8.1.RC1": ("2.5.1", "2.4.0.post4", "2.3.1.post6", "2.1.0.post12"),
    "8.0.0": ("2.4.0.post2", "2.3.1.post4", "2.1.0.post10"),
    "8.0.RC3": ("2.4.0", "2.3.1.post2", "2.1.0.post8"),
    "8.0.RC2": ("2.3.1", "2.2.0.post2", "2.1.0.post6", "1.11.0.post14"),
    "8.0.RC1": ("2.2.0", "2.1.0.post4", "2.1.0.post3", "1.11.0.post11"),
    "7.0.0": ("2.1.0", "2.0.1.post1", "1.11.0.post8"),
    "7.0.RC1": ("2.1.0.rc1", "2.0.1", "1.11.0.post4"),
    "6.3.RC3": ("1.11.0.post2", "1.11.0.post3"),
    "6.3.RC2": ("2.0.1.rc1", "1.11.0.post1", "1.8.1.post2"),
    "6.3.RC1": ("1.11.0", "1.8.1.post1"),
    "6.0.1": ("1.8.1", "1.5.0.post8", "1.11.0.rc2"),
    "6.0.RC1": ("1.8.1.rc3", "1.5.0.post7", "1.11.0.rc1"),
    "5.1.RC2": ("1.8.1.rc2", "1.5.0.post6"),
    "5.1.RC1": ("1.8.1.rc1", "1.5.0.post5"),
    "5.0.4": ("1.5.0.post4",),
    "5.0.3": ("1.5.0.post3",),
    "5.0.2": ("1.5.0.post2",),
}

_TOOLKITS = ("ascend-toolkit/latest", "cann", "nnae/latest", "ascend-toolkit")
_INSTALL_INFO = r"version=\s*(\S+)"
_VERSION_FILES = (
    ("*-linux/ascend_toolkit_install.info", _INSTALL_INFO),
    ("*-linux/ascend_nnae_install.info", _INSTALL_INFO),
    ("ascend_toolkit_install.info", _INSTALL_INFO), ("ascend_nnae_install.info", _INSTALL_INFO),
    ("version.info", r"version_dir=\s*(\S+)"),  # of a component; the folder names the release
    # runtime_running_version=[7.5.0.3.220:8.0.0]
    ("version.cfg", r"\w*running_version=\[(?:[^:\]]*:)?([^\]:]+)\]"),
)
"""Where a toolkit tells its version, and how."""
_INSTALLED = "usr/local/Ascend"
_DRIVER = _INSTALLED + "/driver/version.info"
_INSTALL_NOTE = "etc/Ascend/ascend_cann_install.info"


class Versions(NamedTuple):
    """What a host has, or a row of the table; None for what was not found."""

    torch: str
    plugin: str | None
    """None for the PyTorch 1.5 of Ascend, which brings it built in."""
    cann: str | None
    driver: str | None = None
    """Not in the table."""

    def sentence(self) -> str:
        return f"{_combination(self)}, driver {self.driver or 'not found'}"


def _combination(versions: Versions) -> str:
    return (f"torch {versions.torch}, torch_npu {versions.plugin or 'built in'}, "
            f"CANN {versions.cann or 'not found'}")


def supported() -> Iterator[Versions]:
    """The rows of the table, the newest CANN first."""
    for cann, plugins in TABLE.items():
        for plugin in plugins:
            yield Versions(_base(plugin), plugin, cann)


def mixed(torch_version: str, plugin: str) -> str:
    """Why these two cannot work together, as the end of a sentence; empty if they can."""
    wanted, found = _base(plugin), _base(torch_version)
    if wanted.split(".")[:2] == found.split(".")[:2]:
        return ""
    return (f"torch_npu {plugin} is made for torch {wanted}, and torch {torch_version} is "
            f"installed; install torch_npu {found} or torch {wanted}")


def doubt(versions: Versions) -> str:
    """One sentence if the table does not have this combination, naming the nearest; else empty.

    What was not found is not judged.
    """
    nearest = min(supported(), key=lambda row: _distance(versions, row))
    if _distance(versions, nearest) == (0, 0, 0):
        return ""
    return (f"{versions.sentence()}: not a combination that Ascend lists as supported; the "
            f"nearest is {_combination(nearest)}")


def _distance(versions: Versions, row: Versions) -> tuple[int, int, int]:
    """How far a row is, torch first: with another torch more has to be installed anew."""
    cann, supported_cann = versions.cann or row.cann or "", row.cann or ""
    same_cann = (cann + ".").startswith(supported_cann + ".")  # a patch of it, too
    same_plugin = versions.plugin is None or versions.plugin.split("+")[0] == row.plugin
    return (abs(_number(versions.torch) - _number(row.torch)),
            0 if same_cann else abs(_number(cann) - _number(supported_cann)) or 1,
            0 if same_plugin else 1)


def _base(version: str) -> str:
    """`2.1.0` of `2.1.0.post8+git1234`."""
    match = re.match(r"\d+\.\d+(\.\d+)?", version)
    return match.group() if match else version


def _number(version: str) -> int:
    """Order of versions as one number; 8.0.RC2 lies before 8.0.0."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(?:RC(\d+)|(\d+)))?", version, re.IGNORECASE)
    if match is None:
        return 0
    major, minor, candidate, patch = (int(part or 0) for part in match.groups())
    return major * 10000 + minor * 100 + (candidate if candidate else 50 + patch)


def read_plugin(folder: str) -> str | None:
    """Version of the plugin in `folder`, read without importing it."""
    return first_match(os.path.join(folder, "version.py"), r"__version__\s*=\s*['\"]([^'\"]+)")


def read_cann(environ: Mapping[str, str], root: str = "/") -> str | None:
    """Version of the CANN whose environment is set, else of the one that is installed."""
    homes = [environ.get("ASCEND_HOME_PATH"), environ.get("ASCEND_TOOLKIT_HOME")]
    noted = first_match(os.path.join(root, _INSTALL_NOTE), r".*Install_Path[^=]*=\s*(\S+)")
    for base in (noted, os.path.join(root, _INSTALLED)):
        homes += [os.path.join(base, name) for name in _TOOLKITS] if base else []
    for home in filter(None, homes):
        for name, version in _VERSION_FILES:
            for path in sorted(glob.glob(os.path.join(home, name))):
                found = first_match(path, version)
                if found:
                    return found
    return None


def read_driver(root: str = "/") -> str | None:
    """Version of the installed driver."""
    path = os.path.join(root, _DRIVER)
    return first_match(path, r"package_version=\s*(\S+)") or first_match(path, r"Version=\s*(\S+)")
