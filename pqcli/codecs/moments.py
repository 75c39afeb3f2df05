"""Moments of optimizers in eight bits a value (`pqcli.core.moments`), each tensor by itself.

Codes and scales are coded without loss once more. What turns out to be no moment (a value not finite, a negative
second moment), or would not get smaller, is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from pqcli.codecs.base import Piece, TensorTask, Weights, dense
from pqcli.codecs.kept import KeptJob
from pqcli.core import moments
from pqcli.core.arrays import as_tensor
from pqcli.core.digests import tensor_hash
from pqcli.core.entropy import lossless
from pqcli.tensors.records import Moments, Record

if TYPE_CHECKING:
    import torch

    from pqcli.core.dtypes import Array

FEATURE: Final = Moments.action
_COPIES: Final = 4
"""Memory that coding takes, in copies of the tensor: itself, what it decodes to, codes, and what is worked with."""


def key(name: str) -> str:
    """The entry of a tensor's moments in the file."""
    return f"moments/{name}"


@dataclass(frozen=True)
class MomentsJob(TensorTask):
    """Code a tensor of moments; `is_compact` as for tensors that are kept."""

    record: Record
    weights: Weights
    is_compact: bool

    @property
    def n_bytes(self) -> int:
        """Working copies of the tensor."""
        return _COPIES * self.record.info.n_bytes

    def run(self, device: torch.device) -> Piece:
        """The tensor in eight bits a value."""
        from pqcli.core import metrics  # with torch, which decoding does without

        record, coding = self.record, self.record.coding
        if not isinstance(coding, Moments):
            raise TypeError(f"a job on moments for a tensor that is {coding}")
        tensor = self.weights.original(record.name)
        if not moments.can_code(tensor, coding.form):
            return self._kept(f"holds values that no {coding.form} moment has: kept exactly", device)
        coded = moments.encode(tensor, coding.form)
        data = lossless.compress([coded.codes, coded.scales], quick=True)
        if len(data) >= record.info.n_bytes:
            return self._kept(f"would not get smaller: {len(data)} B in eight bits", device)
        record = replace(record, coding=replace(coding, n_bytes=len(data)))
        decoded = dense(moments.decode(coded, coding.form), record)
        error = metrics.compare(tensor, as_tensor(decoded))
        return Piece(record, tensor_hash(decoded), ((key(record.name), data),), error=error)

    def _kept(self, reason: str, device: torch.device) -> Piece:
        return KeptJob(self.record.kept(reason), self.weights, self.is_compact, quick=True).run(device)


def restored(record: Record, data: bytes) -> Array:
    """The tensor of these bytes. Raises ValueError for bytes that `MomentsJob` does not write."""
    coding, n = record.coding, record.info.numel
    if not isinstance(coding, Moments):
        raise TypeError(f"moments of a tensor that is {coding}")
    codes, scales = lossless.decompress(data, [(1, n), (2, moments.n_blocks(n))])
    return dense(moments.decode(moments.Coded(codes, scales.view(np.uint16)), coding.form), record)
