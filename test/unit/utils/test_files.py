"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from utils.errors import UserError
from utils.files import (
    clean_below,
    open_temporary,
    refuse_unwritable,
    refuse_unwritable_file,
    write_whole,
)


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
    with pytest.raises(UserError, match="blocker': it is a file; choose another folder"):
        refuse_unwritable(str(tmp_path / "blocker"))


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "file")  # which is not there yet
    for data in (b"one", b"two"):
        refuse_unwritable_file(str(link))
        write_whole(str(link), lambda stream, data=data: stream.write(data))
        assert link.is_symlink() and (tmp_path / "real" / "file").read_bytes() == data
    assert os.listdir(str(tmp_path / "real")) == ["file"]


def test_a_fifo_is_written_and_stays(tmp_path):
    path, found = tmp_path / "fifo", []
    os.mkfifo(str(path))
    refuse_unwritable_file(str(path))
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    write_whole(str(path), lambda stream: stream.write(b"news"))
    reader.join(10)
    assert found == [b"news"] and stat.S_ISFIFO(os.stat(str(path)).st_mode)
    assert os.listdir(str(tmp_path)) == ["fifo"]


def test_a_device_is_written_and_stays(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    for path in ("/dev/null", str(tmp_path / "null")):
        refuse_unwritable_file(path)
        write_whole(path, lambda stream: stream.write(b"nothing"))
        assert stat.S_ISCHR(os.stat(path).st_mode)


def test_temporary_files_of_killed_processes_go_and_others_stay(tmp_path):
    names = [".file.0123abcd.tmp", ".film.mp4.0123abcd.tmp.mp4", ".mine.tmp", "0123abcd.tmp"]
    for name in names:
        (tmp_path / name).touch()
    with open_temporary(str(tmp_path / "busy")) as stream:
        refuse_unwritable(str(tmp_path))
        assert sorted(os.listdir(str(tmp_path))) == sorted(
            [os.path.basename(stream.name)] + names[2:])


def test_they_go_from_the_folders_below_too(tmp_path):
    place = tmp_path / "evaluation" / "pictures"
    place.mkdir(parents=True)
    for name in (".a.jpg.0123abcd.tmp", ".b.pth.0123abcd.tmp.state", ".a.jpg", "b.tmp"):
        (place / name).write_bytes(b"")
    clean_below(str(tmp_path))
    assert sorted(path.name for path in place.iterdir()) == [".a.jpg", "b.tmp"]


def test_what_is_planted_is_not_written_through(tmp_path, monkeypatch):
    """The name of a temporary file is random; should somebody guess it, it is not opened."""
    (tmp_path / "victim").write_bytes(b"old")
    (tmp_path / ".file.00000000.tmp").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    with pytest.raises(UserError, match="File exists"):
        write_whole(str(tmp_path / "file"), lambda stream: stream.write(b"new"))
    assert (tmp_path / "victim").read_bytes() == b"old"
