"""A pickle, read as data: nothing is imported, nothing is called, nothing can run.

`torch.load(weights_only=True)` keeps code out, but it still builds the real objects while the pickle talks: a 40-byte
file can ask for a terabyte `bytearray`, sparse tensors with wild indices crash the process, and every storage is read
to learn a shape. This interpreter executes the same opcodes on *descriptions*: a tensor becomes a `TensorRef` (which
storage, offset, shape, strides), a dtype a `Constant`, an object of any class an `Instance` (see `objects`). Names that
only an attack needs are collected in `unknown_globals`, and the caller refuses the file. `pickletools.genops` does the
lexing and bounds every argument by the bytes that are there.

Only containers that Python's pickle builds (dict, list, tuple) are real; they may be cyclic or shared, so who walks
the result must bound the walk.
"""

from __future__ import annotations

import pickletools
from typing import TYPE_CHECKING, Any

import numpy as np

from pqcli.checkpoint.limits import Budget, Limits
from pqcli.checkpoint.pt.numpy_objects import Foreign, NumpyArray, NumpyType
from pqcli.checkpoint.pt.objects import Global, Instance, is_refused
from pqcli.checkpoint.pt.torch_objects import (
    CALLS,
    DTYPE_NAME,
    DTYPE_OF_STORAGE,
    QUANTIZED_STORAGES,
    UNSUPPORTED,
    Attributed,
    Constant,
    Opaque,
    StorageRef,
    Unsupported,
    checked_key,
    is_known,
)
from pqcli.errors import CheckpointError
from pqcli.tensors.info import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

_MAX_UNKNOWN = 1000
_MARK = object()


