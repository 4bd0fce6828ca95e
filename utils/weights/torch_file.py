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
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Sequence
import numpy as np
from torch import Tensor
from utils.errors import UserError
from utils.weights.pickles import (
    ANY_MODULE,
    ForbiddenName,
    Named,
    Pending,
    plain,
    plain_names,
    unpickle,
)
from utils.weights.raw import ELEMENT_TYPES, read_bytes, tensor_from_bytes

MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""Follows the protocol's two bytes at the start of a file in the older format."""
_STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
             "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
             "Bool": "bool"}
_END_RECORD = b"PK\x05\x06"
_END_RECORD_SIZE = 22


class _Storage:
    """Elements that tensors look into; `data` follows later in the older format."""

    def __init__(self, kind: str, numel: int) -> None:
        self.kind, self.numel = kind, numel
        self.data: Optional[np.ndarray] = None
        self._flat: Optional[Tensor] = None

    @property
    def num_bytes(self) -> int:
        return self.numel * ELEMENT_TYPES[self.kind].itemsize

    def flat(self) -> Tensor:
        """All elements as one tensor, shared by every tensor of this storage."""
        if self._flat is None:
            if self.data is None or len(self.data) != self.num_bytes:
                raise EOFError("the elements of a tensor are missing")
            self._flat = tensor_from_bytes(self.data, self.kind)
        return self._flat


class _View(NamedTuple):
    """Part of a storage, as files before torch 0.4 have it."""

    storage: _Storage
    offset: int


class _StridedTensor(Pending):
    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        if isinstance(storage, _View):
            storage, offset = storage.storage, storage.offset + offset
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        self.storage, self.offset = storage, offset
        self.size, self.stride = tuple(size), tuple(stride)
        self._tensor: Optional[Tensor] = None

    def resolve(self) -> Tensor:
        if self._tensor is None:
            self._check()
            self._tensor = self.storage.flat().as_strided(self.size, self.stride, self.offset)
        return self._tensor

    def _check(self) -> None:
        """Refuse a shape that reaches beyond the storage, or repeats its elements."""
        numbers = self.size + self.stride + (self.offset,)
        if len(self.size) != len(self.stride) or any(
                type(number) is not int or number < 0 for number in numbers):
            raise pickle.UnpicklingError("a tensor with the shape {!r}".format(self.size))
        count, last = 1, self.offset
        for side, step in zip(self.size, self.stride):
            count *= side
            last += (side - 1) * step
        if count and (last >= self.storage.numel or count > self.storage.numel):
            raise pickle.UnpicklingError("a tensor of shape {} is declared, but the file has {} "
                                         "elements for it".format(list(self.size),
                                                                  self.storage.numel))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _size(sides: Any) -> Any:
    return tuple(sides)


def _names() -> Dict[str, Named]:
    names = plain_names()
    functions: Dict[str, Any] = {
        "torch.Size": _size,
        "torch._utils._rebuild_tensor": _StridedTensor,
        "torch._utils._rebuild_tensor_v2": _StridedTensor,
        "torch._utils._rebuild_parameter": _parameter,
        # Tensors saved on an Ascend card, whatever the plugin's version calls the module: elements
        # in the plain order, and then the format that they had on the card.
        ANY_MODULE + "_rebuild_npu_tensor": _StridedTensor,
    }
    functions.update({"torch.{}Storage".format(name): None for name in _STORAGES})
    names.update({name: Named(name, function) for name, function in functions.items()})
    return names


def _storage_of(pid: Any, fields: int) -> Sequence[Any]:
    """The parts of a persistent id: kind, type, key, place, elements, .."""
    if not isinstance(pid, tuple) or len(pid) < fields or pid[0] != "storage":
        raise ForbiddenName("a {} instead of elements".format(
            pid[0] if isinstance(pid, tuple) and pid else type(pid).__name__))
    name, count = pid[1], pid[4]
    if not isinstance(name, Named) or not name.name.endswith("Storage"):
        raise pickle.UnpicklingError("elements without a type")
    if type(count) is not int or count < 0 or not isinstance(pid[2], str):
        raise pickle.UnpicklingError("{!r} elements".format(count))
    return (_STORAGES[name.name[len("torch."):-len("Storage")]],) + pid[2:]


