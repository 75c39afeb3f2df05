"""The nesting of a `.pt` as JSON, without its tensors.

`describe` walks what the pickle holds and gives the tensors in walk order plus a JSON tree; `rebuilding.rebuild` gives
the same Python value back from the tree and the tensors *in that order*. A tensor's key is not repeated in the tree
where its name implies it, so a flat state dict of any size is just `{"$": "odict", "items": [104]}`.

| JSON                                     | Python                                                             |
|------------------------------------------|--------------------------------------------------------------------|
| null, true, 1, 1.5, "text"               | itself                                                             |
| [...]                                    | list                                                               |
| {"lr": 0.1}                              | dict whose keys are text, with no tensor directly in it            |
| {"$": "dict" or "odict", "items": [...]} | dict, OrderedDict; an item is `[key, value]` or a run of tensors:  |
|                                          | `104`, or `{"n": 104, "parameter": true, "grad": true}`            |
| {"$": "tensor"}                          | the next tensor; "name" where the path does not imply it           |
| {"$": "tuple" / "size" / "complex"}      | with "v", a list                                                   |
| {"$": "bytes" / "float" / "int"}         | with "v": base64; nan, inf, -inf; an integer beyond 64 bits        |
| {"$": "dtype" / "device"}                | with "v", torch's name                                             |
| {"$": "object", "class": ...}            | of a class of `objects.CARRIED`; "args" of its constructor, "v"    |
| {"$": "packed"}                          | any of these: base64 of zlib of JSON, for long `_metadata`         |

A tensor's flag `"numpy": true` says that it was, and becomes again, a numpy array.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint.limits import Budget, Limits
from pqcli.checkpoint.pt.modules import Unpacked, is_module, refusal, unpacked
from pqcli.checkpoint.pt.naming import find_root, is_optimizer, name_of, prefix_of, role_of, tensors_in
from pqcli.checkpoint.pt.numpy_objects import Foreign, NumpyArray
from pqcli.checkpoint.pt.objects import CARRIED, SETS, Carried, Global, Instance
from pqcli.checkpoint.pt.torch_objects import Attributed, Constant, TensorRef, Unsupported
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pqcli.checkpoint.pt.modules import Unpacked, is_module, refusal, unpacked
from pqcli.checkpoint.pt.naming import Path

Json = Any
"""Plain JSON: dict, list, str, int, float, bool, None."""

MAX_INT_BITS = 1 << 13
_PACK_ABOVE = 200


@dataclass(frozen=True)
class Dropped:
    """A non-tensor entry of a `.pt` that JSON cannot carry: where it was, and why it is left out."""

    path: str
    reason: str


@dataclass(frozen=True)
class FoundTensor:
    """A tensor met on the walk; `name` is unique."""

    name: str
    role: str
    ref: TensorRef | NumpyArray


@dataclass(frozen=True)
class Description:
    """What `describe` gives: the tensors in walk order, the JSON tree, what was lost."""

    tensors: tuple[FoundTensor, ...]
    tree: Json
    dropped: tuple[Dropped, ...]


def describe(value: Any, budget: Budget | None = None, *, from_module: bool = False) -> Description:
    """Split a pickle's value into tensors and JSON. With `from_module`, modules are taken for their state dicts.

    Raises `CheckpointError` for tensors that cannot be carried, cycles, and structures too deep or too large.
    """
    budget = budget or Budget(Limits())
    try:
        found = unpacked(value, budget) if from_module else Unpacked(value)
        walk = _Walk(root=find_root(found.value), budget=budget, is_of_optimizer=is_optimizer(found.value))
        walk.dropped += [Dropped(_place(path), reason) for path, reason in found.told]
        node = walk.entry(found.value, ())
    except _Drop:
        node = None
    except RecursionError:
        raise CheckpointError("its structure is nested deeper than can be followed; refused") from None
    tree = {"root": list(walk.root), "top": node} if walk.root else {"top": node}
    return Description(tuple(walk.tensors.values()), tree, tuple(walk.dropped))


class _Drop(Exception):  # noqa: N818 - a signal, not an error
    """Raised for a value that JSON cannot carry; the container that holds it leaves it out."""


@dataclass
class _Walk:
    root: Path
    budget: Budget
    is_of_optimizer: bool = False
    tensors: dict[str, FoundTensor] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    _open: set[int] = field(default_factory=set)
    _numbers: dict[str, int] = field(default_factory=dict)
    _n_told: int = 0
    """How many objects around this one have been told to come back as something plainer."""

    def node(self, value: Any, path: Path) -> Json:
        """The JSON of one value; raises `_Drop` where there is none."""
        self.budget.entries()
        if _is_tensor(value):
            return {"$": "tensor", **self._tensor(value, path)}
        if isinstance(value, Unsupported):
            raise CheckpointError(
                f"tensor '{name_of(path, self.root)}' is {value.reason}; pqcli carries dense tensors only: "
                "save a dense copy first, or leave it out"
            )
        if isinstance(value, (dict, list, tuple)):
            return self._container(value, path)
        if isinstance(value, (str, bytes)):
            self.budget.text(len(value))
        return _scalar(value)

    def entry(self, value: Any, path: Path) -> Json:
        """As `node`, but a value that cannot be carried is noted in `dropped` before `_Drop` is raised."""
        try:
            return self.node(value, path)
        except _Drop as drop:
            self._drop(path, str(drop))
            raise

    def _drop(self, path: Path, reason: str) -> None:
        place = _place(path)
        self.budget.text(len(place) + len(reason))
        self.dropped.append(Dropped(place, reason))

    def _tensor(self, ref: TensorRef | NumpyArray, path: Path) -> dict[str, Json]:
        """Register a tensor; gives its flags, and its name where the path does not imply it."""
        self._check_name(path)
        implied = name_of(path, self.root)
        name = self._unique_name(implied)
        self.budget.text(len(name))
        role = "other" if self.is_of_optimizer else role_of(path, self.root)
        self.tensors[name] = FoundTensor(name, role, ref)
        flags: dict[str, Json] = {}
        if name != implied:
            flags["name"] = name
        if isinstance(ref, NumpyArray):
            return {**flags, "numpy": True}
        for attribute in ref.lost:
            self._drop((*path, attribute), "a Python attribute of a tensor")
        if ref.subclass:
            self._drop(path, f"its class {ref.subclass[:120]}: comes back as an ordinary tensor")
        if ref.parameter:
            flags["parameter"] = True
        if ref.requires_grad:
            flags["grad"] = True
        return flags

    def _unique_name(self, name: str) -> str:
        """`name`, or `name~2`, `name~3` ... where it is taken; the same in every run."""
        candidate = name
        while candidate in self.tensors:
            self._numbers[name] = self._numbers.get(name, 1) + 1
            candidate = f"{name}~{self._numbers[name]}"
        return candidate

    def _check_name(self, path: Path) -> None:
        """A tensor whose name no file can hold is refused: to drop it would lose weights."""
        if not _encodable(name_of(path, self.root)):
            raise CheckpointError(f"a tensor's name is no valid text: {ascii(name_of(path, self.root))[:100]}")

    def _container(self, value: Any, path: Path) -> Json:
        self.budget.level(len(path))
        if id(value) in self._open:
            raise CheckpointError(f"entry '{'.'.join(path)}' contains itself; a cyclic structure cannot be carried")
        self._open.add(id(value))
        try:
            if isinstance(value, Instance):
                return self._instance(value, path)
            if isinstance(value, dict):
                return self._dict(value, path)
            items = list(self._sequence(value, path))
            return items if isinstance(value, list) else {"$": "tuple", "v": items}
        finally:
            self._open.discard(id(value))

    def _sequence(self, value: Sequence[Any], path: Path) -> Iterator[Json]:
        for position, item in enumerate(value):
            try:
                yield self.entry(item, (*path, str(position)))
            except _Drop:
                yield None  # keeps the positions of the others

    def _dict(self, value: dict[Any, Any], path: Path) -> Json:
        items: list[Json] = []
        for key, item in value.items():
            below = (*path, component(key))
            if _is_tensor(item):
                self._check_name(below)
            try:
                key_node = self._key(key, item, below)
                if _is_tensor(item) and isinstance(key, str):
                    implied = prefix_of(path, self.root) + key == name_of(below, self.root)
                    _add_tensor(items, key, self._tensor(item, below), joinable=implied)
                else:
                    items.append([key_node, self.entry(item, below)])
            except _Drop as drop:
                if not self.dropped or self.dropped[-1].path != _place(below):
                    self._drop(below, f"its key is {drop}")
        kind = "odict" if isinstance(value, OrderedDict) else "dict"
        metadata = self._metadata(value, path) if isinstance(value, Attributed) else {}
        if kind == "dict" and all(isinstance(item, list) and isinstance(item[0], str) for item in items):
            plain = dict(items)
            if "$" not in plain:
                return plain
        return {"$": kind, "items": items, **metadata}

    def _key(self, key: Any, item: Any, path: Path) -> Json:
        """The JSON of a dict's key; raises `_Drop` where there is none, unless that would lose tensors."""
        self.budget.text(_n_bytes(key))
        try:
            if isinstance(key, Instance) and key.name in CARRIED and CARRIED[key.name].key:
                return self._instance(key, path)
            return _scalar(key)
        except _Drop:
            if any(isinstance(found, TensorRef) for found in tensors_in(item, self.budget.entries)):
                raise CheckpointError(f"entry '{_place(path)}' holds tensors, and its key cannot be carried") from None
            raise

    # -- objects -------------------------------------------------------------------------------------------------------

    def _instance(self, value: Instance, path: Path) -> Json:
        """An object: as itself, as the plain dict or list that it is at heart, or not at all."""
        if value.name in CARRIED:
            return self._carried(value, CARRIED[value.name], path)
        if is_module(value) and any(True for _ in tensors_in([value], self.budget.entries)):
            raise refusal(value, path)
        heart = _heart(value) or self._attributes(value)
        if heart is None:
            self._check_no_tensors(value, value.parts())
            raise _Drop(f"{_told(value)}: no JSON value")
        kind, inner = heart
        if inner is value or inner is value.elements:
            self._check_no_tensors(value, (value.arguments, value.state))
        if not self._n_told:
            self._drop(path, f"its class {_told(value)}: comes back as a plain {kind}")
        self._n_told += 1
        try:
            return self._dict(value, path) if inner is value else self.node(inner, path)
        finally:
            self._n_told -= 1

    def _attributes(self, value: Instance) -> tuple[str, Any] | None:
        """The attributes of an object that is nothing but them, where they hold tensors: a moving average, say."""
        state = value.state
        if value.arguments or value.elements or len(value) or type(state) is not dict:
            return None
        has_names = all(isinstance(name, str) for name in state)
        return ("dict", state) if has_names and any(True for _ in tensors_in(state, self.budget.entries)) else None

    def _check_no_tensors(self, value: Instance, left: Iterable[Any]) -> None:
        """Raise unless all tensors in what is `left` of an object are also in its items or elements."""
        lost = {id(found) for found in tensors_in(list(left), self.budget.entries) if isinstance(found, TensorRef)}
        if not lost:
            return
        carried = {id(found) for found in tensors_in([list(value.values()), value.elements], self.budget.entries)}
        if lost <= carried and (len(value) or value.elements):
            return
        raise CheckpointError(
            f"{len(lost)} of its tensors are inside an object of {ascii(value.name)[1:-1][:120]}, which only "
            "running its code could build, so pqcli refuses it. If you trust the file, load it once with "
            "torch.load(path, weights_only=False) and save only its state dict"
        )

    def _carried(self, value: Instance, carried: Carried, path: Path) -> Json:
        """An object that comes back as itself."""
        try:
            arguments = carried.arguments(value)
            if carried.inner == "none":
                carried.build(arguments, None)  # an impossible date is found now, not when it is needed
            node: dict[str, Json] = {"$": "object", "class": value.name}
            if arguments:
                node["args"] = [_argument(argument) for argument in arguments]
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            self._check_no_tensors(value, value.parts())
            raise _Drop(f"{_told(value)}, which is not what its class pickles") from error
        self.budget.text(sum(len(part) for part in arguments if isinstance(part, (str, bytes, list))))
        if carried.inner == "state":
            attributes = {} if value.state is None else value.state
            if not isinstance(attributes, dict) or not all(isinstance(name, str) for name in attributes):
                self._check_no_tensors(value, value.parts())
                raise _Drop(f"{_told(value)} with attributes that have no names")
            node["v"] = self._dict(attributes, path)
        elif carried.inner == "items":
            node["v"] = self._dict(value, path)
        elif carried.inner == "elements":
            node["v"] = self._set(value) if value.name in SETS else list(self._sequence(value.elements, path))
        return node

    def _set(self, value: Instance) -> list[Json]:
        """The elements of a set, which are as simple as keys."""
        self._check_no_tensors(value, value.elements)
        items = []
        for element in value.elements:
            self.budget.entries()
            self.budget.text(_n_bytes(element))
            items.append(_scalar(element))
        return items

    # -- what torch sets on a state dict ---------------------------------------------------------------------------

    def _metadata(self, value: Attributed, path: Path) -> dict[str, Json]:
        """What torch sets on a state dict itself: `_metadata`, the versions of its modules. Nothing else is kept."""
        result: dict[str, Json] = {}
        for name, attribute in value.attributes.items():
            place = _place((*path, str(name)))
            walk = _Walk((), self.budget)  # of its own: tensors in an attribute would have no name in the checkpoint
            try:
                node = walk.node(attribute, ())
            except _Drop as drop:
                self.dropped.append(Dropped(place, str(drop)))
                continue
            if name == "_metadata" and not walk.tensors:
                result["metadata"] = _packed(node)
                self.dropped.extend(Dropped(f"{place}.{lost.path}", lost.reason) for lost in walk.dropped)
            else:
                self.dropped.append(Dropped(place, "an attribute set on a dict"))
        return result


