"""The one reader of pickles: tensors, arrays and plain values, and nothing that a file names runs.

The names in a pickle are looked up in a table of stand-ins written here, so that neither torch's
nor NumPy's functions see what a file says. Nothing that a file brought is hashed or printed but
text and numbers: small files can hold structures that are endless to walk. Python's C unpickler is
not used: a forged memo index makes it allocate gigabytes.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from typing import Any, BinaryIO, Callable, Dict, Iterable, NamedTuple, Optional, Sequence

import numpy as np
from torch import Tensor

from utils.weights import element_count, tensor_from_bytes

MAX_DEPTH = 64
MAX_VALUES = 1 << 22
"""Of a file's content when it is written out, with everything that occurs twice counted twice."""
MAX_BITS = 4096
"""Of a whole number: longer ones take for ever to print."""
ANY_MODULE = "*."
"""Before a name in a table: the name may come from any module."""
_PLAIN = (str, bytes, int, float, bool, type(None))
_OBJECTS_OF_CLASSES = (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.PERSID, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)
# Paddle writes the bits of bfloat16 as uint16; weights are never whole numbers of that type. Other
# unsigned ones (the state of NumPy's random numbers beside weights) are read as their bits.
_ARRAY_TYPES = {"f8": "float64", "f4": "float32", "f2": "float16", "u2": "bfloat16", "i8": "int64",
                "i4": "int32", "i2": "int16", "i1": "int8", "u1": "uint8", "b1": "bool",
                "u8": "int64", "u4": "int32"}


class ForbiddenName(pickle.UnpicklingError):
    """The pickle names something that is neither a tensor nor a plain value."""


class Named(NamedTuple):
    """What a pickle gets for a name it may use; `function` None: it may be named, not called."""

    name: str
    function: Callable[..., Any] | None


Names = Dict[str, Optional[Callable[..., Any]]]
"""What stands in for the names that a pickle may use."""


class _ArrayType:
    """Stand-in for `numpy.dtype`."""

    def __init__(self, code: Any, *_: Any) -> None:
        if type(code) is not str or code not in _ARRAY_TYPES:
            raise ForbiddenName(f"numpy.dtype {code[:9] if type(code) is str else ''}")
        self.code, self.order = code, "<"

    def set_state(self, state: Any) -> None:
        self.order = state[1]
        if any(part is not None for part in state[2:5]):
            raise ForbiddenName("numpy.dtype with fields")


class _Array:
    """Stand-in for a NumPy array."""

    def __init__(self, *_: Any) -> None:
        self.tensor: Tensor | None = None

    def set_state(self, state: Any) -> None:
        self.tensor = _array_tensor(*tuple(state)[-4:])


def _array_tensor(shape: Any, kind: Any, is_fortran: Any, data: Any) -> Tensor:
    """The tensor of an array's state: shape, element type and bytes have to agree."""
    if not isinstance(kind, _ArrayType):
        raise pickle.UnpicklingError("an array without a type")
    if isinstance(data, str):  # from Python 2
        data = data.encode("latin1")
    flat = np.frombuffer(data, dtype=np.uint8)
    width = int(kind.code[1:])
    if element_count(shape) * width != len(flat):
        raise pickle.UnpicklingError(
            f"an array {list(shape)} of {width} bytes each has {len(flat)} bytes")
    if kind.order == ">":
        flat = flat.reshape(-1, width)[:, ::-1].reshape(-1)
    tensor = tensor_from_bytes(np.array(flat), _ARRAY_TYPES[kind.code])
    if is_fortran:
        return tensor.view(tuple(shape)[::-1]).permute(
            *range(len(shape) - 1, -1, -1)).contiguous()
    return tensor.view(tuple(shape))


def _scalar(kind: Any, data: Any) -> Any:
    return _array_tensor((), kind, False, data).item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        raise ForbiddenName("_codecs.encode")
    return text.encode("latin1")


def _plain_key(key: Any) -> Any:
    if type(key) not in _PLAIN or (type(key) is int and key.bit_length() > MAX_BITS):
        raise pickle.UnpicklingError("a dictionary with a key that is not a plain value")
    return key


