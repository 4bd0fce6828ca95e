"""Videos through eval.py: frames in order, broken ones counted, files that are whole or named."""

from __future__ import annotations

import itertools
import json
import os
import signal

import cv2
import numpy as np
import pytest

import eval as evaluation
from helpers.prediction_weights import full_disk, save_weights
from utils.errors import UserError
from utils.inference import predict as predict_run
from utils.inference import video
from utils.inference.detector import Detector
from utils.inference.video import VideoReader, VideoWriter, window_problem

SIZE = (96, 64)
COUNT = 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


def shade(n):
    return np.full((SIZE[1], SIZE[0], 3), 20 * n, np.uint8)


def make_video(path, count=COUNT):
    with VideoWriter(str(path), 10, SIZE) as writer:
        for n in range(count):
            writer.write(shade(n % COUNT))
    return str(path)


def shades(path):
    """Which `shade` each frame of a file is."""
    return [int(round(np.median(frame.image) / 20)) for frame in VideoReader(str(path))]


def run(capsys, *flags):
    code = evaluation.main(["--eval_device=cpu"] + list(flags))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("ending", [".mp4", ".avi"])
def test_what_is_written_can_be_read(tmp_path, ending):
    path = make_video(tmp_path / ("a" + ending))
    reader = VideoReader(path)
    assert (reader.fps, reader.total, reader.is_camera) == (10, COUNT, False)
    assert shades(path) == list(range(COUNT))
    assert os.listdir(str(tmp_path)) == ["a" + ending]


@pytest.mark.parametrize("multiframe", [1, 5])
def test_a_video(weights, tmp_path, capsys, monkeypatch, multiframe):
    source, target = make_video(tmp_path / "a.mp4"), tmp_path / "deep" / "out.mp4"
    launched = []
    launch = Detector.launch
    monkeypatch.setattr(Detector, "launch", lambda self, planes, times: (
        launched.append(tuple(planes.shape)) or launch(self, planes, times)))
    code, out, err = run(
        capsys, "--trained_model=" + weights, f"--video={source}:{target}",
        f"--video_multiframe={multiframe}", "--output_json", "--crops", "--display_fps",
        "--display_masks=False", "--display_bboxes=False", "--display_text=False", "--benchmark")
    assert code == 0 and err == ""
    assert "12 frames drawn" in out and "network" in out and "images/s" in out
    assert shades(target) == list(range(COUNT))
    sizes = {1: [1] * COUNT, 5: [5, 5, 2]}[multiframe]  # no image is made up on a CPU
    assert launched == [(size, 3, 64, 64) for size in [1, *sizes]]  # 1 to warm up
    records = json.loads((tmp_path / "deep" / "out.json").read_text(encoding="utf-8"))
    assert [records[0]["image_id"], records[-1]["image_id"]] == [1, COUNT]
    assert "file_name" not in records[0]
    assert len(os.listdir(str(tmp_path / "deep" / "out_crops"))) > COUNT


class Broken:
    """An OpenCV capture that cannot decode some frames."""

    def __init__(self, bad, count=COUNT, readable=COUNT):
        self.bad, self.count, self.readable, self.position = bad, count, readable, 0

    def isOpened(self):  # noqa: N802
        return True

    def get(self, which):
        return {cv2.CAP_PROP_FPS: 10, cv2.CAP_PROP_FRAME_COUNT: self.count}[which]

    def set(self, which, value):
        return False

    def read(self):
        n = self.position
        if n >= self.readable:
            return False, None
        self.position += 1
        return (False, None) if n in self.bad else (True, shade(n))

    def release(self):
        pass


def test_broken_frames_are_counted_and_keep_their_place(weights, tmp_path, capsys, monkeypatch):
    source, target = make_video(tmp_path / "a.mp4"), tmp_path / "out.mp4"
    real = cv2.VideoCapture
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda path: (
        Broken({3, 4, 7}) if path == source else real(path)))
    code, out, err = run(capsys, "--trained_model=" + weights, "--display_masks=False",
                         f"--video={source}:{target}", "--display_bboxes=False",
                         "--display_text=False", "--video_multiframe=2")
    assert code == 1 and "9 frames drawn" in out and "3 failed" in out
    assert [line.split(" frame ")[1] for line in err.splitlines()] == [
        f"{n} cannot be decoded" for n in (4, 5, 8)]
    assert shades(target) == [0, 1, 2, 2, 2, 5, 6, 6, 8, 9, 10, 11]


