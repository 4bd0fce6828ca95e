"""Files made to do harm: nothing runs, nothing large is allocated, one sentence says why."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import struct
import subprocess
import time
import zipfile

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data.shapes import write_dataset
from helpers.weight_files import MEGABYTE, network, refused, save
from utils import convert_weights
from utils.cli import run_main
from utils.errors import UserError
from utils.weights.files import read_weights
from utils.weights.safetensors import write_safetensors


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Sets:
    """Pickles as an allowed object that is given attributes."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"items": "changed"}


def hostile_objects(trace):
    make = "__import__('os').mkdir({!r})".format(str(trace))
    return {
        "system": Calls(os.system, "mkdir '{}'".format(trace)),
        "eval": Calls(builtins.eval, make),
        "exec": Calls(builtins.exec, make),
        "Popen": Calls(subprocess.Popen, ["mkdir", str(trace)]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "mkdir"),
        "loads": Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(trace)))),
        "load": Calls(torch.load, str(trace)),
        "partial": Calls(__import__("functools").partial, os.mkdir, str(trace)),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "header", "paddle2", "paddle4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", sorted(hostile_objects("")))
def test_code_is_named_and_not_run(tmp_path, form, nested, name):
    trace = tmp_path / "was_run"
    hostile = hostile_objects(trace)[name]
    content = {"a": torch.ones(1) if form in ("zip", "legacy") else np.ones(1),
               "b": [(1, {"c": hostile})] if nested else hostile}
    path = tmp_path / "hostile.pth"
    if form in ("zip", "legacy"):
        save(content, path, form == "legacy")
    elif form == "header":
        path.write_bytes(pickle.dumps(hostile, protocol=2))
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    refused(path, "nothing was run", name if name != "getattr" else "")
    assert not trace.exists()


def test_attributes_of_a_dictionary_are_left_out(tmp_path):
    path = tmp_path / "attributes.pdparams"
    path.write_bytes(pickle.dumps({"b": Sets(), "w": np.ones(2, np.float32)}, protocol=4))
    found = read_weights(str(path))
    assert list(found.tensors) == ["w"] and found.unused == ["b"]


