"""Objects of a pickle that are no tensors: which classes may be mentioned, and which come back as what they were.

Nothing here is built from a name in the file. A mentioned class or function is a `Global`, its call an `Instance`: what
it was given, as data. Three kinds of names are told apart:

- *carried*: the classes of `CARRIED`, small classes of the standard library that training scripts keep beside their
  tensors. They are written back as the same class.
- *known of*: everything outside the standard library, and what of it is harmless. An object of such a class is left
  out, and told, unless it is a plain dict or list at heart, which it then comes back as.
- *refused*: the rest of the standard library (`os.system`, `builtins.eval` ...), which no checkpoint needs.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import fractions
import os
import pathlib
import re
import sys
import types
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_ARGUMENTS = 1 << 12
_SHOWN = 60


@dataclass(frozen=True)
class Global:
    """A name the pickle refers to; never imported."""

    name: str


class Instance(dict[Any, Any]):
    """What a pickle says of an object, as data.

    `name` is its class, or the function that makes it, called with `arguments`; `state` is what was set on it
    afterwards, `elements` what was appended, and as a dict it holds what was set by key. Equal only to itself, so that
    it may be a key.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.arguments = arguments
        self.elements: list[Any] = []
        self.state: Any = None

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __repr__(self) -> str:
        shown = ", ".join(ascii(value) for value in self.arguments if isinstance(value, (str, int, float)))
        return f"{self.name}({shown[:_SHOWN]})"

    __str__ = __repr__

    def parts(self) -> Iterator[Any]:
        """Everything that it holds."""
        yield from self.values()
        yield from self.elements
        yield from self.arguments
        yield self.state


@dataclass(frozen=True)
class Carried:
    """A class that comes back as itself.

    `inner` says where its contents are: in its "state" (attributes), "items" (by key), "elements", or "none" of these.
    `arguments` gives the arguments of its constructor as plain values, from an instance; `build` makes the object from
    them and the contents. Both raise TypeError or ValueError where the instance is not what its class would pickle.
    """

    inner: Literal["state", "items", "elements", "none"]
    arguments: Callable[[Instance], list[Any]]
    build: Callable[[list[Any], Any], Any]
    key: bool = False
    """Whether it may be the key of a dict."""


FACTORIES = {"builtins.list": list, "builtins.dict": dict, "builtins.set": set, "builtins.tuple": tuple,
             "builtins.int": int, "builtins.float": float, "builtins.str": str, "builtins.bool": bool,
             "collections.OrderedDict": collections.OrderedDict}  # fmt: skip
"""What a defaultdict may call for a missing key."""


def _nothing(instance: Instance) -> list[Any]:
    _expect(not instance.arguments)
    return []


def _plain_arguments(instance: Instance) -> list[Any]:
    _expect(len(instance.arguments) <= _MAX_ARGUMENTS and instance.state is None)
    _expect(all(value is None or type(value) in {str, int, bytes} for value in instance.arguments))
    return list(instance.arguments)


def _dated(instance: Instance) -> list[Any]:
    """Arguments of which one may be a time zone, and that of a time zone a timedelta."""
    _expect(len(instance.arguments) <= 8 and instance.state is None)
    return [
        [value.name, *_dated(value)] if isinstance(value, Instance) else _scalar(value) for value in instance.arguments
    ]


def _scalar(value: Any) -> Any:
    _expect(value is None or type(value) in {str, int, bytes})
    return value


def _factory(instance: Instance) -> list[Any]:
    if not instance.arguments or instance.arguments == (None,):
        return []
    (factory,) = instance.arguments
    _expect(isinstance(factory, Global) and factory.name in FACTORIES)
    return [factory.name]


def _max_length(instance: Instance) -> list[Any]:
    start, *rest = instance.arguments or ((),)
    _expect(isinstance(start, (tuple, list)) and not start and len(rest) <= 1)
    _expect(not rest or type(rest[0]) is int)
    return rest


def _set(function: Callable[..., Any]) -> Carried:
    return Carried("elements", _nothing, lambda _, contents: function(contents))


def _counter(_: list[Any], contents: Any) -> Any:
    return collections.Counter(contents)


def _uuid_number(instance: Instance) -> list[Any]:
    _expect(isinstance(instance.state, dict) and set(instance.state) == {"int"} and type(instance.state["int"]) is int)
    return [instance.state["int"]]


def _expect(holds: bool) -> None:
    if not holds:
        raise TypeError("not what its class pickles")