class PickleReader:
    """Interprets pickles, one per `load`.

    `unknown_globals` collects the names that were refused, in order of appearance; `storages` has every storage that
    was mentioned, by key. The other methods are the opcodes' own and are reached through the table at the end.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget(Limits())
        self.unknown_globals: list[str] = []
        self.storages: dict[str, StorageRef] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self, file: IO[bytes]) -> Any:
        """The value of the pickle that begins at the file's position; the file then stands behind it.

        Raises `CheckpointError` (the bare fact) for every pickle that is damaged, hostile or beyond what a
        checkpoint needs.
        """
        self.stack, self.memo = [], {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self.budget.operation()
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except CheckpointError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            # the interpreter trusts nothing, so a malformed pickle shows itself as one of these
            raise CheckpointError(f"its pickle is damaged ({type(error).__name__}: {str(error)[:120]})") from error
        except MemoryError as error:
            raise CheckpointError("its pickle asks for more memory than there is; refused") from error
        raise CheckpointError("its pickle has no end; the file is truncated")

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise CheckpointError(f"its pickle uses the operation {name}, which no checkpoint needs; refused")

    # -- stack and memo ------------------------------------------------------------------------------------------

    def pop(self) -> Any:
        """The topmost value."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("unbalanced mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        """The values above the topmost mark, which goes with them."""
        stack = self.stack
        for position in range(len(stack) - 1, -1, -1):
            if stack[position] is _MARK:
                items = stack[position + 1 :]
                del stack[position:]
                return items
        raise ValueError("no mark")

    def top(self) -> Any:
        """The topmost value, which stays."""
        return self.stack[-1]

    def put(self, key: int) -> None:
        """Remember the topmost value under a number."""
        self.memo[key] = self.top()

    def memoize(self, _: Any) -> None:
        """Remember the topmost value under the next number."""
        self.memo[len(self.memo)] = self.top()

    def get(self, key: int) -> None:
        """Push a remembered value."""
        self.stack.append(self.memo[key])

    def text(self, value: str) -> None:
        """Python 2's `str`: bytes that genops shows as latin-1; torch reads them as UTF-8."""
        raw = value.encode("latin-1") if isinstance(value, str) else value
        self.stack.append(raw.decode("utf-8", errors="replace"))

    # -- containers ----------------------------------------------------------------------------------------------

    def tuple(self, n: int) -> None:
        """Make a tuple of the topmost n values."""
        items = tuple(self.pop() for _ in range(n))
        self.stack.append(items[::-1])

    def append(self, items: list[Any]) -> None:
        """Extend the list (or unknown object) on top."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Instance):
            target.elements.extend(items)
        elif not isinstance(target, (Opaque, Foreign)):
            raise TypeError("append to something that is no list")

    def set_items(self, items: list[Any]) -> None:
        """Set alternating keys and values on the dict (or unknown object) on top."""
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = self.top()
        if isinstance(target, (Opaque, Foreign)):
            return
        if not isinstance(target, dict):
            raise TypeError("item assignment to something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    # -- objects -------------------------------------------------------------------------------------------------

    def push_global(self, module: str, name: str) -> None:
        """Push what a module's name stands for; nothing is imported."""
        full = f"{module}.{name}"
        for young, old in _SAME:
            if full.startswith(young):
                full = old + full.removeprefix(young)
        if DTYPE_NAME.fullmatch(full):
            self.stack.append(Constant("dtype", full.removeprefix("torch.")))
        elif is_known(full) or full in _BUILDERS or not is_refused(full):
            self.stack.append(Global(full))
        else:
            original = f"{module}.{name}"
            if len(self.unknown_globals) < _MAX_UNKNOWN and original not in self.unknown_globals:
                self.unknown_globals.append(original)
            self.stack.append(Opaque())

    def stack_global(self) -> None:
        """GLOBAL with its two names on the stack."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a global whose name is no text")
        self.push_global(module, name)

    def reduce(self, _: Any) -> None:
        """Note a call with a tuple of arguments; what is known gives what it stands for."""
        arguments, function = self.pop(), self.pop()
        if isinstance(function, (Opaque, Instance)):
            self.stack.append(Opaque() if isinstance(function, Opaque) else Instance(function.name, (arguments,)))
            return
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is no function")
        if function.name in _BUILDERS:
            _BUILDERS[function.name](self, *arguments)
        elif function.name in UNSUPPORTED:
            self.stack.append(Unsupported(UNSUPPORTED[function.name]))
        elif function.name in CALLS:
            self.stack.append(CALLS[function.name](*arguments))
        elif function.name.startswith("numpy.dtypes."):
            self.stack.append(NumpyType(np.dtype(getattr(np.dtypes, function.name.rsplit(".", 1)[1])).str[1:]))
        else:
            self.stack.append(Instance(function.name, arguments))

    def new_object(self, _: Any) -> None:
        """NEWOBJ: `cls.__new__(cls, *args)`."""
        self.reduce(None)

    def new_object_with_names(self, _: Any) -> None:
        """NEWOBJ_EX: as NEWOBJ, with named arguments."""
        named = self.pop()
        self.reduce(None)
        if isinstance(self.top(), Instance):
            self.top().arguments += (named,)

    def call(self, function: Any, arguments: Any) -> None:
        """As `reduce`, with what it takes from the stack given."""
        self.stack.extend((function, arguments))
        self.reduce(None)

    def attribute(self, owner: Any, name: Any) -> None:
        """`getattr`: how pickles name a class inside a class."""
        if isinstance(owner, Global) and isinstance(name, str):
            self.push_global(owner.name, name)
        else:
            self.stack.append(Opaque() if isinstance(owner, Opaque) else Foreign("an attribute of an object"))

    def build(self, _: Any) -> None:
        """BUILD: set attributes."""
        state, target = self.pop(), self.top()
        if isinstance(target, Instance):
            target.state = state
        elif isinstance(target, NumpyArray):
            target.fill(state)
        elif isinstance(target, Attributed) and isinstance(state, dict):
            target.attributes.update(state)
        elif isinstance(target, NumpyType) and isinstance(state, tuple):
            target.order = str(state[1])
        elif not isinstance(target, (Opaque, Foreign)):
            raise TypeError("attributes set on something that has none")

    def persistent(self, _: Any) -> None:
        """A storage: ('storage', class, key, device, number of elements[, view of old files]); or a module's class."""
        persistent_id = self.pop()
        if isinstance(persistent_id, tuple) and len(persistent_id) == 4 and persistent_id[0] == "module":
            self.stack.append(persistent_id[1])  # a module's class, which old files give with its source text
            return
        kind, storage_class, key, device, size, *view = persistent_id
        if kind != "storage":
            raise ValueError(f"a persistent id of kind {kind!r}")
        if isinstance(storage_class, Opaque):
            self.stack.append(Opaque())
            return
        name = storage_class.name.rsplit(".", 1)[-1]
        if name in QUANTIZED_STORAGES:
            self.stack.append(Unsupported("a quantized tensor"))
            return  # it is refused as soon as a tensor uses it
        dtype = None if name == "UntypedStorage" else DTYPE_OF_STORAGE[name]
        if type(size) is not int or size < 0:
            raise ValueError("a storage without a size")
        storage = StorageRef(str(key), dtype, size, str(device))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {key} occurs with two sizes or types")
        if view and view[0] is not None:
            _, offset, view_size = view[0]
            if type(offset) is not int or type(view_size) is not int or not 0 <= offset <= offset + view_size <= size:
                raise ValueError("a view outside its storage")
            storage = StorageRef(str(key), dtype, size, str(device), offset * ITEM_BYTES[dtype or "uint8"])
        self.stack.append(storage)