@pytest.mark.parametrize("opcodes,words", [
    (b"cbuiltins\nprint\n)\x81.", "builtins.print"),                      # NEWOBJ
    (b"(ios\nsystem\n.", "object of a class"),                            # INST
    (b"ccollections\nOrderedDict\n)\x81.", "object of a class"),          # NEWOBJ of a known name
    (b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "attributes"),
    (b"cnumpy\nndarray\n)R.", "numpy.ndarray"),
    (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8I00\nI01\ntR.", "numpy.dtype O8"),
    (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.", "_codecs.encode"),
    (b"\x82\x01.", "object of a class"),                                  # EXT1
])
def test_other_ways_to_make_objects(tmp_path, opcodes, words):
    path = tmp_path / "opcodes.pdparams"
    path.write_bytes(b"\x80\x04" + opcodes)
    refused(path, words)


@pytest.mark.parametrize("opcodes", [
    b"r\xff\xff\xff\x7f.",                                    # memo index of 2 ** 31
    b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",             # bytes of a terabyte
    b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.",             # text of a terabyte
    b"\x95" + struct.pack("<Q", 1 << 40) + b"x.",             # frame of a terabyte
    b"]\x94" + b"(h\x00h\x00l\x94" * 3 + b".",
    b"]\x94h\x00a" + b".",                                    # a list in itself
])
def test_pickles_that_ask_for_memory(tmp_path, opcodes):
    path = tmp_path / "large.pdparams"
    path.write_bytes(b"\x80\x04}X\x01\x00\x00\x00k" + opcodes[:-1] + b"s.")
    refused(path)


def test_lists_that_double_do_not_unfold(tmp_path):
    body = b"]\x94"
    for n in range(40):
        body += b"0(h" + bytes([n]) + b"h" + bytes([n]) + b"l\x94"
    path = tmp_path / "laughs.pdparams"
    path.write_bytes(b"\x80\x04}X\x01\x00\x00\x00k" + body + b"s.")
    refused(path, "more than 4194304 values")


def doubling(levels, opcode):
    """Instructions for a container that holds the last one twice, over and over."""
    body = b"]\x94" if opcode == b"l" else b")\x94"
    for n in range(levels):
        body += b"0(h" + bytes([n]) + b"h" + bytes([n]) + opcode + b"\x94"
    return body


@pytest.mark.parametrize("opcodes,words", [
    (b"}" + doubling(40, b"t") + b"K\x01s", "key that is not a plain value"),   # hashes for ever
    (b"}(" + doubling(40, b"t") + b"K\x01u", "key that is not a plain value"),
    (b"(" + doubling(40, b"t") + b"K\x01d", "key that is not a plain value"),
    (b"ccollections\nOrderedDict\n(((" + doubling(40, b"t") + b"K\x01tttR",
     "key that is not a plain value"),
    (b"\x8f(" + doubling(40, b"t") + b"\x90", "object of a class"),            # a set
    (b"(" + doubling(40, b"t") + b"\x91", "object of a class"),
    (b"}" + doubling(40, b"l") + b"b", "attributes"),                          # prints for ever
    (b"cnumpy\ndtype\n(" + doubling(40, b"l") + b"tR", "numpy.dtype"),
    (b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + doubling(40, b"t")
     + b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tRI00\nC\x00tb", "expected whole numbers"),
    (b"\x8b" + struct.pack("<i", 100000) + b"\x01" * 100000, "a whole number of 799993 bits")
])
def test_contents_that_are_endless_to_walk(tmp_path, opcodes, words):
    path = tmp_path / "endless.pdparams"
    path.write_bytes(b"\x80\x04}X\x01\x00\x00\x00k" + opcodes + b"s.")
    began = time.process_time()
    refused(path, words)
    assert time.process_time() - began < 5


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(str(path), "w", compression) as stream:
        for name, data in entries:
            stream.writestr(name, data)
    return path


def content_of(path):
    with zipfile.ZipFile(str(path)) as stream:
        return [(name, stream.read(name)) for name in stream.namelist()]


@pytest.fixture
def honest(tmp_path):
    """An archive whose entries tests can forge."""
    return content_of(save({"weight": torch.ones(4, 4)}, tmp_path / "honest.pth"))


@pytest.mark.parametrize("name", ["../../escape", "/etc/escape", "archive/../../escape",
                                  "archive\\..\\escape"])
def test_path_traversal(tmp_path, honest, name):
    path = archive(tmp_path / "traversal.pth", honest + [(name, b"x")])
    refused(path, "leaves the archive's folder")
    assert not (tmp_path.parent / "escape").exists()


def test_zip_bomb(tmp_path, honest):
    bomb = [(name, b"\0" * (256 * MEGABYTE) if "/data/" in name else data)
            for name, data in honest]
    path = archive(tmp_path / "bomb.pth", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < MEGABYTE
    refused(path, "compressed entry", "torch.save never compresses", limit=4 * MEGABYTE)


def forge_size(path, size):
    """Let the directory claim that each entry has `size` bytes."""
    data = bytearray(path.read_bytes())
    position = data.find(b"PK\x01\x02")
    while position >= 0:
        data[position + 20:position + 28] = struct.pack("<2I", size, size)
        position = data.find(b"PK\x01\x02", position + 4)
    path.write_bytes(bytes(data))


def test_sizes_that_the_archive_does_not_have(tmp_path, honest):
    path = archive(tmp_path / "sizes.pth", honest)
    forge_size(path, 1 << 30)
    refused(path, "entries are larger than the file")


def test_entries_twice_and_archives_of_others(tmp_path, honest):
    with pytest.warns(UserWarning):
        path = archive(tmp_path / "twice.pth", honest + [honest[0]])
    refused(path, "not from torch.save")
    refused(archive(tmp_path / "photos.zip", [("a/b.txt", b"x")]), "not from torch.save")
    path = archive(tmp_path / "after.pth", honest)
    path.write_bytes(path.read_bytes() + b"PK\x05\x06 and something behind it")
    refused(path)


class Storage:
    """Pickles as elements that lie outside the pickle."""

    def __init__(self, numel, key="0"):
        self.pid = ("storage", torch.FloatStorage, key, "cpu", numel)


class _Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


def forged_tensor(path, numel, size, stride, offset=0, elements=16):
    """A file whose pickle declares what its elements are not."""
    stream = io.BytesIO()
    tensor = Calls(torch._utils._rebuild_tensor_v2, Storage(numel), offset, size, stride, False,
                   collections.OrderedDict())
    _Pickler(stream, 2).dump({"weight": tensor})
    return archive(path, [("a/data.pkl", stream.getvalue()), ("a/version", b"3\n"),
                          ("a/data/0", b"\0" * 4 * elements)])


@pytest.mark.parametrize("numel,size,stride,offset", [
    (16, (1 << 40,), (1,), 0), (16, (1 << 20, 1 << 20, 1 << 20), (1, 1, 1), 0),
    (1 << 40, (1 << 40,), (1,), 0), (17, (17,), (1,), 0), (16, (16,), (1,), 1),
    (16, (4, 4), (4, -1), 0), (16, (4,), (1,), -1), (16, (1 << 30,), (0,), 0),
    (16, (4, 4), (4,), 0), (-1, (1,), (1,), 0), (16, (4.0,), (1,), 0)])
def test_shapes_that_the_file_does_not_hold(tmp_path, numel, size, stride, offset):
    refused(forged_tensor(tmp_path / "huge.pth", numel, size, stride, offset),
            limit=MEGABYTE)


def test_the_forged_archive_is_read_where_it_is_honest(tmp_path):
    path = forged_tensor(tmp_path / "fine.pth", 16, (4, 4), (4, 1))
    assert read_weights(str(path)).tensors["weight"].tolist() == [[0.0] * 4] * 4


def test_declared_elements_of_the_older_format(tmp_path):
    path = tmp_path / "legacy.pth"
    save({"weight": torch.ones(1000)}, path, legacy=True)
    data = path.read_bytes()
    number = b"M\xe8\x03"  # 1000 as BININT2
    assert number in data
    for forged in (b"J\xff\xff\xff\x7f", b"M\xe9\x03", b"M\xe7\x03"):
        path.write_bytes(data.replace(number, forged))
        refused(path, limit=MEGABYTE)
    # The count before the elements lies in the same way.
    path.write_bytes(data.replace(number, b"J\x00\x00\x00\x10").replace(
        struct.pack("<q", 1000), struct.pack("<q", 1 << 28)))
    refused(path, "more elements are declared", limit=MEGABYTE)


@pytest.mark.parametrize("kept", [1, 9, 60, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "paddle", "safetensors"])
def test_truncated(tmp_path, kind, kept):
    path = tmp_path / "cut.pth"
    if kind in ("zip", "legacy"):
        save({"w": torch.ones(2000)}, path, kind == "legacy")
    elif kind == "paddle":
        path.write_bytes(pickle.dumps({"w": np.ones(2000, np.float32)}, protocol=4))
    else:
        with open(str(path), "wb") as stream:
            write_safetensors(stream, {"w": torch.ones(2000)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:kept if isinstance(kept, int) else int(len(whole) * kept)])
    refused(path)


def test_arrays_that_are_not_what_they_say(tmp_path):
    good = pickle.dumps({"w": np.ones(1000, np.float32)}, protocol=4)
    path = tmp_path / "shape.pdparams"
    number = b"M\xe8\x03"
    assert good.count(number) == 1
    path.write_bytes(good.replace(number, b"J\xff\xff\xff\x7f"))
    refused(path, "an array [2147483647] of 4 bytes each has 4000 bytes", limit=MEGABYTE)
    path.write_bytes(pickle.dumps({"w": np.array([{"a": 1}], dtype=object)}, protocol=4))
    refused(path, "numpy.dtype O8")
    path.write_bytes(pickle.dumps({"w": np.zeros(2, dtype=[("a", "f4")])}, protocol=4))
    refused(path, "numpy.dtype")
    path.write_bytes(good + b"more")
    refused(path, "something follows")


def test_flipped_bits_in_the_elements_are_noticed(tmp_path):
    path = tmp_path / "flipped.pth"
    save({"w": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    position = bytes(data).find(struct.pack("<2f", 1, 1)) + 400
    data[position] ^= 16
    path.write_bytes(bytes(data))
    refused(path, "damaged")


def test_random_changes_never_leave_another_error(tmp_path):
    """A few hundred damaged files of each kind: read, or refused with a sentence."""
    rng = np.random.default_rng(0)
    state = {name: value for name, value in list(network().state_dict().items())[:4]}
    originals = [tmp_path / name for name in ("a.zip", "b.legacy", "c.safetensors", "d.pdparams")]
    save(state, originals[0])
    save(state, originals[1], legacy=True)
    with open(str(originals[2]), "wb") as stream:
        write_safetensors(stream, state, {"class_names": "[]"})
    originals[3].write_bytes(pickle.dumps(
        {name: value.numpy() for name, value in state.items()}, protocol=4))
    outcomes = {"read": 0, "refused": 0}
    for original in originals:
        data = original.read_bytes()
        for _ in range(150):
            changed = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                # Mostly where structure is, at the start and the end.
                place = int(rng.integers(0, min(len(data), 600)))
                changed[place if rng.random() < 0.7 else -1 - place] = int(rng.integers(0, 256))
            path = tmp_path / "changed"
            path.write_bytes(bytes(changed))
            try:
                read_weights(str(path))
                outcomes["read"] += 1
            except UserError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.parametrize("program,flag", [
    (train, "--resume={}"), (train, "--weights={}"), (train, "--backbone_weights={}"),
    (evaluation, "--trained_model={}"), (convert_weights, "{}")])
def test_every_flag_refuses(tmp_path, program, flag, capsys):
    data, trace = tmp_path / "data", tmp_path / "was_run"
    write_dataset(str(data), seed=3, train=2, val=1)
    path = save({"a": Calls(os.mkdir, str(trace))}, tmp_path / "yolact_shapes_0_1.pth")
    flags = [flag.format(path)]
    if program is convert_weights:
        flags.append(str(tmp_path / "out.pth"))
    else:
        flags += ["--data={}".format(data), "--config=yolact_shapes", "--cuda=False"]
    if program is train:
        flags += ["--batch_size=1", "--num_workers=0", "--no_log"]
    assert run_main(program.main, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "mkdir" in error and error.count("\n") == 1
    assert not trace.exists()
