"""What a base spares: which tensors of a checkpoint are those of its base, and which are coded as differences to them.

Every tensor that the two have in common is compared once, by values. It is as the base where the base's, in its dtype,
has the same bytes. Its difference is coded where that is weaker than the tensor itself: at the same error, every
halving of the spread saves a bit a weight. Else it is coded by itself, as are tensors that are new or of another shape.
(Which of the kept ones take less as differences is found out when they are kept.)
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import numpy as np
import torch

from pqcli.atomic import output_errors
from pqcli.claim import check_space
from pqcli.codecs.difference import Differences, as_base, may_be_difference, subtracted
from pqcli.codecs.rate.survey import spread
from pqcli.codecs.values import few_values
from pqcli.container.bases import Base, Search, open_base
from pqcli.container.naming import BaseTensor, Naming, hint_to
from pqcli.core.arrays import as_array, as_tensor
from pqcli.core.digests import tensor_bytes, tensor_hash
from pqcli.core.dtypes import Array, dtype_of
from pqcli.core.pq import pq
from pqcli.errors import CheckpointError
from pqcli.jobs.events import Hook, Stage
from pqcli.limits import Limits
from pqcli.tensors.info import TensorInfo

if TYPE_CHECKING:
    from pqcli.checkpoint import Checkpoint
    from pqcli.plan.plan import Plan, PlanEntry

WEAKER: Final = 0.9
"""A difference is coded if its spread is below this part of the tensor's: what is nearly as strong is less orderly."""


@dataclass(frozen=True)
class Compared:
    """A checkpoint beside its base: the plan with what that changes, the weights to be coded, the base and its name.

    `digests` are the hashes of the tensors that are as the base.
    """

    plan: Plan
    weights: Differences
    base: Base
    naming: Naming
    digests: Mapping[str, bytes]


@contextlib.contextmanager
def compared(
    checkpoint: Checkpoint,
    plan: Plan,
    bases: Sequence[str | Path],
    target: Path,
    output: Path,
    hook: Hook,
    limits: Limits | None = None,
) -> Iterator[Compared]:
    """Compare with the first of `bases`; where that is a container with a base, the others say where to find it.

    What a container decodes to is spooled to a nameless file beside `target`; the base is named as seen from `output`.
    Raises CheckpointError or ContainerError for a base that cannot be read.
    """
    path, *others = map(Path, bases)
    with contextlib.ExitStack() as stack:
        base = open_base(path, Search.among(others, limits))
        stack.callback(base.close)
        shared = [info for info in checkpoint.tensors if _has(base, info)]
        readable: Checkpoint | Spool
        if base.dense is not None:
            readable = base.dense
        else:
            spool = Spool.of(base, shared, target, Stage(hook, "decoding", sum(info.numel for info in shared)))
            stack.callback(spool.close)
            readable, base = spool, replace(base, read=spool.numpy)
        yield _compared(checkpoint, plan, base, readable, hint_to(path, output), shared, hook)


def _has(base: Base, info: TensorInfo) -> bool:
    """Whether the base may spare something of a tensor."""
    found = base.infos.get(info.name)
    return found is not None and found.shape == info.shape and info.alias_of is None and info.numel > 0


def _compared(
    checkpoint: Checkpoint,
    plan: Plan,
    base: Base,
    readable: Checkpoint | Spool,
    hint: str,
    shared: Sequence[TensorInfo],
    hook: Hook,
) -> Compared:
    names = frozenset(info.name for info in shared)
    done = Stage(hook, "matching", sum(info.numel for info in shared))
    entries, known, digests = [], {}, {}
    for entry in plan.entries:
        name = entry.info.name
        if name in names:
            weight, other = checkpoint.read(name), base.read(name)
            known[name] = BaseTensor(base.infos[name].dtype, entry.info.shape, tensor_hash(other))
            entry = _judged(entry, weight, as_tensor(other))
            if entry.action == "base":
                digests[name] = tensor_hash(weight)
            done(entry.info.numel, name)
        entries.append(entry)
    differing = frozenset(entry.info.name for entry in entries if entry.difference)
    weights = Differences(checkpoint, readable, differing, names)
    return Compared(replace(plan, entries=tuple(entries)), weights, base, Naming(hint, known), digests)


def _judged(entry: PlanEntry, weight: torch.Tensor, base: torch.Tensor) -> PlanEntry:
    """The entry of a tensor, given the base's of the same shape."""
    if _is_as(weight, base):
        return replace(entry, action="base", reason="as in the base", scheme=None, predicted_bytes=0)
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (weight, base)]
    if entry.action in ("keep", "moments") or not may_be_difference(dtypes[0], dtypes[1]):
        return entry
    difference = subtracted(weight, base)
    is_sound = all(map(pq.is_finite, (weight, base, difference)))
    if not is_sound or few_values(weight) is not None or spread(difference) >= WEAKER * spread(weight):
        return entry
    return replace(entry, difference=True, reason=f"{entry.reason}; difference to the base")


def _is_as(weight: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether the base's tensor, in the dtype of `weight`, has its bytes."""
    dtype = str(weight.dtype).removeprefix("torch.")
    try:
        found = as_base(dtype, as_array(base))
    except ValueError:
        return False
    return bool(np.array_equal(tensor_bytes(weight), tensor_bytes(found)))


# --- what a container decodes to --------------------------------------------------------------------------------------


@dataclass
class Spool:
    """Decoded tensors in a nameless file, of which rows can be read by many threads; it is gone with the process."""

    _file: IO[bytes]
    _places: dict[str, tuple[int, TensorInfo]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Base, tensors: Sequence[TensorInfo], target: Path, done: Stage) -> Spool:
        """All these tensors of the base, each decoded once, in the base's own order."""
        wanted = {info.name for info in tensors}
        infos = [info for info in base.infos.values() if info.name in wanted]
        check_space(target, sum(info.n_bytes for info in infos))
        with output_errors(target):
            spool = cls(tempfile.TemporaryFile(dir=target.parent))  # noqa: SIM115 - closed by the caller
        try:
            end = 0
            for info in infos:
                with output_errors(target):
                    spool._file.write(tensor_bytes(base.read(info.name)).data)
                spool._places[info.name] = end, info
                end += info.n_bytes
                done(info.numel, info.name)
            with output_errors(target):
                spool._file.flush()
        except BaseException:
            spool.close()
            raise
        return spool

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return as_tensor(self.numpy(name))

    def numpy(self, name: str) -> Array:
        """The same as an array."""
        info = self._places[name][1]
        return self._flat(name, 0, info.numel).reshape(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some elements of a tensor, in row-major order."""
        return as_tensor(self._flat(name, start, stop))

    def _flat(self, name: str, start: int, stop: int) -> Array:
        at, info = self._places[name]
        size = info.n_bytes // info.numel
        data, done = bytearray((stop - start) * size), 0
        while done < len(data):
            n_read = os.preadv(self._file.fileno(), [memoryview(data)[done:]], at + start * size + done)
            if not n_read:
                raise CheckpointError(f"tensor {name!r} of the base: what was spooled of it is gone")
            done += n_read
        return np.frombuffer(data, dtype_of(info.dtype))

    def close(self) -> None:
        """Give the disk its space back."""
        self._file.close()
