"""PyTorch's own files, read without `torch.load`: the zip format and the one before torch 1.6.

PyTorch before 1.13 has no loader that leaves code alone, and the one of 2.0 to 2.5 could be misled
(CVE-2025-32434). This reader is the same for every version, and besides names it checks sizes: a
file cannot ask for more memory than it has bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import Any, BinaryIO, Callable, NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError
from utils.weights import ELEMENT_TYPES, element_count, read_tensor
from utils.weights.pickles import ANY_MODULE, PLAIN_NAMES, ForbiddenName, Named, Names, unpickle

ZIP_START = b"PK\x03\x04"
MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""Follows the protocol's two bytes at the start of a file in the older format."""
_MAGIC_NUMBER = 0x1950a86a20f9469cfc6c
_STORAGES = {"torch.DoubleStorage": "float64", "torch.FloatStorage": "float32",
             "torch.HalfStorage": "float16", "torch.BFloat16Storage": "bfloat16",
             "torch.LongStorage": "int64", "torch.IntStorage": "int32",
             "torch.ShortStorage": "int16", "torch.CharStorage": "int8",
             "torch.ByteStorage": "uint8", "torch.BoolStorage": "bool"}
_END_RECORD = b"PK\x05\x06"
_END_RECORD_SIZE = 22


class _Elements(NamedTuple):
    """What tensors look into."""

    flat: Tensor


class _Storages:
    """Turns persistent ids into elements, each of which `load(key, kind, count)` makes once."""

    def __init__(self, load: Callable[[str, str, int], Tensor]) -> None:
        self._load = load
        self.found: dict[str, tuple[str, Tensor]] = {}

    def __call__(self, pid: Any) -> _Elements:
        """`("storage", type, key, place, count)`; before torch 0.4 with a view into another."""
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise ForbiddenName("something else instead of elements")
        name, key, count = pid[1], pid[2], pid[4]
        if not isinstance(name, Named) or name.name not in _STORAGES:
            raise pickle.UnpicklingError("elements without a type")
        if type(key) is not str:
            raise pickle.UnpicklingError("elements without a name")
        kind = _STORAGES[name.name]
        element_count((count,))
        if key not in self.found:
            self.found[key] = kind, self._load(key, kind, count)
        known, flat = self.found[key]
        if (known, len(flat)) != (kind, count):
            raise pickle.UnpicklingError("elements with two types")
        if len(pid) == 6 and pid[5] is not None:
            element_count((pid[5][1],))
            flat = flat[pid[5][1]:]
        return _Elements(flat)


def _tensor(elements: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor that looks into elements; refused if it reaches beyond them, or repeats them."""
    if not isinstance(elements, _Elements):
        raise pickle.UnpicklingError("a tensor without a storage")
    flat, size, stride = elements.flat, tuple(size), tuple(stride)
    count = element_count(size)
    element_count(stride + (offset,))  # whole numbers, as those of the size
    last = offset + sum((side - 1) * step for side, step in zip(size, stride))
    if len(size) != len(stride) or (count and max(last + 1, count) > len(flat)):
        raise pickle.UnpicklingError(f"a tensor of shape {list(size)} is declared, but the file "
                                     f"has {len(flat)} elements for it")
    return flat.as_strided(size, stride, flat.storage_offset() + offset if count else 0)


_NAMES: Names = {
    **PLAIN_NAMES, **dict.fromkeys(_STORAGES),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    # Tensors saved on an Ascend card, whatever the plugin's version calls the module: elements in
    # the plain order, and then the format that they had on the card.
    ANY_MODULE + "_rebuild_npu_tensor": _tensor}


def read_torch_file(path: str) -> Any:
    """Content of a file from `torch.save`: tensors on the CPU, and plain values.

    Raises:
        UserError: the archive is a TorchScript program or not as torch writes it.
        ForbiddenName: the pickle in the file names something else than tensors.
        Exception: of many kinds, where the file is damaged.
    """
    with open(path, "rb") as stream:
        if stream.read(4) == ZIP_START:
            return _read_archive(path, stream)
        stream.seek(0)
        return _read_legacy(stream, os.fstat(stream.fileno()).st_size)


def _read_archive(path: str, stream: BinaryIO) -> Any:
    stream.seek(-_END_RECORD_SIZE, os.SEEK_END)
    if stream.read(4) != _END_RECORD:
        raise EOFError("the archive does not end with its directory")
    with zipfile.ZipFile(stream) as archive:
        root = _check_entries(archive, path)
        if root + "/byteorder" in archive.NameToInfo and (
                archive.read(root + "/byteorder") != b"little"):
            raise UserError(f"'{path}' was written on a big-endian machine; save it again on a "
                            "little-endian one")

        def load(key: str, kind: str, count: int) -> Tensor:
            entry = archive.getinfo(f"{root}/data/{key}")
            if count * ELEMENT_TYPES[kind].itemsize != entry.file_size:
                raise pickle.UnpicklingError(
                    f"{count} elements of {kind} in {entry.file_size} bytes")
            with archive.open(entry) as elements:
                return read_tensor(elements, kind, count)

        return unpickle(io.BytesIO(archive.read(root + "/data.pkl")), _NAMES, _Storages(load))


def _check_entries(archive: zipfile.ZipFile, path: str) -> str:
    """Folder of the archive that holds the pickle; refuses what torch.save does not write."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.split("/")[-1] == "constants.pkl" for name in names):
        raise UserError(f"'{path}' is a TorchScript program, not a checkpoint; expected the "
                        "state_dict() of a network")
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UserError(f"'{path}' has an entry '{name}' that leaves the archive's folder; "
                            "nothing was read: get the file from a source you trust")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(
                f"'{path}' has a compressed entry '{name}' ({entry.compress_size} bytes that "
                f"unpack to {entry.file_size}); torch.save never compresses, nothing was read: get "
                "the file from a source you trust, or unpack it and save it again")
    size = os.path.getsize(path)
    if sum(entry.file_size for entry in entries) > size:
        raise EOFError(f"the archive's entries are larger than the file, which has {size} bytes")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1 or len(set(names)) != len(names):
        raise UserError(f"'{path}' is a zip archive, but not from torch.save: it has "
                        f"{len(pickles)} entries named data.pkl, expected one")
    return pickles[0][:-len("/data.pkl")]


def _read_legacy(stream: BinaryIO, size: int) -> Any:
    """Pickles of a number, a version, the machine, the content and the keys; then the elements."""
    if unpickle(stream, _NAMES) != _MAGIC_NUMBER:
        raise pickle.UnpicklingError("the first number is not PyTorch's")
    unpickle(stream, _NAMES)
    machine = unpickle(stream, _NAMES)
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise pickle.UnpicklingError("written on a big-endian machine")
    declared = 0

    def load(key: str, kind: str, count: int) -> Tensor:
        nonlocal declared
        declared += count * ELEMENT_TYPES[kind].itemsize
        if declared > size:
            raise pickle.UnpicklingError("more elements are declared than the file has")
        return torch.zeros(count, dtype=getattr(torch, kind))  # filled below

    storages = _Storages(load)
    content = unpickle(stream, _NAMES, storages)
    keys = unpickle(stream, _NAMES)
    if not isinstance(keys, list) or any(type(key) is not str for key in keys) or (
            set(keys) != set(storages.found)):
        raise pickle.UnpicklingError("the elements of a tensor are missing")
    for key in keys:
        kind, flat = storages.found[key]
        if int.from_bytes(stream.read(8), "little") != len(flat):
            raise pickle.UnpicklingError("elements are fewer or more than declared")
        flat.copy_(read_tensor(stream, kind, len(flat)))
    return content