def _add_tensor(items: list[Json], key: str, flags: dict[str, Json], *, joinable: bool) -> None:
    """Append a tensor to a dict's items, joining the run before it where it looks the same."""
    if "name" in flags or not joinable:
        items.append([key, {"$": "tensor", **flags}])
    elif items and run_flags(items[-1]) == flags:
        last = items[-1]
        items[-1] = last + 1 if isinstance(last, int) else {**last, "n": last["n"] + 1}
    else:
        items.append({"n": 1, **flags} if flags else 1)


def run_flags(item: Json) -> dict[str, Json] | None:
    """The flags that the tensors of a run share; None where the item is no run."""
    if isinstance(item, int):
        return {}
    if isinstance(item, dict):
        return {key: value for key, value in item.items() if key != "n"}
    return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRef) or (isinstance(value, NumpyArray) and value.dtype is not None)


def _n_bytes(key: Any) -> int:
    """What a key takes where it is written out, roughly."""
    if isinstance(key, tuple):
        return sum(_n_bytes(part) for part in key)
    return len(key) if isinstance(key, (str, bytes)) else 8


def _heart(value: Instance) -> tuple[str, Any] | None:
    """What an object of an unknown class is at heart, and what it holds; None where it is nothing plain."""
    if value.name.startswith("omegaconf.") and isinstance(value.state, dict):
        for name in ("_content", "_val"):
            if name in value.state:
                content = value.state[name]
                kind = "dict" if isinstance(content, dict) else "list" if isinstance(content, list) else "value"
                return kind, content
    if len(value) and not value.elements:
        return "dict", value
    if value.elements and not len(value):
        return "list", value.elements
    return ("dict", value) if value.name.endswith(_EMPTY_DICTS) and not value.arguments else None


