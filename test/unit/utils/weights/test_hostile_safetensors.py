"""Safetensors files made to do harm: one sentence, and nothing large is allocated."""

from __future__ import annotations

import json
import struct

import pytest

from helpers.weight_files import MEGABYTE, refused


def safetensors(path, header, data=b"\0" * 32, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("header,words", [
    ({"a": entry(0, 16), "b": entry(8, 24)}, "overlap"),
    ({"a": entry(0, 16), "b": entry(0, 16)}, "overlap"),
    ({"a": entry(0, 16)}, "the file has 32"),
    ({"a": entry(0, 16), "b": entry(20, 36)}, "leave a gap"),
    ({"a": entry(0, 16), "b": entry(16, 32), "c": entry(32, 48)}, "the file has 32"),
    ({"a": entry(0, 32, (1 << 62,))}, "needs"),
    ({"a": entry(0, 32, (4,))}, "needs 16 bytes"),
    ({"a": entry(-16, 16, (8,))}, "expected whole numbers"),
    ({"a": entry(0, 32, (-8,))}, "expected whole numbers"),
    ({"a": entry(0, 32, (8.0,))}, "expected whole numbers"),
    ({"a": entry(0, 32, (True, 8))}, "expected whole numbers"),
    ({"a": entry(32, 0, (8,))}, "needs"),
    ({"a": entry(0, 32, (8,), "F99")}, "the type F99"),
    ({"a": {"dtype": "F32", "shape": [8]}}, "data_offsets"),
    ({"a": dict(entry(0, 32, (8,)), extra=1)}, "not described"),
    ({"a": entry(0, 32, (8,)), "__metadata__": {"config": 3}}, "metadata"),
    ({"a": entry(0, 32, (8,)), "__metadata__": {"config": "[" * 100000}}, "metadata"),
    ({"a": entry(0, 32, (8,)), "__metadata__": {"class_names": "[1]"}}, "class names"),
    (b'{"a":' + json.dumps(entry(0, 32, (8,))).encode() + b',"a":1}', "stands twice"),
    (b'{"a":' * 100000, ""),
    (b"{nonsense", ""),
])
def test_safetensors_headers_that_lie(tmp_path, header, words):
    refused(safetensors(tmp_path / "lies.safetensors", header), words)


def test_safetensors_with_a_huge_header(tmp_path):
    header = {"a": entry(0, 32, (8,))}
    for length in (1 << 20, 200 * 1000 * 1000, 1 << 62, (1 << 64) - 1):
        refused(safetensors(tmp_path / "huge.safetensors", header, length=length),
                "a header of {} bytes".format(length), limit=MEGABYTE)
