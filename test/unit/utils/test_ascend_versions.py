"""Versions of an Ascend host: read from the files its packages leave, judged by Ascend's table."""

from __future__ import annotations

import pytest

from utils.ascend_versions import (
    Versions,
    doubt,
    mixed,
    read_cann,
    read_driver,
    read_plugin,
    supported,
)

TOOLKIT_INFO = """\
package_name=Ascend-cann-toolkit
version={}
innerversion=V100R001C20SPC001B251
compatible_version=[V100R001C15],[V100R001C18],[V100R001C19],[V100R001C20]
arch=aarch64
os=linux
path=/usr/local/Ascend/ascend-toolkit/8.0.0/aarch64-linux
"""
DRIVER_INFO = """\
Version=24.1.rc3
ascendhal_version=7.35.23
aicpu_version=1.0
Innerversion=V100R001C19SPC001B124
compatible_version=[V100R001C30],[V100R001C13],[V100R001C15]
package_version=24.1.rc3.3
"""
VERSION_CFG = """\
# version: 1.0
runtime_running_version=[7.5.0.3.220:8.1.RC1]
runtime_upgrade_version=[7.5.0.3.220:8.1.RC1]
"""
COMPONENT_INFO = "Version=7.7.0.1.238\nversion_dir=8.2.RC1\ntimestamp=20250613_012345678\n"


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize("path, text, version", [
    ("usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info",
     TOOLKIT_INFO.format("8.0.0"), "8.0.0"),
    ("usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info",
     TOOLKIT_INFO.format("8.5.0"), "8.5.0"),
    ("usr/local/Ascend/nnae/latest/ascend_nnae_install.info",
     TOOLKIT_INFO.format("5.1.RC1"), "5.1.RC1"),
    ("usr/local/Ascend/ascend-toolkit/latest/version.cfg", VERSION_CFG, "8.1.RC1"),
    ("usr/local/Ascend/cann/version.info", COMPONENT_INFO, "8.2.RC1"),
])
def test_cann_in_its_standard_folders(tmp_path, path, text, version):
    write(tmp_path, path, text)
    assert read_cann({}, str(tmp_path)) == version


@pytest.mark.parametrize("name", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_the_environment_names_the_cann_in_use(tmp_path, name):
    write(tmp_path, "usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info",
          TOOLKIT_INFO.format("8.5.0"))
    write(tmp_path, "home/me/Ascend/8.3/aarch64-linux/ascend_toolkit_install.info",
          TOOLKIT_INFO.format("8.3.RC1"))
    environ = {name: str(tmp_path / "home/me/Ascend/8.3")}
    assert read_cann(environ, str(tmp_path)) == "8.3.RC1"
    # A folder that is named but empty does not hide the one that is installed.
    assert read_cann({name: str(tmp_path / "nowhere")}, str(tmp_path)) == "8.5.0"


def test_the_installer_s_note_names_the_folder(tmp_path):
    write(tmp_path, "etc/Ascend/ascend_cann_install.info",
          "Toolkit_Install_Path={}\n".format(tmp_path / "opt"))
    write(tmp_path, "opt/ascend-toolkit/latest/x86_64-linux/ascend_toolkit_install.info",
          TOOLKIT_INFO.format("7.0.0"))
    assert read_cann({}, str(tmp_path)) == "7.0.0"


def test_a_host_without_cann_and_driver(tmp_path):
    assert read_cann({}, str(tmp_path)) is None
    assert read_driver(str(tmp_path)) is None
    assert Versions("2.13.0", "2.13.0", None, None).sentence() == (
        "torch 2.13.0, torch_npu 2.13.0, CANN not found, driver not found")


def test_driver(tmp_path):
    write(tmp_path, "usr/local/Ascend/driver/version.info", DRIVER_INFO)
    assert read_driver(str(tmp_path)) == "24.1.rc3.3"
    write(tmp_path, "usr/local/Ascend/driver/version.info", "Version=23.0.3\n")
    assert read_driver(str(tmp_path)) == "23.0.3"


def test_plugin_is_read_without_being_imported(tmp_path):
    write(tmp_path, "torch_npu/version.py", "__version__ = '2.1.0.post8+git1a2b'\n")
    assert read_plugin(str(tmp_path / "torch_npu")) == "2.1.0.post8+git1a2b"
    assert read_plugin(str(tmp_path)) is None


@pytest.mark.parametrize("torch, plugin", [
    ("2.13.0", "2.13.0"), ("2.1.0+cpu", "2.1.0.post8"), ("1.8.1+cpu", "1.8.1.post2"),
    ("2.13.1", "2.13.0")])
def test_what_belongs_together(torch, plugin):
    assert mixed(torch, plugin) == ""


def test_what_cannot_work_together():
    assert mixed("2.13.0+cpu", "2.9.0.post2") == (
        "torch_npu 2.9.0.post2 is made for torch 2.9.0, and torch 2.13.0+cpu is installed; install "
        "torch_npu 2.13.0 or torch 2.9.0")


@pytest.mark.parametrize("versions", [
    Versions("2.9.0", "2.9.0", "8.5.0", "25.5.0"),
    Versions("2.9.0+cpu", "2.9.0.post2", "9.0.0", None),
    Versions("2.3.1", "2.3.1", "8.0.RC2.2", None),  # a patch of 8.0.RC2
    Versions("2.3.1", "2.3.1+git55d8", None, None),
    Versions("1.8.1", "1.8.1.post2", "6.3.RC2", "23.0.rc2"),
    Versions("1.5.0+ascend.post8.20221115", None, "6.0.1", None),
])
def test_supported_combinations_raise_no_doubt(versions):
    assert doubt(versions) == ""


@pytest.mark.parametrize("versions, nearest", [
    (Versions("2.9.0", "2.9.0", "8.3.RC1", None), Versions("2.9.0", "2.9.0", "8.5.0")),
    (Versions("2.9.0", "2.9.0", "9.0.0", None), Versions("2.9.0", "2.9.0.post2", "9.0.0")),
    (Versions("2.13.0", "2.13.0", "9.1.0", None), Versions("2.12.0", "2.12.0", "9.1.0")),
    (Versions("1.8.0", "1.8.1", "5.0.2", None), Versions("1.8.1", "1.8.1.rc1", "5.1.RC1")),
    (Versions("1.5.0", None, "7.0.0", None), Versions("1.5.0", "1.5.0.post8", "6.0.1")),
    (Versions("2.2.0", "2.2.0", "8.0.0", None), Versions("2.2.0", "2.2.0.post2", "8.0.RC2")),
])
def test_the_nearest_supported_combination_is_named(versions, nearest):
    assert doubt(versions) == (
        "{}: not a combination that Ascend lists as supported; the nearest is {}".format(
            versions.sentence(), nearest.sentence().rsplit(",", 1)[0]))


def test_the_table_is_consistent():
    rows = list(supported())
    assert len(rows) == len(set(rows)) > 50
    for row in rows:
        assert doubt(Versions(row.torch, row.plugin, row.cann, None)) == ""
