"""Tensors with the same bytes that share no memory: which of them need not be stored again.

Fine-tuned heads, masks that every layer has, experts that were made from one: they are stored once, and come back as
tensors of their own, tied to nothing. Only tensors that would be treated alike are taken together, but for one that is
kept: equal tensors can only gain by that.

Candidates have one shape and dtype. They are told apart by their first elements, and only those that agree there are
read whole, so that a checkpoint without equal tensors is not read twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from pqcli.core.digests import tensor_bytes
from pqcli.tensors.moments import form_of

if TYPE_CHECKING:
    import torch

    from pqcli.codecs.base import Weights
    from pqcli.plan.plan import PlanEntry

LEAST_BYTES: Final = 1024
"""Smaller tensors are stored as they are: to tell of them would take as much."""
_SAMPLE: Final = 256
"""Elements by which most tensors are told apart."""


def copies_of(entries: Sequence[PlanEntry], weights: Weights) -> dict[str, str]:
    """By the name of every tensor that need not be stored, the one that has the same bytes and is."""
    found: dict[str, str] = {}
    candidates = [entry for entry in entries if entry.action != "alias" and entry.info.n_bytes >= LEAST_BYTES]
    for alike in _grouped(candidates, lambda entry: (entry.info.dtype, entry.info.shape)):
        for similar in _grouped(alike, lambda entry: _sample(entry, weights)):
            for equal in _grouped(similar, lambda entry: _digest(weights.original(entry.info.name))):
                found |= _owners(equal)
    return found


def _owners(equal: Sequence[PlanEntry]) -> dict[str, str]:
    """Which of some equal tensors is held for which.

    One that is as in a base, or else a kept one, for all; else one for all that are coded alike.
    """
    kept = [entry for action in ("base", "keep") for entry in equal if entry.action == action]
    if kept:
        others = [entry for entry in equal if entry is not kept[0] and entry.action != "base"]
        return {entry.info.name: kept[0].info.name for entry in others}
    pairs: dict[str, str] = {}
    for first, *others in _grouped(equal, lambda entry: (entry.action, entry.scheme, form_of(entry.info))):
        pairs |= {entry.info.name: first.info.name for entry in others}
    return pairs


def _grouped(entries: Iterable[PlanEntry], key: Callable[[PlanEntry], Hashable]) -> Iterator[list[PlanEntry]]:
    """The groups of more than one that share a key; the key is asked for only where there are several entries."""
    groups: dict[Hashable, list[PlanEntry]] = {}
    entries = list(entries)
    for entry in entries if len(entries) > 1 else ():
        groups.setdefault(key(entry), []).append(entry)
    return (group for group in groups.values() if len(group) > 1)


def _sample(entry: PlanEntry, weights: Weights) -> bytes:
    name, numel = entry.info.name, entry.info.numel
    return tensor_bytes(weights.original_flat(name, 0, min(numel, _SAMPLE))).tobytes()


def _digest(tensor: torch.Tensor) -> bytes:
    """A hash so long that nobody makes two tensors that share it."""
    return hashlib.blake2b(tensor_bytes(tensor).data, digest_size=32).digest()
