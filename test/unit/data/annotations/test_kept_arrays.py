"""Arrays in the user's cache: the same ones again, made once, and never taken when damaged."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from data.annotations import kept_arrays
from data.annotations.kept_arrays import KeptArrays, keep, open_kept
from utils.errors import UserError

ARRAYS = {"none": np.zeros((0, 4), np.float32), "flags": np.array([True, False, True]),
          "numbers": np.arange(12, dtype=np.int64).reshape(3, 4), "one": np.array(2.5)}


@pytest.fixture()
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "source.json"
    path.write_text("content")
    return path


class Maker:
    """Counts how often it is asked."""

    def __init__(self, **changes):
        self.made, self.changes = 0, changes

    def __call__(self):
        self.made += 1
        return KeptArrays({"text": "\udc80 and more"}, ARRAYS, **self.changes)


def take(source, maker, readers=()):
    return keep("things", str(source), readers, maker)


def cache(source):
    return source.parent / "cache" / "yolact" / "things"


def files(source):
    return sorted(cache(source).glob("*.arrays"))


def assert_same(kept):
    assert kept.facts == {"text": "\udc80 and more"} and list(kept.arrays) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert kept.arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(kept.arrays[name], values)


def test_the_second_time_nothing_is_made(source):
    maker = Maker()
    for _ in range(2):
        kept = take(source, maker)
        assert_same(kept)
        assert kept.path == str(files(source)[0])
        with pytest.raises(ValueError):
            kept.arrays["numbers"][0, 0] = 1
    assert maker.made == 1


def test_the_content_counts(source, tmp_path):
    maker = Maker()
    take(source, maker)
    before = os.stat(str(source))
    copy = tmp_path / "copy.json"
    copy.write_text("content")
    take(copy, maker)
    assert maker.made == 1
    source.write_text("CONTENT")  # as long, and as old
    os.utime(str(source), ns=(before.st_atime_ns, before.st_mtime_ns))
    take(source, maker)
    assert maker.made == 2


def test_other_readers_make_it_again(source, tmp_path):
    maker, reader = Maker(), tmp_path / "reader.py"
    for text in ("first", "second"):
        reader.write_text(text)
        take(source, maker, [reader])
    assert maker.made == 2


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:5], lambda data: data[:-1], lambda data: data + b"\0",
    lambda data: b"garbage" * 50, lambda data: bytes(len(data)),
    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:]])
def test_what_is_damaged_is_made_again(source, damage):
    maker = Maker()
    take(source, maker)
    path = files(source)[0]
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert_same(take(source, maker))
    assert maker.made == 2 and path.read_bytes() == good


def test_a_folder_in_its_place(source):
    maker = Maker()
    take(source, maker)
    path = files(source)[0]
    path.unlink()
    path.mkdir()
    kept = take(source, maker)
    assert_same(kept)
    assert kept.path is None


def test_without_a_cache_it_goes_on(source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file: no folder can be made in it
    kept = take(source, Maker())
    assert_same(kept)
    assert kept.path is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without a home
    assert take(source, Maker()).path is None


def test_a_full_disk(source, monkeypatch):
    def full(path, write):
        raise UserError("cannot write")

    monkeypatch.setattr(kept_arrays, "write_whole", full)
    kept = take(source, Maker())
    assert_same(kept)
    assert kept.path is None and not files(source)


def test_what_does_not_follow_from_the_source_is_not_kept(source):
    assert take(source, Maker(lasting=False)).path is None

    def meanwhile():
        source.write_text("changed while it was read")
        return Maker()()

    assert take(source, meanwhile).path is None
    assert not files(source)


def test_errors_of_the_maker_are_raised(source):
    def fail():
        raise UserError("not COCO")

    with pytest.raises(UserError, match="not COCO"):
        take(source, fail)
    with pytest.raises(FileNotFoundError):
        take(source.parent / "nowhere", (source.parent / "nowhere").read_text)
    assert not files(source)


def test_what_nobody_opened_for_long_goes(source):
    take(source, Maker())
    old = files(source)[0]
    os.utime(str(old), (1, 1))
    take(source, Maker())  # used: it is young again
    assert os.stat(str(old)).st_mtime > 1
    os.utime(str(old), (1, 1))
    source.write_text("other")
    take(source, Maker())
    assert old not in files(source) and len(files(source)) == 1


def _start(source, makers, barrier):
    barrier.wait()

    def make():
        with open(str(makers), "a") as stream:
            stream.write("made\n")
        return Maker()()

    assert_same(take(Path(source), make))


def test_of_many_processes_one_makes_it(source, tmp_path):
    context = multiprocessing.get_context("fork")
    makers, barrier = tmp_path / "makers", context.Barrier(4)
    processes = [context.Process(target=_start, args=(str(source), makers, barrier))
                 for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert makers.read_text() == "made\n"


def test_where_the_file_system_knows_no_locks(source, monkeypatch):
    def refuse(*args):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert_same(take(source, Maker()))
    assert open_kept(files(source)[0]) is not None
