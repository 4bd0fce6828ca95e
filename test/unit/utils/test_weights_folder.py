"""Whose weights files are, which one is taken, and where a training writes its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from utils import checkpoint
from utils.checkpoint import CheckpointName
from utils.errors import UserError
from utils.weights_folder import (
    claim_folder,
    find_checkpoint,
    find_restart,
    unfinished_training,
    weights_of_run,
    whole_checkpoint,
)


def write(folder, iteration, interrupt=False, config="yolact_base"):
    name = CheckpointName(config, iteration // 100, iteration, interrupt)
    return checkpoint.save_checkpoint(name.path(str(folder)), {"w": torch.ones(2)}, {})


def aged(path, seconds):
    for each in (str(path), checkpoint.state_path(str(path))):
        if os.path.exists(each):
            os.utime(each, (seconds, seconds))


def test_latest_of_any_configuration_is_of_the_one_trained_last(tmp_path):
    first = write(tmp_path, 800000, config="yolact_base")
    second, third = (write(tmp_path, iteration, config="mine") for iteration in (200, 100))
    for age, path in enumerate((first, second, third)):
        aged(path, 1000 + age)
    assert find_checkpoint("latest", str(tmp_path)) == second
    aged(first, 2000)
    assert find_checkpoint("latest", str(tmp_path)) == first


@pytest.mark.parametrize("recipe", [None, "yolact_base"])
@pytest.mark.parametrize("own", ["yolact_base", "mine"])
def test_latest_is_no_downloaded_file_where_something_was_trained(tmp_path, own, recipe):
    downloaded = tmp_path / "yolact_base_54_800000.pth"
    downloaded.write_bytes(b"x")
    trained = write(tmp_path, 4000, config=own)
    aged(trained, 1000)
    aged(downloaded, 2000)  # fetched after the training, even
    if recipe is None or own == recipe:
        assert find_checkpoint("latest", str(tmp_path), recipe) == trained
    os.unlink(trained)
    assert find_checkpoint("latest", str(tmp_path), recipe) == str(downloaded)


def test_a_link_to_a_file_that_is_gone_is_no_file(tmp_path):
    os.symlink("/absent/yolact_base_54_800000.pth", str(tmp_path / "yolact_base_54_800000.pth"))
    trained = write(tmp_path, 4000)
    assert find_checkpoint("latest", str(tmp_path)) == trained
    os.unlink(trained)
    assert claim_folder(str(tmp_path), "yolact_base", "a").path == str(tmp_path)


def test_without_a_training_latest_is_the_newest_file(tmp_path):
    for age, name in enumerate(("yolact_base_54_800000.pth", "yolact_im700_54_800000.pth",
                                "yolact_base_10_20000.pth")):
        (tmp_path / name).write_bytes(b"x")
        aged(tmp_path / name, 1000 + age)
    assert find_checkpoint("latest", str(tmp_path)).endswith("yolact_base_10_20000.pth")


def test_a_run_folder_stands_for_its_weights(tmp_path):
    with pytest.raises(UserError, match="without weights/best.pth"):
        weights_of_run(str(tmp_path))
    (tmp_path / "weights").mkdir()
    for name in ("last.pth", "best.pth"):
        (tmp_path / "weights" / name).write_bytes(b"x")
        assert weights_of_run(str(tmp_path)) == str(tmp_path / "weights" / name)
    assert weights_of_run("latest") == "latest"


def test_latest_and_interrupt(tmp_path):
    write(tmp_path, 900, config="yolact_im700")
    write(tmp_path, 100)
    stopped = write(tmp_path, 150, interrupt=True)
    newest = write(tmp_path, 200)
    (tmp_path / "yolact_base_9_999.pth.tmp").write_bytes(b"")
    folder = str(tmp_path)
    assert find_checkpoint("latest", folder, "yolact_base") == newest
    assert find_checkpoint("interrupt", folder, "yolact_base") == stopped
    assert find_checkpoint(newest, "elsewhere") == newest
    with pytest.raises(UserError, match="no interrupt checkpoint of 'yolact_im700'"):
        find_checkpoint("interrupt", folder, "yolact_im700")
    with pytest.raises(UserError, match="no weights file 'missing.pth'"):
        find_checkpoint("missing.pth", folder)


def save(claimed, iteration, launch="now", finished=False):
    path = write(claimed.path, iteration)
    claimed.saved(path, launch, finished)
    return path


def claimed_elsewhere(folder, training_id):
    """A process that has the folder and waits."""
    program = ("import sys; from utils.weights_folder import claim_folder\n"
               f"folder = claim_folder({str(folder)!r}, 'yolact_base', {training_id!r})\n"
               "print(folder.path, flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=str(ROOT),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, process.stdout.readline().decode().strip()


def test_the_second_training_has_a_place_of_its_own(tmp_path):
    first = claim_folder(str(tmp_path), "yolact_base", "a")
    save(first, 100)
    second = claim_folder(str(tmp_path), "yolact_base", "b")
    assert (first.path, second.path) == (str(tmp_path), str(tmp_path / "yolact_base-2"))
    newest = save(second, 50)
    assert claim_folder(str(tmp_path), "yolact_base", "a").path == first.path
    assert claim_folder(str(tmp_path), "yolact_base", "b").path.rstrip("/") == second.path
    assert claim_folder(str(tmp_path), "yolact_base", "c").path == str(tmp_path / "yolact_base-3")
    assert claim_folder(str(tmp_path), "other", "c").path == str(tmp_path)
    assert find_checkpoint("latest", str(tmp_path)).replace("//", "/") == newest
    os.utime(first.path + "/yolact_base_1_100.pth", (1 << 31, 1 << 31))
    assert find_checkpoint("latest", str(tmp_path)) == first.path + "/yolact_base_1_100.pth"


def test_trainings_that_run_at_the_same_time_do_not_share_a_folder(tmp_path):
    process, place = claimed_elsewhere(tmp_path, "a")
    try:
        assert place == str(tmp_path)
        assert claim_folder(str(tmp_path), "yolact_base", "b").path != place
        with pytest.raises(UserError, match=f"still runs, in process {process.pid} on "):
            claim_folder(str(tmp_path), "yolact_base", "a")
    finally:
        process.kill()
        process.communicate()
    # It never saved anything: its place is free.
    assert claim_folder(str(tmp_path), "yolact_base", "c").path == place


def test_a_downloaded_file_is_nobodys_to_replace(tmp_path):
    (tmp_path / "yolact_base_54_800000.pth").write_bytes(b"x")
    assert claim_folder(str(tmp_path), "yolact_base", "a").path == str(tmp_path / "yolact_base-2")


@pytest.mark.parametrize("inside", [".", "deeper"])
def test_files_of_before_there_were_notes_belong_to_who_goes_on_from_them(tmp_path, inside):
    folder = os.path.normpath(str(tmp_path / inside))
    old = write(folder, 100)
    assert claim_folder(str(tmp_path), "yolact_base", "a", old).path == folder
    assert claim_folder(str(tmp_path), "yolact_base", "b", old).path != folder


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b"\xff", b'{"saved": 1}',
    b'{"id": "a", "config_name": "yolact_base", "saved": [1], "launch": "now"}'])
def test_a_damaged_note_is_nobodys(tmp_path, damage):
    save(claim_folder(str(tmp_path), "yolact_base", "a"), 100)
    (tmp_path / ".yolact_base.training").write_bytes(damage)
    assert claim_folder(str(tmp_path), "yolact_base", "a").path == str(tmp_path / "yolact_base-2")
    assert find_restart("now", str(tmp_path), "yolact_base") is None


def test_a_restart_goes_on_from_what_this_launch_saved_whatever_the_clock_says(tmp_path):
    training = claim_folder(str(tmp_path), "yolact_base", "a")
    save(training, 400, launch="before")
    assert find_restart("now", str(tmp_path), "yolact_base") is None
    path = save(training, 200)  # it had gone back
    os.utime(path, (1000, 1000))
    assert find_restart("now", str(tmp_path), "yolact_base") == path
    assert find_restart("now", str(tmp_path), "other") is None
    os.unlink(path)
    assert find_restart("now", str(tmp_path), "yolact_base") is None


def test_the_newest_training_that_is_not_at_its_end(tmp_path):
    with pytest.raises(UserError, match="no unfinished training in .*--resume=FILE"):
        unfinished_training(str(tmp_path))
    first = claim_folder(str(tmp_path), "yolact_base", "a")
    path = save(first, 100)
    save(claim_folder(str(tmp_path), "yolact_base", "b"), 50, finished=True)
    assert unfinished_training(str(tmp_path)) == path
    newer = write(first.path, 150)  # killed before the note said so
    os.utime(newer, (1 << 31, 1 << 31))
    assert unfinished_training(str(tmp_path)) == newer
    save(first, 200, finished=True)
    with pytest.raises(UserError, match="no unfinished training"):
        unfinished_training(str(tmp_path))


def test_a_folder_that_takes_no_files_is_one_sentence(tmp_path):
    (tmp_path / "weights").write_text("")
    with pytest.raises(UserError, match="--save_folder"):
        claim_folder(str(tmp_path / "weights"), "yolact_base", "a")


@pytest.mark.parametrize("suffix", [".pth", ".state"])
@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: data[
    :-60] + bytes(60)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, suffix, damage):
    older, newest = write(tmp_path, 100), write(tmp_path, 200)
    write(tmp_path, 300)  # of before the training went back
    assert whole_checkpoint(newest) == newest and capsys.readouterr().out == ""
    path = tmp_path / ("yolact_base_2_200" + suffix)
    path.write_bytes(damage(path.read_bytes()))
    assert whole_checkpoint(newest) == older
    assert "yolact_base_2_200" in capsys.readouterr().out
    os.unlink(older)
    with pytest.raises(UserError, match="yolact_base_2_200"):
        whole_checkpoint(newest)
