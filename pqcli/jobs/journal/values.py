"""Results of tasks as bytes, and back.

Not pickle, which can be made to run anything: the bytes name values of a few kinds and, out of a list, dataclasses of
this package, which are made by their own constructors. A value begins with the letter of its kind:

    N T F       None, True, False
    i f s b     an integer, a float, text, bytes
    a g         a numpy array, or a lone number: dtype, shape, bytes
    t l d z     a tuple, a list, a dict (its keys and values in turn), a frozenset, with the number of items
    o           a dataclass: its name and its fields as a dict
    w           the weights of the run itself, which no file holds
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Final

import numpy as np

from pqcli.codecs.base import Weights

Buffer = bytes | memoryview
KNOWN: Final = frozenset({
    "pqcli.codecs.base:Draft",
    "pqcli.codecs.base:Original",
    "pqcli.codecs.base:Piece",
    "pqcli.codecs.base:StreamPiece",
    "pqcli.codecs.base:Use",
    "pqcli.codecs.kept:KeptJob",
    "pqcli.codecs.rate.survey:Seen",
    "pqcli.codecs.trellis.session:StreamFacts",
    "pqcli.codecs.values:ExactJob",
    "pqcli.core.metrics:Error",
    "pqcli.stats.damage:Damage",
    "pqcli.tensors.info:TensorInfo",
    "pqcli.tensors.records:Alias",
    "pqcli.tensors.records:Coded",
    "pqcli.tensors.records:Copy",
    "pqcli.tensors.records:Kept",
    "pqcli.tensors.records:Moments",
    "pqcli.tensors.records:Plain",
    "pqcli.tensors.records:Record",
    "pqcli.tensors.records:Same",
})  # fmt: skip
"""The dataclasses that results are made of."""
_DEEPEST: Final = 40
_LENGTH: Final = struct.Struct("<Q")
_FLOAT: Final = struct.Struct("<d")
_CONSTANTS: Final = {b"N": None, b"T": True, b"F": False}
_MANY: Final[tuple[tuple[type, bytes, Callable[[list[Any]], Any]], ...]] = (
    (tuple, b"t", tuple),
    (list, b"l", list),
    (frozenset, b"z", frozenset),
)


def encoded(value: object) -> list[Buffer]:
    """The bytes of a value, in pieces; large ones are not copied. Raises TypeError for what has no bytes."""
    out: list[Buffer] = []
    _encode(value, out)
    return out


def decoded(data: Buffer, weights: object) -> Any:
    """The value of these bytes; `weights` are what a value holds of the run itself.

    Raises ValueError for bytes that `encoded` did not write. Nothing is run but constructors of `KNOWN`.
    """
    reader = _Reader(memoryview(data), weights)
    value = reader.value(0)
    if reader.at != len(data):
        raise ValueError(f"{len(data) - reader.at} bytes behind a value")
    return value


def _encode(value: Any, out: list[Buffer]) -> None:
    if value is None or value is True or value is False:
        out.append(b"N" if value is None else b"T" if value else b"F")
    elif isinstance(value, np.ndarray | np.generic):
        _encode_array(value, out)
    elif type(value) is int:
        _sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True), out)
    elif type(value) is float:
        out.append(b"f" + _FLOAT.pack(value))
    elif type(value) is str:
        _sized(b"s", value.encode("utf-8", "surrogatepass"), out)
    elif type(value) is bytes:
        _sized(b"b", value, out)
    elif type(value) is dict:
        _many(b"d", [item for pair in value.items() for item in pair], out)
    elif isinstance(value, Weights):
        out.append(b"w")
    elif is_dataclass(value) and _name(type(value)) in KNOWN:
        out.append(b"o")
        _encode(_name(type(value)), out)
        _encode({field.name: getattr(value, field.name) for field in fields(value)}, out)
    else:
        letter = next((letter for kind, letter, _ in _MANY if type(value) is kind), None)
        if letter is None:
            raise TypeError(f"a journal holds no {_name(type(value))}")
        _many(letter, list(value), out)


def _encode_array(value: np.ndarray[Any, Any] | np.generic, out: list[Buffer]) -> None:
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    _check_dtype(array.dtype)
    out.append(b"a" if isinstance(value, np.ndarray) else b"g")
    _encode(array.dtype.str, out)
    _encode(array.shape, out)
    _sized(b"b", array.reshape(-1).view(np.uint8).data, out)


def _sized(letter: bytes, data: Buffer, out: list[Buffer]) -> None:
    out += [letter + _LENGTH.pack(len(data)), data]


def _many(letter: bytes, items: Sequence[object], out: list[Buffer]) -> None:
    out.append(letter + _LENGTH.pack(len(items)))
    for item in items:
        _encode(item, out)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biufc":
        raise TypeError(f"a journal holds no arrays of {dtype}")


class _Reader:
    """Reads values one after another, and nothing beyond the end."""

    def __init__(self, data: memoryview, weights: object) -> None:
        self.data, self.at, self.weights = data, 0, weights

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("values too deep in each other")
        letter = bytes(self._take(1))
        if letter in _CONSTANTS:
            return _CONSTANTS[letter]
        if letter == b"w":
            return self.weights
        if letter == b"f":
            return _FLOAT.unpack(self._take(_FLOAT.size))[0]
        if letter in (b"i", b"s", b"b"):
            return self._sized(letter)
        if letter in (b"a", b"g"):
            return self._array(depth, is_lone=letter == b"g")
        if letter == b"o":
            return self._object(depth)
        items = [self.value(depth + 1) for _ in range(self._count())]
        try:
            if letter == b"d":
                return dict(zip(items[::2], items[1::2], strict=True))
            return next(make for _, known, make in _MANY if known == letter)(items)
        except (TypeError, StopIteration) as error:  # a key that cannot be one; a letter that is none
            raise ValueError(f"no value: {letter!r}") from error

    def _take(self, n_bytes: int) -> memoryview:
        if n_bytes > len(self.data) - self.at:
            raise ValueError("a value ends before its end")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def _count(self) -> int:
        """A number of things of a byte at least."""
        found: int = _LENGTH.unpack(self._take(_LENGTH.size))[0]
        if found > len(self.data) - self.at:
            raise ValueError(f"{found} things in {len(self.data) - self.at} bytes")
        return found

    def _sized(self, letter: bytes) -> Any:
        data = bytes(self._take(self._count()))
        if letter == b"s":
            return data.decode("utf-8", "surrogatepass")  # a UnicodeDecodeError is a ValueError
        return data if letter == b"b" else int.from_bytes(data, "little", signed=True)

    def _array(self, depth: int, *, is_lone: bool) -> Any:
        name, shape, data = (self.value(depth + 1) for _ in range(3))
        try:
            dtype = np.dtype(name if isinstance(name, str) and len(name) <= len("<c16") else "?")
            _check_dtype(dtype)
            array = np.frombuffer(data, dtype).reshape(shape)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return array[()] if is_lone and not array.shape else array.copy()

    def _object(self, depth: int) -> Any:
        name, values = self.value(depth + 1), self.value(depth + 1)
        if not isinstance(name, str) or name not in KNOWN or not isinstance(values, dict):
            raise ValueError(f"no dataclass of results: {name!r}")
        module, _, kind = name.partition(":")
        try:
            return getattr(importlib.import_module(module), kind)(**values)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error
