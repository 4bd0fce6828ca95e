"""Paddle's `.pdparams`: a pickle of a dictionary of NumPy arrays.

Written so that Paddle 2 and 3 read it with NumPy 1 and 2: protocol 4, and the module names of
NumPy 1, which NumPy 2 keeps for old files.
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO, Mapping

import numpy as np
import torch
from torch import Tensor

from utils.weights.pickles import PLAIN_NAMES, unpickle

NAME_TABLE = "StructuredToParameterName@@"
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
    names = {**PLAIN_NAMES, "builtins.tuple": _tuple, "__builtin__.tuple": _tuple}
    with open(path, "rb") as stream:
        content = unpickle(stream, names)
        if stream.read(1):
            raise pickle.UnpicklingError("something follows the pickle")
    if isinstance(content, dict):
        content.pop(NAME_TABLE, None)
    return content


_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Pickler(_PythonPickler):
    dispatch = dict(_PythonPickler.dispatch)

    def _save_array(self, array: np.ndarray) -> None:
        """The instructions by which NumPy 1 pickles an array in row-major order."""
        order, code = array.dtype.str[0], array.dtype.str[1:]
        self.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n")
        self.save((0,))
        self.save(b"b")
        self.write(pickle.TUPLE3 + pickle.REDUCE + pickle.MARK)
        self.save(1)
        self.save(tuple(array.shape))
        self.write(b"cnumpy\ndtype\n")
        self.save((code, False, True))
        self.write(pickle.REDUCE)
        self.save((3, order, None, None, None, -1, -1, 0))
        self.write(pickle.BUILD)
        self.save(False)
        self.save(array.tobytes())
        self.write(pickle.TUPLE + pickle.BUILD)

    dispatch[np.ndarray] = _save_array


def write_pdparams(stream: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict that `paddle.load` reads; bfloat16 becomes float32."""
    content: dict[str, Any] = {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
        for name, tensor in tensors.items()}
    content[NAME_TABLE] = {name: name for name in tensors}
    _Pickler(stream, PROTOCOL).dump(content)
