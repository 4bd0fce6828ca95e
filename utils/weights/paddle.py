"""Paddle's `.pdparams`: a pickle of a dictionary of NumPy arrays.

Written so that Paddle 2 and 3 read it with NumPy 1 and 2: protocol 4, and the module names of
NumPy 1, which NumPy 2 keeps for old files.
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO, Dict, Mapping
import torch
from torch import Tensor
from utils.errors import UserError
from utils.weights.pickles import Named, plain, plain_names, unpickle
from utils.weights.raw import tensor_to_bytes, type_name

NAME_TABLE = "StructuredToParameterName@@"
_SPLIT_TABLE = "UnpackBigParamInfor@@"
PROTOCOL = 4
_CODES = {"float64": "f8", "float32": "f4", "float16": "f2", "int64": "i8", "int32": "i4",
          "int16": "i2", "int8": "i1", "uint8": "u1", "bool": "b1"}


def _tuple(items: Any = ()) -> Any:
    """Paddle writes a single tensor as a pair of its name and its array."""
    items = tuple(items)
    return items[1] if len(items) == 2 and isinstance(items[0], str) else items


def read_pdparams(path: str) -> Any:
    """Content of the file: tensors and plain values; Paddle's own table of names is left out.

    Raises:
        ForbiddenName: the pickle names something else than arrays.
        Exception: of many kinds, where the file is damaged.
    """
    names = dict(plain_names())
    for name in ("builtins.tuple", "__builtin__.tuple"):
        names[name] = Named(name, _tuple)
    with open(path, "rb") as stream:
        content = plain(unpickle(stream, names))
        if stream.read(1):
            raise pickle.UnpicklingError("something follows the pickle")
    if isinstance(content, dict):
        content.pop(NAME_TABLE, None)
        _join_split(content, path)
    return content


def _join_split(content: Dict[Any, Any], path: str) -> None:
    """Put together what protocols 2 and 3 wrote in parts of 1 GiB."""
    for name, table in content.pop(_SPLIT_TABLE, {}).items():
        parts = [content.pop(part, None) for part in table["slices"]]
        if not all(isinstance(part, Tensor) for part in parts):
            raise UserError("'{}' lacks a part of '{}', which was written in {}; save it again "
                            "with protocol=4".format(path, name, len(parts)))
        content[name] = torch.cat(parts).view(tuple(table["OriginShape"]))


class _Array:
    """A tensor that the pickler writes as a NumPy array."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        if tensor.dtype == torch.bfloat16:  # which NumPy does not have
            tensor = tensor.float()
        self.code = _CODES[type_name(tensor)]
        self.tensor = tensor


_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Pickler(_PythonPickler):
    dispatch = dict(_PythonPickler.dispatch)

    def _save_array(self, array: _Array) -> None:
        """The instructions by which NumPy 1 pickles an array in row-major order."""
        self.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n")
        self.save((0,))
        self.save(b"b")
        self.write(pickle.TUPLE3 + pickle.REDUCE + pickle.MARK)
        self.save(1)
        self.save(array.shape)
        self.write(b"cnumpy\ndtype\n")
        self.save((array.code, False, True))
        self.write(pickle.REDUCE)
        self.save((3, "|" if array.code in ("i1", "u1", "b1") else "<", None, None, None, -1, -1,
                   0))
        self.write(pickle.BUILD)
        self.save(False)
        self.save(tensor_to_bytes(array.tensor))
        self.write(pickle.TUPLE + pickle.BUILD)

    dispatch[_Array] = _save_array


def write_pdparams(stream: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict that `paddle.load` reads; bfloat16 becomes float32."""
    content: Dict[str, Any] = {name: _Array(tensor) for name, tensor in tensors.items()}
    content[NAME_TABLE] = {name: name for name in tensors}
    _Pickler(stream, PROTOCOL).dump(content)