def _path_class(name: str) -> Callable[..., Any]:
    """The concrete classes exist on their own system only; elsewhere the pure one says the same."""
    here = "Posix" if os.name == "posix" else "Windows"
    return getattr(pathlib, name if here in name or "Pure" in name else f"Pure{name}")  # type: ignore[no-any-return]


def _path(name: str) -> Carried:
    def build(arguments: list[Any], _: Any) -> Any:
        _expect(all(isinstance(part, str) for part in arguments))
        return _path_class(name)(*arguments)

    return Carried("none", _plain_arguments, build, key=True)


def _time(function: Callable[..., Any]) -> Carried:
    def build(arguments: list[Any], _: Any) -> Any:
        return function(*(_built(value) if isinstance(value, list) else value for value in arguments))

    return Carried("none", _dated, build, key=True)


def _built(node: list[Any]) -> Any:
    name, *arguments = node
    _expect(name in {"datetime.timedelta", "datetime.timezone"})
    return CARRIED[name].build(arguments, None)


def _with_attributes(function: Callable[[], Any]) -> Carried:
    def build(_: list[Any], contents: Any) -> Any:
        _expect(isinstance(contents, dict) and all(isinstance(name, str) for name in contents))
        made = function()
        vars(made).update(contents)
        return made

    return Carried("state", _nothing, build)


def _default_dict(arguments: list[Any], contents: Any) -> Any:
    return collections.defaultdict(FACTORIES[arguments[0]] if arguments else None, contents)


def _deque(arguments: list[Any], contents: Any) -> Any:
    return collections.deque(contents, *arguments)


def _decimal(arguments: list[Any], _: Any) -> Any:
    _expect(len(arguments) == 1 and isinstance(arguments[0], str) and len(arguments[0]) <= _MAX_ARGUMENTS)
    return decimal.Decimal(arguments[0])


def _fraction(arguments: list[Any], _: Any) -> Any:
    if len(arguments) == 1 and isinstance(arguments[0], str):
        _expect(re.fullmatch(r"-?\d{1,999}(/\d{1,999})?", arguments[0]) is not None)
    return fractions.Fraction(*arguments)


CARRIED: dict[str, Carried] = {
    "argparse.Namespace": _with_attributes(argparse.Namespace),
    "types.SimpleNamespace": _with_attributes(types.SimpleNamespace),
    "collections.defaultdict": Carried("items", _factory, _default_dict),
    "collections.Counter": Carried("items", _nothing, _counter),
    "builtins.set": _set(set),
    "builtins.frozenset": _set(frozenset),
    "collections.deque": Carried("elements", _max_length, _deque),
    **{
        f"pathlib.{name}": _path(name)
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    "datetime.datetime": _time(dt.datetime),
    "datetime.date": _time(dt.date),
    "datetime.time": _time(dt.time),
    "datetime.timedelta": _time(dt.timedelta),
    "datetime.timezone": _time(dt.timezone),
    "decimal.Decimal": Carried("none", _plain_arguments, _decimal, key=True),
    "fractions.Fraction": Carried("none", _plain_arguments, _fraction, key=True),
    "uuid.UUID": Carried("none", _uuid_number, lambda arguments, _: uuid.UUID(int=arguments[0]), key=True),
}  # fmt: skip
"""The classes that come back as themselves, by name."""

_HARMLESS = re.compile(
    r"builtins\.(?:list|dict|tuple|set|frozenset|int|float|str|bool|bytes|bytearray|complex|object|type|slice|range)"
    r"|functools\.partial|random\.Random|re\._compile|string\.Template|ipaddress\.[A-Za-z0-9]+"
    r"|(?:typing|types|enum|dataclasses|logging|numbers|abc|zoneinfo|collections|math|statistics)\.[A-Za-z0-9_.]+"
    r"|(?:collections\.)?UserDict\.[A-Za-z0-9]+"
)
_STANDARD = frozenset(sys.stdlib_module_names) | {"__builtin__", "commands", "copy_reg", "cPickle", "distutils", "nt",
                                                  "popen2", "posix", "posixfile", "urllib2"}  # fmt: skip
"""Modules of the standard library, those of other systems and of Python 2 among them."""


SETS = ("builtins.set", "builtins.frozenset")


def is_refused(name: str) -> bool:
    """Whether a name stands for something that no checkpoint needs and that could do harm where it is run."""
    return name.split(".", 1)[0] in _STANDARD and name not in CARRIED and _HARMLESS.fullmatch(name) is None