@pytest.mark.parametrize("name, readable, missing", [
    ("a.mp4", COUNT, 0), ("a.mp4", 10, 2), ("a.mkv", 10, 0), ("a.mkv", 6, 6)])
def test_missing_frames_at_the_end(tmp_path, monkeypatch, name, readable, missing):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda path: Broken((), readable=readable))
    reader = VideoReader(str(tmp_path / name))
    assert len(list(reader)) == readable and reader.missing == missing


def test_a_real_damaged_file(weights, tmp_path, capfd):
    """Each frame of an .avi stands alone: the damaged ones are missing, the others are there."""
    source, target = make_video(tmp_path / "a.avi", 40), tmp_path / "out.mp4"
    with open(source, "r+b") as file:
        file.truncate(os.path.getsize(source) // 2)
    code = evaluation.main(["--eval_device=cpu", "--trained_model=" + weights,
                            f"--video={source}:{target}"])
    captured = capfd.readouterr()
    written = len(shades(target))
    assert code == 1 and 5 < written < 35
    assert f"the last {40 - written} of 40 frames cannot be read" in captured.err
    assert f"{40 - written} failed" in captured.out


def test_an_error_while_reading_is_raised_and_the_file_is_closed(weights, tmp_path, capsys,
                                                                 monkeypatch):
    source, target = make_video(tmp_path / "a.mp4"), tmp_path / "out.mp4"
    real, broken = cv2.VideoCapture, Broken(())

    def read():
        broken.position += 1
        if broken.position > 5:
            raise RuntimeError("driver died")
        return True, shade(broken.position)

    broken.read = read
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda path: (
        broken if path == source else real(path)))
    with pytest.raises(RuntimeError, match="driver died"):
        run(capsys, "--trained_model=" + weights, f"--video={source}:{target}")
    assert len(shades(target)) >= 3


def test_a_full_disk_is_said(weights, tmp_path, capfd):
    source, target = str(tmp_path / "noise.avi"), tmp_path / "out.avi"
    rng = np.random.RandomState(0)
    with VideoWriter(source, 10, (320, 240)) as writer:
        for _ in range(COUNT):
            writer.write(rng.randint(0, 256, (240, 320, 3)).astype(np.uint8))
    with full_disk(200000):
        code = evaluation.main(["--eval_device=cpu", "--trained_model=" + weights, "--output_json",
                                f"--video={source}:{target}"])
    captured = capfd.readouterr()
    assert code == 1 and "1 failed" in captured.out
    assert "drawn" not in captured.out
    assert "of 12 frames" in captured.err and "out.avi" in captured.err
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))) == 5 * COUNT


def test_frames_of_other_sizes_are_fitted(tmp_path):
    with VideoWriter(str(tmp_path / "a.mp4"), 10, SIZE) as writer:
        writer.write(shade(3))
        writer.write(np.full((50, 200, 3), 100, np.uint8))
    assert shades(tmp_path / "a.mp4") == [3, 5]
    with VideoWriter(str(tmp_path / "empty.mp4"), 10, SIZE):
        pass
    assert sorted(os.listdir(str(tmp_path))) == ["a.mp4"]


