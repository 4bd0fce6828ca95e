"""Files are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from utils.errors import UserError
from utils.files import refuse_unwritable, write_whole


def test_replaces_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(str(path), lambda stream: stream.write(b"one"))
    write_whole(str(path), lambda stream: stream.write(b"two"))
    assert path.read_bytes() == b"two"
    assert os.listdir(str(path.parent)) == ["file"]


def test_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_half_way(stream):
        stream.write(b"half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        write_whole(str(path), fail_half_way)
    assert path.read_bytes() == b"old"
    assert os.listdir(str(tmp_path)) == ["file"]


def test_full_disk_is_a_sentence(tmp_path):
    full = "/dev/full"
    if not os.path.exists(full):
        pytest.skip("no /dev/full on this system")

    def write_to_full_disk(stream):
        with open(full, "wb") as device:
            device.write(b"x" * 100000)

    with pytest.raises(UserError, match="file': No space left on device"):
        write_whole(str(tmp_path / "file"), write_to_full_disk)
    assert os.listdir(str(tmp_path)) == []


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "blocker").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        write_whole(str(tmp_path / "blocker" / "file"), lambda stream: stream.write(b"x"))


def test_folders_are_tried_before_they_are_needed(tmp_path):
    refuse_unwritable(str(tmp_path / "new" / "weights"))
    assert os.listdir(str(tmp_path / "new" / "weights")) == []
    (tmp_path / "blocker").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write .*blocker"):
        refuse_unwritable(str(tmp_path / "blocker"))