_EMPTY_DICTS = ("AttributeDict", "AttrDict", "EasyDict", "OrderedDict", "CfgNode")
"""Classes that are known to be dicts also where they are empty."""


def _told(value: Instance) -> str:
    return repr(value)[:160] if value.arguments else value.name[:160]


def _argument(value: Any) -> Json:
    return [_argument(part) for part in value] if isinstance(value, list) else _scalar(value)


def component(key: Any) -> str:
    """A dict's key as a part of a path."""
    return key if isinstance(key, str) else str(key.value if isinstance(key, Constant) else key)


def _scalar(value: Any) -> Json:
    """The JSON of a value that is no container; raises `_Drop` where there is none."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not _encodable(value):
            raise _Drop("a text that is no valid Unicode")
        return value
    if isinstance(value, int):
        if value.bit_length() < 64:
            return value
        if value.bit_length() > MAX_INT_BITS:
            raise _Drop(f"an integer of {value.bit_length():,} bits")
        return {"$": "int", "v": str(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$": "float", "v": str(value)}
    if isinstance(value, complex):
        return {"$": "complex", "v": [_scalar(value.real), _scalar(value.imag)]}
    return _tagged_scalar(value)


def _tagged_scalar(value: Any) -> Json:
    if isinstance(value, bytes):
        return {"$": "bytes", "v": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Constant):
        return {"$": value.kind, "v": list(value.value) if isinstance(value.value, tuple) else value.value}
    if isinstance(value, tuple):  # a dict key; containers proper never come here
        return {"$": "tuple", "v": [_scalar(item) for item in value]}
    if isinstance(value, Foreign):
        raise _Drop(f"{value.kind}: no JSON value")
    if isinstance(value, NumpyArray):
        raise _Drop(f"{value.kind}: no JSON value")
    if isinstance(value, Global):
        raise _Drop(f"a reference to {value.name[:160]}: no JSON value")
    raise _Drop(f"{_told(value) if isinstance(value, Instance) else type(value).__name__}: no JSON value")


def _place(path: Path) -> str:
    """Where something was, as text that any file can hold."""
    return ".".join(path).encode("utf-8", "backslashreplace").decode() or "(top level)"


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _packed(node: Json) -> Json:
    text = json.dumps(node, separators=(",", ":"))
    if len(text) <= _PACK_ABOVE:
        return node
    return {"$": "packed", "v": base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")}
