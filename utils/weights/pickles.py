"""An unpickler for tensors, arrays and plain values, which calls nothing that a file names.

The names in a pickle are looked up in a table of stand-ins written here, so that neither torch's
nor NumPy's functions see what a file says. Python's C unpickler is not used: a forged memo index
makes it allocate gigabytes.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Tuple
import numpy as np
from torch import Tensor
from utils.weights.raw import tensor_from_bytes

MAX_DEPTH = 64
ANY_MODULE = "*."
"""Before a name in a table: the name may come from any module."""
_PLAIN = (str, bytes, int, float, bool, type(None))
_REFUSED_OPCODES = (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1,
                    pickle.EXT2, pickle.EXT4, pickle.PERSID)
# Paddle writes the bits of bfloat16 as uint16; weights are never whole numbers of that type.
_ARRAY_TYPES = {"f8": "float64", "f4": "float32", "f2": "float16", "u2": "bfloat16", "i8": "int64",
                "i4": "int32", "i2": "int16", "i1": "int8", "u1": "uint8", "b1": "bool"}


class ForbiddenName(pickle.UnpicklingError):
    """The pickle names something that is neither a tensor nor a plain value."""


class Named:
    """What a pickle gets for a name it may use; `function` None: it may be named, not called."""

    __slots__ = ("name", "function")

    def __init__(self, name: str, function: Optional[Callable[..., Any]] = None) -> None:
        self.name = name
        self.function = function


class Pending:
    """A tensor whose parts are known; made when the whole pickle was read."""

    def resolve(self) -> Tensor:
        """Make the tensor; the same object gives the same tensor."""
        raise NotImplementedError

    def set_state(self, state: Any) -> None:
        """Take what the pickle says after the object was named."""
        raise ForbiddenName("state of a {}".format(type(self).__name__))


class _ArrayType(Pending):
    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "<"
        if self.code not in _ARRAY_TYPES:
            raise ForbiddenName("numpy.dtype {}".format(self.code))

    def set_state(self, state: Any) -> None:
        self.order = str(state[1])
        if any(part is not None for part in state[2:5]):
            raise ForbiddenName("numpy.dtype with fields")

    def resolve(self) -> Tensor:
        raise pickle.UnpicklingError("a type stands where a tensor is expected")


class _Array(Pending):
    """A NumPy array: shape, element type and bytes have to agree."""

    def __init__(self, *_: Any) -> None:
        self.is_number = False
        self.state: Optional[Tuple[Any, ...]] = None
        self._tensor: Optional[Tensor] = None

    def set_state(self, state: Any) -> None:
        self.state = tuple(state)[-4:]

    def resolve(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self._build()
        return self._tensor

    def _build(self) -> Tensor:
        if self.state is None or not isinstance(self.state[1], _ArrayType):
            raise pickle.UnpicklingError("an array without elements")
        shape, kind, fortran, data = self.state
        if isinstance(data, str):  # from Python 2
            data = data.encode("latin1")
        flat = np.frombuffer(data, dtype=np.uint8)
        width = int(kind.code[1:])
        if _count(shape) * width != len(flat):
            raise pickle.UnpicklingError("an array {} of {} bytes each has {} bytes".format(
                list(shape), width, len(flat)))
        if kind.order == ">":
            flat = flat.reshape(-1, width)[:, ::-1].reshape(-1)
        tensor = tensor_from_bytes(np.array(flat), _ARRAY_TYPES[kind.code])
        if fortran:
            return tensor.view(tuple(shape)[::-1]).permute(
                *range(len(shape) - 1, -1, -1)).contiguous()
        return tensor.view(tuple(shape))


def _count(shape: Any) -> int:
    count = 1
    for side in shape:
        if type(side) is not int or side < 0:
            raise pickle.UnpicklingError("an array with the shape {!r}".format(shape))
        count *= side
    return count


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.set_state((shape, kind, order == "F", bytes(data)))
    return array


def _scalar(kind: Any, data: Any) -> _Array:
    array = _Array()
    array.is_number = True
    array.set_state(((), kind, False, data))
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ForbiddenName("_codecs.encode")
    return text.encode("latin1")


def plain_names() -> Dict[str, Named]:
    """The names of ordered dicts and of NumPy arrays, as NumPy 1 and 2 spell them."""
    functions: Dict[str, Optional[Callable[..., Any]]] = {
        "collections.OrderedDict": OrderedDict, "numpy.ndarray": None, "numpy.dtype": _ArrayType,
        "_codecs.encode": _encode}
    for package in ("numpy.core", "numpy._core"):
        functions[package + ".multiarray._reconstruct"] = _Array
        functions[package + ".multiarray.scalar"] = _scalar
        functions[package + ".numeric._frombuffer"] = _from_buffer
    return {name: Named(name, function) for name, function in functions.items()}


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_PythonUnpickler):
    """Unpickler for which only the names in a table exist."""

    dispatch = dict(_PythonUnpickler.dispatch)

    def __init__(self, stream: Any, names: Dict[str, Named],
                 storage: Optional[Callable[[Any], Any]]) -> None:
        super().__init__(stream, encoding="latin1")
        self._names = names
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        full_name = "{}.{}".format(module, name)
        for known in (full_name, ANY_MODULE + name):
            if known in self._names:
                return self._names[known]
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
            raise ForbiddenName(named.name if isinstance(named, Named)
                                else "a {}".format(type(named).__name__))
        self.stack[-1] = named.function(*arguments)

    def load_build(self) -> None:
        """Give an object its state. A dict's attributes (`_metadata`) are left out."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Pending):
            target.set_state(state)
        elif not isinstance(target, OrderedDict):
            raise ForbiddenName("attributes {!r}".format(state)[:100])

    def refuse_opcode(self) -> None:
        """End at an instruction that makes objects of a class, or uses a registry."""
        raise ForbiddenName("an object of a class")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in _REFUSED_OPCODES:
        dispatch[_opcode[0]] = refuse_opcode