def _ordered(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return OrderedDict((_plain_key(key), value) for key, value in pairs)


PLAIN_NAMES: Names = {
    "collections.OrderedDict": _ordered, "numpy.ndarray": None, "numpy.dtype": _ArrayType,
    "_codecs.encode": _encode,
    "numpy.core.multiarray._reconstruct": _Array, "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray._reconstruct": _Array, "numpy._core.multiarray.scalar": _scalar}
"""Those of ordered dicts and of NumPy arrays, as NumPy 1 and 2 spell them."""


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_PythonUnpickler):
    """Unpickler for which only the names in a table exist."""

    def __init__(self, stream: Any, names: Names, storage: Callable[[Any], Any] | None) -> None:
        super().__init__(stream, encoding="latin1")
        self._names = names
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        for known in (full_name, ANY_MODULE + name):
            if known in self._names:
                return Named(full_name, self._names[known])
        raise ForbiddenName(full_name)

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise pickle.UnpicklingError("a reference to outside the file")
        return self._storage(pid)

    def load_reduce(self) -> None:
        """Call what was named, with the arguments on the stack."""
        arguments = self.stack.pop()
        named = self.stack[-1]
        if not isinstance(named, Named) or named.function is None:
            raise ForbiddenName(_what(named))
        self.stack[-1] = named.function(*arguments)

    def load_build(self) -> None:
        """Give an object its state. A dict's attributes (`_metadata`) are left out."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (_Array, _ArrayType)):
            target.set_state(state)
        elif not isinstance(target, OrderedDict):
            raise ForbiddenName(f"attributes{_names_in(state)} of {_what(target)}")

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError("items by name of what is no dictionary")
        for key, value in zip(items[::2], items[1::2]):
            target[_plain_key(key)] = value

    def refuse_opcode(self) -> None:
        """End at an instruction that makes objects of a class, or uses a registry."""
        raise ForbiddenName("an object of a class")

    dispatch = {
        **_PythonUnpickler.dispatch, pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        **dict.fromkeys([opcode[0] for opcode in _OBJECTS_OF_CLASSES], refuse_opcode)}


def _what(value: Any) -> str:
    return value.name if isinstance(value, Named) else f"a {type(value).__name__}"


def _names_in(state: Any) -> str:
    """The first attribute that a state would set, for a sentence."""
    for part in state if type(state) is tuple else (state,):
        if isinstance(part, dict) and part:
            return f" '{str(next(iter(part)))[:40]}'"
    return ""


class _Bounded:
    """A file that does not allocate what a forged length asks for."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size

    def read(self, count: int) -> bytes:
        if count > self._size - self._stream.tell():
            raise EOFError("the file ends too early")
        return self._stream.read(count)

    def readline(self) -> bytes:
        return self._stream.readline(MAX_BITS // 4)


def unpickle(stream: BinaryIO, names: Names, storage: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from a file: tensors, arrays as tensors, and plain values. What follows it is
    left in the file.

    A container or tensor that occurs twice is one object. `storage` turns a persistent id into an
    object.

    Raises:
        ForbiddenName: the pickle uses a name that is not in `names`, or sets attributes.
    """
    size = (len(stream.getvalue()) if isinstance(stream, io.BytesIO)
            else os.fstat(stream.fileno()).st_size)
    return _plain(_Unpickler(_Bounded(stream, size), names, storage).load(), {}, 0)[0]


def _plain(value: Any, known: dict[int, tuple[Any, int]], depth: int) -> tuple[Any, int]:
    """A value with tensors in place of stand-ins, anything foreign refused; and of how many values
    it consists when it is written out.
    """
    if type(value) in _PLAIN or isinstance(value, Tensor):
        if type(value) is int and value.bit_length() > MAX_BITS:
            raise pickle.UnpicklingError(f"a whole number of {value.bit_length()} bits")
        return value, 1
    if id(value) in known:
        return known[id(value)]
    if depth > MAX_DEPTH:
        raise pickle.UnpicklingError(f"more than {MAX_DEPTH} levels of lists")
    if isinstance(value, _Array):
        if value.tensor is None:
            raise pickle.UnpicklingError("an array without elements")
        return value.tensor, 1
    if not isinstance(value, dict) and type(value) not in (list, tuple):
        raise ForbiddenName(_what(value))
    inside = value.values() if isinstance(value, dict) else value
    items = [_plain(item, known, depth + 1) for item in inside]
    size = 1 + sum(count for _, count in items)
    contents = [item for item, _ in items]
    result = dict(zip(value, contents)) if isinstance(value, dict) else type(value)(contents)
    if size > MAX_VALUES:
        raise pickle.UnpicklingError(f"more than {MAX_VALUES} values")
    known[id(value)] = result, size
    return result, size
