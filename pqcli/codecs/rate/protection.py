"""What a budget of error did to single tensors and rows, and what is said where it is met on the whole alone.

A few strong tensors, or one strong row, can carry nearly all the energy; then the rest may be lost and the whole still
be within the budget. Steps are bounded so that this does not happen (`steps.py`); here is measured whether it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import torch

    from pqcli.tensors.records import Record

TENSOR_LIMIT: Final = 4.0
ROW_LIMIT: Final = 6.0
"""Tensors, and rows, are told of whose relative MSE is above so many times what the whole is to have: some more than
what steps are bounded for, because rows of few weights scatter."""
NAMED: Final = 3
"""So many are named in a warning, the worst first."""
_CHUNK: Final = 1 << 18


@dataclass
class Watch:
    """Collects the errors of tensors and their rows; `bound` is the relative MSE that the whole is to have."""

    bound: float
    _tensors: dict[str, float] = field(default_factory=dict)
    _rows: dict[str, tuple[int, int, float]] = field(default_factory=dict)

    def see(self, record: Record, original: torch.Tensor, decoded: torch.Tensor) -> None:
        """One tensor as it was, and as it comes back."""
        shape = record.matrix_shape
        energies, errors = np.zeros(shape[0]), np.zeros(shape[0])
        a, b = original.reshape(shape), decoded.reshape(shape)
        step = max(1, _CHUNK // max(shape[1], 1))
        for start in range(0, shape[0], step):
            rows = slice(start, start + step)
            x, y = a[rows].double().numpy(), b[rows].double().numpy()
            energies[rows], errors[rows] = np.square(x).sum(axis=1), np.square(x - y).sum(axis=1)
        there = energies > 0
        relative = errors[there] / energies[there]
        above = int((relative > ROW_LIMIT * self.bound).sum())
        if energies.sum() and errors.sum() > TENSOR_LIMIT * self.bound * energies.sum():
            self._tensors[record.name] = float(errors.sum() / energies.sum())
        elif above:
            self._rows[record.name] = above, shape[0], float(relative.max())

    def warnings(self) -> tuple[str, ...]:
        """What to say: nothing where every tensor and row is within its limit."""
        found = list(warnings_of_tensors(self.bound, self._tensors))
        if self._rows:
            n_rows = sum(above for above, _, _ in self._rows.values())
            rows = sorted(self._rows.items(), key=lambda item: -item[1][2])[:NAMED]
            names = ", ".join(f"{above:,} of {n:,} in {name!r} (up to {worst:.3g})" for name, (above, n, worst) in rows)
            found.append(f"{_met(self.bound)} {n_rows:,} weak rows lie above {ROW_LIMIT * self.bound:.3g}: {names}")
        return tuple(found)


def warnings_of_tensors(bound: float, errors: Mapping[str, float]) -> tuple[str, ...]:
    """What to say of tensors with these relative MSE where the whole is to have `bound`; the worst are named."""
    above = {name: error for name, error in errors.items() if error > TENSOR_LIMIT * bound}
    if not above:
        return ()
    worst = sorted(above.items(), key=lambda item: -item[1])[:NAMED]
    names = ", ".join(f"{name!r} ({error:.3g})" for name, error in worst)
    return (f"{_met(bound)} {len(above):,} tensors lie above {TENSOR_LIMIT * bound:.3g}: {names}",)


def _met(bound: float) -> str:
    return f"the relative MSE of {bound:.3g} is met on the whole, but"
