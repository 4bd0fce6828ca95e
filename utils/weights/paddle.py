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
from utils.weights import ELEMENT_TYPES, tensor_to_bytes, type_name
from utils.weights.pickles import Named, plain, plain_names, unpickle

NAME_TABLE = "StructuredToParameterName@@"
_SPLIT_TABLE = "UnpackBigParamInfor@@"
PROTOCOL = 4


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
        # What protocols 2 and 3 wrote in parts of 1 GiB.
        for name, table in content.pop(_SPLIT_TABLE, {}).items():
            parts = [content.pop(part, None) for part in table["slices"]]
            if not all(isinstance(part, Tensor) for part in parts):
                raise UserError(f"'{path}' lacks a part of '{name}', which was written in "
                                f"{len(parts)}; save it again with protocol=4")
            content[name] = torch.cat(parts).view(tuple(table["OriginShape"]))
    return content


class _Array:
    """A tensor that the pickler writes as a NumPy array."""

    def __init__(self, tensor: Tensor) -> None:
        # NumPy does not have bfloat16.
        self.tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor


_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Pickler(_PythonPickler):
    dispatch = dict(_PythonPickler.dispatch)

    def _save_array(self, array: _Array) -> None:
        """The instructions by which NumPy 1 pickles an array in row-major order."""
        kind = type_name(array.tensor)
        code = "|b1" if kind == "bool" else ELEMENT_TYPES[kind].str
        self.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n")
        self.save((0,))
        self.save(b"b")
        self.write(pickle.TUPLE3 + pickle.REDUCE + pickle.MARK)
        self.save(1)
        self.save(tuple(array.tensor.shape))
        self.write(b"cnumpy\ndtype\n")
        self.save((code[1:], False, True))
        self.write(pickle.REDUCE)
        self.save((3, code[0], None, None, None, -1, -1, 0))
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