def read_torch_file(path: str) -> Any:
    """Content of a file from `torch.save`: tensors on the CPU, and plain values.

    Raises:
        UserError: the archive is a TorchScript program or not as torch writes it.
        ForbiddenName: the pickle in the file names something else than tensors.
        Exception: of many kinds, where the file is damaged.
    """
    with open(path, "rb") as stream:
        if stream.read(4) == b"PK\x03\x04":
            return _read_archive(path, stream)
        stream.seek(0)
        return _read_legacy(stream, os.fstat(stream.fileno()).st_size)


def _read_archive(path: str, stream: BinaryIO) -> Any:
    stream.seek(-_END_RECORD_SIZE, os.SEEK_END)
    if stream.read(4) != _END_RECORD:
        raise EOFError("the archive does not end with its directory")
    with zipfile.ZipFile(stream) as archive:
        root = _check_entries(archive, path)
        if archive.NameToInfo.get(root + "/byteorder") is not None and (
                archive.read(root + "/byteorder") != b"little"):
            raise UserError("'{}' was written on a big-endian machine; save it again on a "
                            "little-endian one".format(path))
        storages: Dict[str, _Storage] = {}

        def storage(pid: Any) -> _Storage:
            kind, key, _, numel = _storage_of(pid, 5)[:4]
            if key not in storages:
                entry = archive.getinfo("{}/data/{}".format(root, key))
                found = _Storage(kind, numel)
                if found.num_bytes != entry.file_size:
                    raise pickle.UnpicklingError("{} elements of {} in {} bytes".format(
                        numel, kind, entry.file_size))
                with archive.open(entry) as elements:
                    found.data = read_bytes(elements, entry.file_size)  # type: ignore[arg-type]
                storages[key] = found
            if (storages[key].kind, storages[key].numel) != (kind, numel):
                raise pickle.UnpicklingError("elements with two types")
            return storages[key]

        return plain(unpickle(io.BytesIO(archive.read(root + "/data.pkl")), _names(), storage))


def _check_entries(archive: zipfile.ZipFile, path: str) -> str:
    """Folder of the archive that holds the pickle; refuses what torch.save does not write."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.split("/")[-1] == "constants.pkl" for name in names):
        raise UserError("'{}' is a TorchScript program, not a checkpoint; expected the "
                        "state_dict() of a network".format(path))
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UserError("'{}' has an entry '{}' that leaves the archive's folder; nothing was "
                            "read: get the file from a source you trust".format(path, name))
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(
                "'{}' has a compressed entry '{}' ({} bytes that unpack to {}); torch.save never "
                "compresses, nothing was read: get the file from a source you trust, or unpack it "
                "and save it again".format(path, name, entry.compress_size, entry.file_size))
    size = os.path.getsize(path)
    if sum(entry.file_size for entry in entries) > size:
        raise EOFError("the archive's entries are larger than the file, which has {} bytes".format(
            size))
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1 or len(set(names)) != len(names):
        raise UserError("'{}' is a zip archive, but not from torch.save: it has {} entries named "
                        "data.pkl, expected one".format(path, len(pickles)))
    return pickles[0][:-len("/data.pkl")]


def _read_legacy(stream: BinaryIO, size: int) -> Any:
    names = _names()
    if unpickle(stream, names) != 0x1950a86a20f9469cfc6c:
        raise pickle.UnpicklingError("the first number is not PyTorch's")
    unpickle(stream, names)  # version of the format
    machine = unpickle(stream, names)
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise pickle.UnpicklingError("written on a big-endian machine")
    storages: Dict[str, _Storage] = {}
    declared = [0]

    def storage(pid: Any) -> Any:
        parts = _storage_of(pid, 5)
        kind, key, _, numel = parts[:4]
        if key not in storages:
            storages[key] = _Storage(kind, numel)
            declared[0] += storages[key].num_bytes
            if declared[0] > size:
                raise pickle.UnpicklingError("more elements are declared than the file has")
        found = storages[key]
        if (found.kind, found.numel) != (kind, numel):
            raise pickle.UnpicklingError("elements with two types")
        view = parts[4] if len(parts) > 4 else None
        return found if view is None else _View(found, int(view[1]))

    content = unpickle(stream, names, storage)
    keys: List[str] = unpickle(stream, names)
    for key in keys:
        found = storages[key]
        if int.from_bytes(stream.read(8), "little") != found.numel:
            raise pickle.UnpicklingError("elements are fewer or more than declared")
        found.data = read_bytes(stream, found.num_bytes)
    return plain(content)
