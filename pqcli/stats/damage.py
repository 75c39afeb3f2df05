"""What an error in a weight does to its layer's output, and to the network's, as far as statistics tell.

Shapes: a weight as a matrix (outputs, inputs), with second moments H of its inputs, E[x x']: an error E of the matrix
makes an error of mean square tr(E H E') in the output. Of an embedding, row v with frequency f_v: sum of f_v |e_v|^2.

A layer of many outputs is judged by some of them, drawn at random: its error and its output are sums over the same
ones, so that their ratio is within a few percent, at a bounded price.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from pqcli.stats.moments import Moments

MOST_OUTPUTS = 1024
"""Outputs of a layer that are looked at."""


@dataclass(frozen=True)
class Damage:
    """Predicted for one weight, by sample.

    output_mse  squared error of the layer's output over the output's own square (before a bias is added)
    damage      mean squared error at the network's output that comes of it, in the unit of the gradient number; None
                where no gradients were collected
    """

    output_mse: float
    damage: float | None


def predicted(seen: Moments, original: torch.Tensor, decoded: torch.Tensor) -> Damage | None:
    """The damage that comes of holding `decoded` in place of `original`; None where the statistics do not fit."""
    before = original.detach().float().numpy()
    error = decoded.detach().float().numpy() - before
    found: list[tuple[float, float, float | None]] = []  # the output's energy, that of its error, gradient
    if seen.diagonal is not None:
        weight, wrong = (_as_matrix(array, seen.axis) for array in (before, error))
        if weight.shape[-1] != len(seen.diagonal):
            return None
        chosen = _chosen(len(weight))
        share = len(chosen) / max(len(weight), 1)
        energy, error_energy = (_energy(matrix[chosen], seen) / share for matrix in (weight, wrong))
        found.append((energy, error_energy, seen.gradient))
    if seen.row_frequency is not None:
        if len(seen.row_frequency) != len(before):
            return None
        energy, error_energy = (_looked_up(array, seen.row_frequency) for array in (before, error))
        found.append((energy, error_energy, seen.lookup_gradient))
    total = sum(output for output, _, _ in found)
    if not total:
        return None
    known = [wrong * gradient for _, wrong, gradient in found if gradient is not None]
    return Damage(sum(wrong for _, wrong, _ in found) / total, sum(known) if len(known) == len(found) else None)


def _chosen(n_outputs: int) -> np.ndarray:
    """The outputs that are looked at, ascending; the same for every run."""
    if n_outputs <= MOST_OUTPUTS:
        return np.arange(n_outputs)
    return np.sort(np.random.default_rng(n_outputs).permutation(n_outputs)[:MOST_OUTPUTS])


def _as_matrix(array: np.ndarray, axis: int) -> np.ndarray:
    """(outputs, inputs): the stacked ones below one another."""
    if axis in (1, 0):
        matrix = array.reshape(len(array), -1)
        return matrix if axis == 1 else matrix.T
    return np.swapaxes(array, -1, -2).reshape(-1, array.shape[-2]) if axis == -2 else array.reshape(-1, array.shape[-1])


def _energy(matrix: np.ndarray, seen: Moments) -> float:
    if seen.second is not None:
        return _sum_of_products(matrix @ seen.second, matrix)
    if seen.blocks is not None:
        total, start = 0.0, 0
        for block in seen.blocks:
            part = matrix[:, start : start + len(block)]
            total += _sum_of_products(part @ block, part)
            start += len(block)
        return total
    return float(np.einsum("ij,ij->j", matrix, matrix) @ np.asarray(seen.diagonal))


def _looked_up(array: np.ndarray, frequency: np.ndarray) -> float:
    rows = array.reshape(len(array), -1)
    return float(frequency @ np.einsum("ij,ij->i", rows, rows))


def _sum_of_products(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", a, b).sum(dtype=np.float64))
