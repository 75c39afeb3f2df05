"""YAML without its traps: what a recipe file says is what a reader of it would expect.

Plain YAML, as PyYAML reads it, turns `no` into False, `1e-6` into text, `1:30` into 90, `010` into 8, and lets the
second of two equal keys win silently. Here scalars follow the core schema of YAML 1.2 (true/false, decimal and
hexadecimal numbers, null; everything else is text), equal keys are an error, and so are anchors, aliases and tags: a
recipe needs none of them, and a few lines of them can describe more data than a computer holds.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path

import yaml

from pqcli.errors import RecipeError

_MAX_BYTES = 1_000_000


def read(path: Path) -> object:
    """The document in a YAML file, made of dicts, lists, text, numbers, booleans and None.

    Raises `RecipeError` that says what is wrong and on which line; the caller adds the file's name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"is larger than {_MAX_BYTES:,} bytes; this is no recipe")
    try:
        return parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not text in UTF-8 (byte {error.start}); this is no recipe") from error


def parse(text: str) -> object:
    """The document in a YAML text; raises `RecipeError` like `read`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, made stricter
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if error.context == "while scanning an alias":
            raise RecipeError(f"{where}a pattern that starts with a star needs quotes") from error
        raise RecipeError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise RecipeError("is nested too deeply; this is no recipe") from error


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2 scalars, and without anchors, aliases, tags, merges and repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it out
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors (&) and aliases (*) are not supported; a pattern that starts with a star needs quotes"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "tags (!) are not supported; quote the text", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _whole_number(_loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > 40:  # Python refuses, or takes its time, to read thousands of digits
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, 16) if "x" in text else int(text)


def _decimal_number(_loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _decimal_number)
