"""From the JSON tree of `tree` back to the Python value, and to a smaller tree.

Both may come from a hostile container: whatever a malformed tree provokes (ValueError, KeyError, TypeError ...) goes to
the caller, who knows which file to blame, and what it may unpack is limited.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint.limits import Budget, Limits
from pqcli.checkpoint.pt.naming import name_of, prefix_of
from pqcli.checkpoint.pt.objects import CARRIED
from pqcli.checkpoint.pt.tree import MAX_INT_BITS, component, run_flags
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pqcli.checkpoint.pt.naming import Path
    from pqcli.checkpoint.pt.tree import Json
    from pqcli.tensors.info import TensorInfo

_MAX_PACKED = 64 << 20


@dataclass(frozen=True)
class TensorSlot:
    """A place for a tensor in a rebuilt value."""

    info: TensorInfo
    parameter: bool = False
    grad: bool = False
    numpy: bool = False


def rebuild(tree: Json, tensors: Sequence[TensorInfo]) -> Any:
    """The Python value that `describe` took apart, with a `TensorSlot` for every tensor.

    `tensors` must be in the order of the description. Raises the exceptions that a malformed tree provokes
    (ValueError, KeyError, TypeError ...): the caller knows which file to blame.
    """
    builder = _Builder(tuple(tree.get("root", [])), tensors)
    value = builder.value(tree["top"], ())
    builder.finish()
    return value


def without(tree: Json, tensors: Sequence[TensorInfo], names: set[str]) -> Json:
    """The tree without the tensors of these names, and without what holds nothing any more because of that.

    In a list or tuple of which something stays, null takes their places. `tensors` are those of the tree, in its
    order.
    """
    pruner = _Pruner(iter([info.name for info in tensors]), names)
    top = pruner.node(tree["top"])
    return {**tree, "top": None if top is _GONE else top}


@dataclass
class _Builder:
    root: Path
    tensors: Sequence[TensorInfo]
    _next: int = 0
    _budget: Budget = field(default_factory=lambda: Budget(Limits(n_bytes=_MAX_PACKED)))
    """Of all that is unpacked together."""

    def finish(self) -> None:
        """Every tensor must have found its place."""
        if self._next != len(self.tensors):
            raise ValueError(f"the structure has places for {self._next} tensors, {len(self.tensors)} are given")

    def value(self, node: Json, path: Path) -> Any:
        """The Python value of a node."""
        if isinstance(node, list):
            return [self.value(item, (*path, str(position))) for position, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        kind = node.get("$")
        if kind is None:
            return {key: self.value(item, (*path, key)) for key, item in node.items()}
        if kind == "tensor":
            return self._slot(node, node.get("name", name_of(path, self.root)))
        if kind == "tuple":
            return tuple(self.value(item, (*path, str(position))) for position, item in enumerate(node["v"]))
        if kind in {"dict", "odict"}:
            return self._dict(node, path)
        if kind == "object":
            carried = CARRIED[node["class"]]
            contents = None if carried.inner == "none" else self.value(node["v"], path)
            return carried.build([self._argument(argument) for argument in node.get("args", [])], contents)
        if kind == "packed":
            return _Builder((), (), _budget=self._budget).value(self._unpacked(node["v"]), ())
        return _plain_value(kind, node["v"])

    def _unpacked(self, text: str) -> Json:
        unpacker = zlib.decompressobj()
        unpacked = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_PACKED)
        if unpacker.unconsumed_tail:
            raise ValueError("a packed entry that is too large")
        try:
            return self._budget.json(unpacked)
        except CheckpointError as error:
            raise ValueError("a packed entry that is too large") from error

    def _argument(self, node: Json) -> Any:
        return [self._argument(part) for part in node] if isinstance(node, list) else self.value(node, ())

    def _dict(self, node: Json, path: Path) -> Any:
        result: dict[Any, Any] = OrderedDict() if node["$"] == "odict" else {}
        prefix = prefix_of(path, self.root)
        for item in node["items"]:
            flags = run_flags(item)
            if flags is None:
                key = self.value(item[0], ())
                result[key] = self.value(item[1], (*path, component(key)))
                continue
            for _ in range(item if isinstance(item, int) else int(item["n"])):
                name = self.tensors[self._next].name
                if not name.startswith(prefix):
                    raise ValueError(
                        f"tensor '{name}' stands where one below '{prefix}' belongs; the order has changed"
                    )
                result[name.removeprefix(prefix)] = self._slot(flags, name)
        if "metadata" in node:
            vars(result)["_metadata"] = self.value(node["metadata"], ())
        return result

    def _slot(self, flags: Json, name: str) -> TensorSlot:
        info = self.tensors[self._next]
        if info.name != name:
            raise ValueError(f"tensor '{info.name}' stands where '{name}' belongs; the order has changed")
        self._next += 1
        return TensorSlot(
            info,
            parameter=bool(flags.get("parameter")),
            grad=bool(flags.get("grad")),
            numpy=bool(flags.get("numpy")),
        )


_GONE: Json = object()
"""What becomes of a node that held nothing but tensors that go."""


@dataclass
class _Pruner:
    names: Iterator[str]
    unwanted: set[str]

    def node(self, node: Json) -> Json:
        """The node without unwanted tensors, or `_GONE`."""
        if isinstance(node, list):
            return self._sequence(node)
        if not isinstance(node, dict):
            return node
        kind = node.get("$")
        if kind is None:
            entries = {key: item for key, value in node.items() if (item := self.node(value)) is not _GONE}
            return entries if entries or not node else _GONE
        if kind == "tensor":
            return _GONE if next(self.names) in self.unwanted else node
        if kind == "tuple":
            items = self._sequence(node["v"])
            return _GONE if items is _GONE else {**node, "v": items}
        if kind in {"dict", "odict"}:
            left = [item for old in node["items"] if (item := self._item(old)) is not _GONE]
            return {**node, "items": left} if left or not node["items"] else _GONE
        if kind == "object" and "v" in node:
            inner = self.node(node["v"])
            return _GONE if inner is _GONE else {**node, "v": inner}
        return node

    def _sequence(self, items: list[Json]) -> Json:
        left = [self.node(item) for item in items]
        if items and all(item is _GONE for item in left):
            return _GONE
        return [None if item is _GONE else item for item in left]

    def _item(self, item: Json) -> Json:
        """An item of a dict: a pair, or a run of tensors, of which some may stay."""
        if isinstance(item, list):
            value = self.node(item[1])
            return _GONE if value is _GONE else [item[0], value]
        n = sum(next(self.names) not in self.unwanted for _ in range(item if isinstance(item, int) else item["n"]))
        if not n:
            return _GONE
        return n if isinstance(item, int) else {**item, "n": n}


def _plain_value(kind: str, v: Json) -> Any:
    import torch

    if kind == "float":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[v]
    if kind == "int":
        if len(v) > MAX_INT_BITS:
            raise ValueError("an integer that is too long")
        return int(v)
    if kind == "bytes":
        return base64.b64decode(v, validate=True)
    if kind == "complex":
        real, imaginary = (part if isinstance(part, (int, float)) else _plain_value("float", part["v"]) for part in v)
        return complex(real, imaginary)
    if kind == "size":
        return torch.Size(v)
    if kind == "device":
        return torch.device(v)
    if kind == "dtype":
        dtype = getattr(torch, v)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"'{v}' is no dtype")
        return dtype
    raise ValueError(f"an entry of unknown kind '{kind}'")