class _Bounded:
    """A file that does not allocate what a forged length asks for."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.readline = stream.readline

    def read(self, count: int) -> bytes:
        if count > self._size - self._stream.tell():
            raise EOFError("the file ends too early")
        return self._stream.read(count)


def unpickle(stream: BinaryIO, names: Dict[str, Named],
             storage: Optional[Callable[[Any], Any]] = None) -> Any:
    """Read one pickle from a file; what follows it is left in the file.

    `storage` turns a persistent id into an object. Tensors come back as `Pending`: see `plain`.

    Raises:
        ForbiddenName: the pickle uses a name that is not in `names`, or sets attributes.
    """
    size = (len(stream.getvalue()) if isinstance(stream, io.BytesIO)
            else os.fstat(stream.fileno()).st_size)
    return _Unpickler(_Bounded(stream, size), names, storage).load()


def plain(content: Any) -> Any:
    """Content of a pickle with tensors in place of `Pending`; anything foreign is refused.

    A container or tensor that occurs twice is the same object afterwards too, so a small file
    cannot unfold into a large structure.
    """
    return _plain(content, {}, 0)


def _plain(value: Any, known: Dict[int, Any], depth: int) -> Any:
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if id(value) in known:
        return known[id(value)]
    if depth > MAX_DEPTH:
        raise pickle.UnpicklingError("more than {} levels of lists".format(MAX_DEPTH))
    if isinstance(value, Pending):
        tensor = value.resolve()
        result: Any = tensor
        if isinstance(value, _Array) and value.is_number:
            result = tensor.item()
    elif isinstance(value, dict):
        if not all(type(key) in _PLAIN for key in value):
            raise pickle.UnpicklingError("a dictionary with a key that is not a plain value")
        result = {key: _plain(item, known, depth + 1) for key, item in value.items()}
    elif type(value) in (list, tuple):
        items: List[Any] = [_plain(item, known, depth + 1) for item in value]
        result = items if isinstance(value, list) else tuple(items)
    else:
        raise ForbiddenName(value.name if isinstance(value, Named)
                            else "a {}".format(type(value).__name__))
    known[id(value)] = result
    return result
