"""Which versions of torch, its plugin, CANN and driver a host has, and which belong together.

The table is Ascend's own (COMPATIBILITY.md of gitcode.com/Ascend/pytorch, as of plugin 2.12.0).
What the plugin is called is for `utils.device` to say.
Which drivers go with a CANN depends on the card and is not in it: the driver is named, not judged.
"""

from __future__ import annotations

import glob
import os
import re
from typing import Dict, Iterator, Mapping, NamedTuple, Optional, Tuple

# CANN: (plugin, ..). The torch is the plugin without its suffix.
TABLE: Dict[str, Tuple[str, ...]] = {
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
_VERSION_FILES = ("*-linux/ascend_toolkit_install.info", "*-linux/ascend_nnae_install.info",
                  "ascend_toolkit_install.info", "ascend_nnae_install.info", "version.info",
                  "version.cfg")
_INSTALLED = "usr/local/Ascend"
_DRIVER = _INSTALLED + "/driver/version.info"
_INSTALL_NOTE = "etc/Ascend/ascend_cann_install.info"


class Versions(NamedTuple):
    """What a host has; None for what was not found."""

    torch: str
    plugin: Optional[str]
    """None for the PyTorch 1.5 of Ascend, which brings it built in."""
    cann: Optional[str]
    driver: Optional[str]

    def sentence(self, name: str) -> str:
        """All four; `name` is the plugin's."""
        return (f"torch {self.torch}, {name} {self.plugin or 'built in'}, "
                f"CANN {self.cann or 'not found'}, driver {self.driver or 'not found'}")


class Combination(NamedTuple):
    """A row of the table."""

    torch: str
    plugin: str
    cann: str

    def sentence(self, name: str) -> str:
        """All three; `name` is the plugin's."""
        return f"torch {self.torch}, {name} {self.plugin}, CANN {self.cann}"


def combinations() -> Iterator[Combination]:
    """All that are supported, the newest CANN first."""
    for cann, plugins in TABLE.items():
        for plugin in plugins:
            yield Combination(_base(plugin), plugin, cann)


def mixed(torch_version: str, plugin: str, name: str) -> str:
    """Why these two cannot work together, as the end of a sentence; empty if they can.

    Args:
        torch_version: and
        plugin: the version of each.
        name: of the plugin.
    """
    wanted, found = _base(plugin), _base(torch_version)
    if wanted.split(".")[:2] == found.split(".")[:2]:
        return ""
    return (f"{name} {plugin} is made for torch {wanted}, and torch {torch_version} is installed; "
            f"install {name} {found} or torch {wanted}")


def doubt(versions: Versions, name: str) -> str:
    """One sentence if the table does not have this combination, naming the nearest; else empty.

    What was not found is not judged; `name` is the plugin's.
    """
    rows = list(combinations())
    if any(_distance(versions, row) == (0, 0, 0) for row in rows):
        return ""
    nearest = min(rows, key=lambda row: _distance(versions, row))
    return (f"{versions.sentence(name)}: not a combination that Ascend lists as supported; the "
            f"nearest is {nearest.sentence(name)}")


def _distance(versions: Versions, row: Combination) -> Tuple[int, int, int]:
    """How far a row is, torch first: with another torch more has to be installed anew."""
    cann = versions.cann
    same_cann = cann is None or cann == row.cann or cann.startswith(row.cann + ".")  # a patch
    same_plugin = versions.plugin is None or versions.plugin.split("+")[0] == row.plugin
    return (abs(_number(versions.torch) - _number(row.torch)),
            0 if same_cann or cann is None else abs(_number(cann) - _number(row.cann)) or 1,
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


def read_plugin(folder: str) -> Optional[str]:
    """Version of the plugin in `folder`, read without importing it."""
    return _value(os.path.join(folder, "version.py"), r"__version__\s*=\s*['\"]([^'\"]+)")


def read_cann(environ: Mapping[str, str], root: str = "/") -> Optional[str]:
    """Version of the CANN whose environment is set, else of the one that is installed."""
    homes = [environ[name] for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
             if environ.get(name)]
    noted = _value(os.path.join(root, _INSTALL_NOTE), r".*Install_Path[^=]*=\s*(\S+)")
    for base in [noted] if noted else []:
        homes += [os.path.join(base, name) for name in _TOOLKITS]
    homes += [os.path.join(root, _INSTALLED, name) for name in _TOOLKITS]
    for home in homes:
        for pattern in _VERSION_FILES:
            for path in sorted(glob.glob(os.path.join(home, pattern))):
                found = _cann_in(path)
                if found:
                    return found
    return None


def _cann_in(path: str) -> Optional[str]:
    if path.endswith("version.cfg"):  # runtime_running_version=[7.5.0.3.220:8.0.0]
        return _value(path, r"\w*running_version=\[(?:[^:\]]*:)?([^\]:]+)\]")
    if path.endswith("version.info"):  # of a component; the folder names the release
        return _value(path, r"version_dir=\s*(\S+)")
    return _value(path, r"version=\s*(\S+)")


def read_driver(root: str = "/") -> Optional[str]:
    """Version of the installed driver."""
    path = os.path.join(root, _DRIVER)
    return _value(path, r"package_version=\s*(\S+)") or _value(path, r"Version=\s*(\S+)")


def _value(path: str, pattern: str) -> Optional[str]:
    """First group of the first line that `pattern` matches from its start."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                match = re.match(pattern, line.strip())
                if match:
                    return match.group(1)
    except OSError:
        pass
    return None
