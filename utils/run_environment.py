"""What a program runs on: versions, device, command line, state of the source code."""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional, Sequence

PACKAGES = ("torch", "numpy", "cv2", "pycocotools", "PIL", "matplotlib")
_GIT_SECONDS = 10


def describe_environment(device: str, argv: Sequence[str], **more: Any) -> Dict[str, Any]:
    """Plain types for a JSON file.

    Args:
        device: in words, as `utils.device.describe` gives it.
        argv: the program and its arguments.
        more: what else belongs there.
    """
    return dict({
        "time": timestamp(),
        "command": " ".join(shlex.quote(word) for word in argv),
        "folder": os.getcwd(),
        "host": platform.node(),
        "system": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "source": source_version(),
    }, **more)


def describe_data(dataset: Any) -> Dict[str, Any]:
    """What a `data.coco.CocoDataset` holds, in plain types."""
    report = dataset.report
    return {
        "annotation_file": dataset.annotation_file, "images_folder": dataset.images_dir,
        "images": report.images, "images_without_objects": report.empty_images,
        "objects": report.objects, "crowd_regions": report.crowds,
        "dropped_annotations": report.dropped, "sentences": report.sentences()[1:],
        "objects_per_class": dict(report.objects_per_category)}


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def package_versions(names: Sequence[str] = PACKAGES) -> Dict[str, str]:
    """Version by package; what is not installed is left out."""
    found = {}
    for name in names:
        try:
            module = sys.modules.get(name) or importlib.import_module(name)
        except ImportError:
            continue
        version = getattr(module, "__version__", None) or _distribution_version(name)
        if version:
            found[name] = str(version)
    return found


def _distribution_version(name: str) -> Optional[str]:
    try:
        from importlib.metadata import PackageNotFoundError, version
    except ImportError:  # Python 3.7
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def source_version(folder: Optional[str] = None) -> Optional[Dict[str, Any]]:
    """Git commit of the project and whether files differ from it; None outside of git."""
    folder = folder or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(folder, ".git")):
        return None
    commit = _git(folder, ["rev-parse", "HEAD"])
    if not commit:
        return None
    changed = _git(folder, ["status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "changed_files": None if changed is None
            else len(changed.splitlines())}


def _git(folder: str, arguments: List[str]) -> Optional[str]:
    try:
        done = subprocess.run(["git", "-C", folder] + arguments, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                              timeout=_GIT_SECONDS, universal_newlines=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
