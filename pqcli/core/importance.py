"""How much the squared error of each row and each column of a matrix counts.

Inputs of a layer differ in size, so an error in a column that large inputs meet does more harm than one elsewhere; and
so do outputs. What is minimised is then the sum of rows[r] * columns[c] * (error of weight r, c)^2.

Shapes: matrix (rows, columns); rows (rows,), columns (columns,) float32, positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Importance:
    """Factors on squared errors, by row and by column; only their ratios matter. Raises ValueError unless positive."""

    rows: NDArray[np.float32]
    columns: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, factors in (("row", self.rows), ("column", self.columns)):
            if factors.ndim != 1 or not (np.isfinite(factors).all() and (factors > 0).all()):
                raise ValueError(f"the importance of every {name} must be a positive number")

    @classmethod
    def of_rows(cls, rows: NDArray[np.float32], n_columns: int) -> Importance:
        """Rows of different importance, columns of the same."""
        return cls(np.asarray(rows, np.float32), np.ones(n_columns, np.float32))

    @classmethod
    def of_columns(cls, columns: NDArray[np.float32], n_rows: int) -> Importance:
        """Columns of different importance, rows of the same."""
        return cls(np.ones(n_rows, np.float32), np.asarray(columns, np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return len(self.rows), len(self.columns)

    @property
    def is_uniform(self) -> bool:
        """Whether every weight counts the same, as without any importance."""
        return all(not factors.size or bool((factors == factors[0]).all()) for factors in (self.rows, self.columns))

    @property
    def T(self) -> Importance:  # noqa: N802 - as numpy and torch call it
        """That of the transposed matrix."""
        return Importance(self.columns, self.rows)

    def normalised(self) -> Importance:
        """With rows, and columns, of geometric mean 1: importance of 1 is then ordinary importance."""
        rows, columns = (
            (factors / np.exp(np.mean(np.log(factors, dtype=np.float64)))).astype(np.float32)
            if factors.size
            else factors
            for factors in (self.rows, self.columns)
        )
        return Importance(rows, columns)
