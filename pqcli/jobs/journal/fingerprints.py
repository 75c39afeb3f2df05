"""What a task says, as a short hash: by it a result is found again.

A task depends on nothing but its fields, so that one with the same fields, in a run of the same identity
(`pqcli.jobs.journal.identity`), has the same result, whenever it comes: at whichever round, level or place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import Any, Final

import numpy as np
import torch

from pqcli.codecs.base import Weights
from pqcli.core.digests import tensor_bytes

KEY_BYTES: Final = 16
OF_THE_RUN: Final = frozenset({"pqcli.codecs.statistics:Reading"})
"""Classes of what is the same for all tasks of a run, whose identity tells of it; and so are `Weights`."""
BY_ARGUMENTS: Final = frozenset({"pqcli.codecs.trellis.session:WholeMatrix"})
"""Classes of what is made anew in other processes, and depends on the arguments to that."""


class Fingerprints:
    """Makes fingerprints, and remembers those of the values that many tasks share, for as long as these live."""

    def __init__(self, scope: str = "") -> None:
        self._scope = scope
        self._known: dict[int, tuple[object, bytes]] = {}

    def key(self, stage: str, task: object) -> bytes | None:
        """The key of a task of a stage; None where it holds what nobody knows how to take down."""
        try:
            return _hash("key", [self._scope.encode("utf-8", "surrogatepass"), stage.encode(), self._of(task)])
        except TypeError:
            return None

    def _of(self, value: Any) -> bytes:
        kind = _name(type(value))
        if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, np.generic)):
            return _hash(kind, [repr(value).encode("utf-8", "surrogatepass")])
        if isinstance(value, bytes):
            return _hash(kind, [value])
        if isinstance(value, Weights) or kind in OF_THE_RUN:
            return _hash(kind, [])
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = value, self._of_large(value, kind)
        return known[1]

    def _of_large(self, value: Any, kind: str) -> bytes:
        if isinstance(value, np.ndarray | np.generic):
            return _hash(kind, [_array_type(value), np.ascontiguousarray(value).reshape(-1).view(np.uint8).data])
        if isinstance(value, torch.Tensor):
            return _hash(kind, [str((value.dtype, tuple(value.shape))).encode(), tensor_bytes(value.cpu()).data])
        if isinstance(value, torch.dtype | torch.device):
            return _hash(kind, [str(value).encode()])
        if isinstance(value, list | tuple):
            return _hash(kind, map(self._of, value))
        if isinstance(value, AbstractSet):
            return _hash(kind, sorted(map(self._of, value)))
        if isinstance(value, Mapping):
            return _hash("mapping", sorted(self._of(key) + self._of(item) for key, item in value.items()))
        if kind in BY_ARGUMENTS:
            return _hash(kind, [self._of(value.__reduce__()[1])])
        if is_dataclass(value):
            return _hash(kind, [self._of(getattr(value, field.name)) for field in fields(value)])
        raise TypeError(f"nothing is known of {kind!r}")


def _hash(kind: str, parts: Iterable[bytes | memoryview]) -> bytes:
    found = hashlib.blake2b(f"{kind};".encode(), digest_size=KEY_BYTES)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def _array_type(value: np.ndarray[Any, Any] | np.generic) -> bytes:
    if value.dtype.kind not in "biufc":
        raise TypeError(f"nothing is known of arrays of {value.dtype}")
    return f"{value.dtype.str} {value.shape}".encode()


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