_SAME = (
    ("__builtin__.xrange", "builtins.range"),
    ("__builtin__.long", "builtins.int"),
    ("__builtin__.unicode", "builtins.str"),
    ("__builtin__.", "builtins."),
    ("numpy._core.", "numpy.core."),
    ("pathlib._local.", "pathlib."),
)
"""Names that modules had at other times, and the one that the tables use."""

_BUILDERS: dict[str, Callable[..., object]] = {
    "copyreg._reconstructor": lambda reader, kind, _base, _state: reader.call(kind, ()),
    "copy_reg._reconstructor": lambda reader, kind, _base, _state: reader.call(kind, ()),
    "copyreg.__newobj__": lambda reader, kind, *arguments: reader.call(kind, arguments),
    "copyreg.__newobj_ex__": lambda reader, kind, arguments, named: reader.call(kind, (*arguments, named)),
    "builtins.getattr": lambda reader, owner, name: reader.attribute(owner, name),
}
"""Functions through which old protocols do what later ones have operations for."""

# -- opcodes, named as pickletools names them ------------------------------------------------------------------------

_PUSH = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Instance("builtins.set"),
    "MARK": lambda: _MARK,
}


def _dict_from_mark(reader: PickleReader, _: Any) -> None:
    items = reader.pop_to_mark()
    reader.stack.append({})
    reader.set_items(items)


def _frozenset_from_mark(reader: PickleReader, _: Any) -> None:
    frozen = Instance("builtins.frozenset")
    frozen.elements.extend(reader.pop_to_mark())
    reader.stack.append(frozen)


_OPERATIONS: dict[str, Callable[[PickleReader, Any], object]] = {
    "BYTEARRAY8": lambda reader, argument: reader.stack.append(bytes(argument)),
    "PROTO": lambda _reader, _argument: None,
    "FRAME": lambda _reader, _argument: None,
    "STRING": PickleReader.text,
    "BINSTRING": PickleReader.text,
    "SHORT_BINSTRING": PickleReader.text,
    "POP": lambda reader, _: reader.stack.pop(),
    "POP_MARK": lambda reader, _: reader.pop_to_mark(),
    "DUP": lambda reader, _: reader.stack.append(reader.top()),
    "PUT": PickleReader.put,
    "BINPUT": PickleReader.put,
    "LONG_BINPUT": PickleReader.put,
    "MEMOIZE": PickleReader.memoize,
    "GET": PickleReader.get,
    "BINGET": PickleReader.get,
    "LONG_BINGET": PickleReader.get,
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader.pop_to_mark())),
    "TUPLE1": lambda reader, _: reader.tuple(1),
    "TUPLE2": lambda reader, _: reader.tuple(2),
    "TUPLE3": lambda reader, _: reader.tuple(3),
    "LIST": lambda reader, _: reader.stack.append(reader.pop_to_mark()),
    "DICT": _dict_from_mark,
    "FROZENSET": _frozenset_from_mark,
    "APPEND": lambda reader, _: reader.append([reader.pop()]),
    "APPENDS": lambda reader, _: reader.append(reader.pop_to_mark()),
    "ADDITEMS": lambda reader, _: reader.append(reader.pop_to_mark()),
    "SETITEM": lambda reader, _: reader.set_items([reader.pop(), reader.pop()][::-1]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_to_mark()),
    "GLOBAL": lambda reader, argument: reader.push_global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda reader, _: reader.stack_global(),
    "REDUCE": PickleReader.reduce,
    "NEWOBJ": PickleReader.new_object,
    "NEWOBJ_EX": PickleReader.new_object_with_names,
    "BUILD": PickleReader.build,
    "BINPERSID": PickleReader.persistent,
}