def test_a_camera_keeps_its_pace(weights, tmp_path, capsys, monkeypatch):
    """A frame is written as often as the time that it was shown demands."""
    clock = itertools.chain(np.array([0, 0.1, 0.3, 0.6, 0.61, 0.7]) + 5, itertools.count(9))
    real, camera = cv2.VideoCapture, Broken((), count=-1, readable=6)
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda path: camera if path == 0 else real(path))
    monkeypatch.setattr(video.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(video, "_ATTEMPTS", 0)
    monkeypatch.setattr(predict_run, "read_ahead", in_order)
    code, out, _ = run(capsys, "--trained_model=" + weights, "--display_masks=False",
                       "--video=0:{}".format(tmp_path / "c.mp4"), "--display_bboxes=False",
                       "--display_text=False")
    assert code == 0 and "6 frames drawn" in out
    assert shades(tmp_path / "c.mp4") == [0, 1, 2, 2, 3, 3, 3, 5]


def in_order(source):
    """`read_ahead` without a thread: a patched clock is read in order."""
    yield from source


def test_without_a_camera_or_a_display(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda path: Closed())
    code, _, err = run(capsys, "--trained_model=" + weights,
                       "--video=7:{}".format(tmp_path / "c.mp4"))
    assert code == 2 and "camera 7 cannot be opened" in err
    monkeypatch.setattr(video.cv2, "getBuildInformation", lambda: "  GUI:          GTK3\n")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(video.sys, "platform", "linux")
    assert "DISPLAY is not set" in window_problem()
    code, _, err = run(capsys, "--trained_model=" + weights, "--video=0")
    assert code == 2 and "no window can be shown" in err and "--video=0:out.mp4" in err
    monkeypatch.setenv("DISPLAY", ":0")
    assert window_problem() == ""
    monkeypatch.setattr(video.cv2, "getBuildInformation", lambda: "  GUI:          NONE\n")
    assert "without windows" in window_problem()


class Closed(Broken):
    """A capture that could not be opened."""

    def __init__(self):
        super().__init__(())

    def isOpened(self):  # noqa: N802
        return False


def test_what_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"hello")
    with pytest.raises(UserError, match="a.mp4 is not a video"):
        VideoReader(str(tmp_path / "a.mp4"))
    with pytest.raises(UserError, match="rtsp://127.0.0.1:1/x cannot be opened; is the address"):
        VideoReader("rtsp://127.0.0.1:1/x")
    with pytest.raises(UserError, match="must end in one of .mp4"):
        VideoWriter(str(tmp_path / "a.xyz"), 10, SIZE)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        VideoWriter(str(tmp_path / "file" / "a.mp4"), 10, SIZE)


@pytest.mark.parametrize("blocked", ["out.mp4", "out.json"])
def test_a_folder_in_place_of_a_result_is_refused_before_the_first_frame(
        weights, tmp_path, capsys, monkeypatch, blocked):
    source = make_video(tmp_path / "in.avi")
    (tmp_path / "o" / blocked).mkdir(parents=True)
    monkeypatch.setattr(VideoReader, "__iter__", lambda self: pytest.fail("a frame was read"))
    code, out, err = run(capsys, "--trained_model=" + weights, "--output_json",
                         f"--video={source}:{tmp_path / 'o' / 'out.mp4'}")
    assert code == 2 and f"{blocked}': it is a folder" in err
    assert os.listdir(str(tmp_path / "o")) == [blocked]


def test_a_video_that_cannot_take_its_name_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="out.avi': Is a directory"):
        with VideoWriter(str(tmp_path / "out.avi"), 10, (32, 32)) as writer:
            writer.write(np.zeros((32, 32, 3), np.uint8))
            (tmp_path / "out.avi").mkdir()
    assert os.listdir(str(tmp_path)) == ["out.avi"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_what_was_drawn(weights, tmp_path, capsys, monkeypatch, number, code):
    source = make_video(tmp_path / "in.avi")
    frames = VideoReader.__iter__

    def interrupted(self):
        for n, frame in enumerate(frames(self)):
            if n == 7:
                os.kill(os.getpid(), number)
            yield frame

    with monkeypatch.context() as patch:
        patch.setattr(VideoReader, "__iter__", interrupted)
        found, out, _ = run(capsys, "--trained_model=" + weights, "--output_json",
                            "--video_multiframe=1", f"--video={source}:{tmp_path / 'out.avi'}")
    assert found == code
    assert 1 <= len(shades(tmp_path / "out.avi")) < COUNT
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
