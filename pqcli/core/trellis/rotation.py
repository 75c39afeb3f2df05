"""Rotations that make a tensor's variances unequal, so that the trellis codec spends its bits where they count.

A Gaussian of variance s^2 costs (1/2) log2(s^2 / D) bits at error D, so a rotation that packs energy into few
coordinates saves bits and changes no error: classic transform coding. Two kinds are fitted:

- *pooled*: over the kernel positions of a convolution, one basis for all convolutions of the same kernel shape;
- *own*: over the columns (or the rows) of one matrix, its leading principal directions only.

Both are a `Rotation`: k basis vectors of length `size`, quantized to integers, then completed to an orthonormal
size x size matrix by k Householder reflections. The reflections are computed here in float64 with a fixed order of
operations, and never by LAPACK, whose answer differs from machine to machine.

    weights (rows, columns) float32; basis (k, size) int32 in units of 2^-precision[k]; gram (size, size) float64
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pqcli.core.lookahead import in_order
from pqcli.core.trellis.sources import Source

Matrix = NDArray[np.float32]
Reader = Callable[[str], Matrix]

_RANKS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_MIN_OWN_SIZE = 8
_MAX_OWN_SIZE = 16384
_MAX_POOLED_SIZE = 256
_GRAM_ROWS = 8192
"""Rows of a matrix that its principal directions are learned from ..."""
_TRIAL_ROWS = 256
"""... and those that the saving is predicted on."""
_ERROR_PER_STEP = 0.2
"""Mean squared error of a trellis-coded weight in squared steps, near enough to predict rates with."""
_MARGIN = 1.0005
"""A saving must show above the noise of predicting it."""
_MAX_PRECISION = 20
_LARGE = 1 << 24
"""A tensor of more weights is looked at alone, for memory's sake."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Rotation:
    """k basis vectors of `size` entries: vector i is `basis[i] * 2^-precisions[i]`, then orthonormalised in order."""

    basis: NDArray[np.int32]
    precisions: tuple[int, ...]

    @property
    def size(self) -> int:
        """Length of the vectors that are rotated."""
        return int(self.basis.shape[1])

    def reflections(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Normals (k, size) and coefficients (k,) of the Householder reflections whose product is the rotation."""
        from pqcli.core.trellis.rotation_loops import orthonormalize

        normals, coefficients = np.zeros(self.basis.shape, np.float32), np.zeros(len(self.basis), np.float32)
        orthonormalize(
            self.basis, np.array(self.precisions, np.int64), np.empty(self.basis.shape), normals, coefficients
        )
        return normals, coefficients


@dataclass(frozen=True)
class Rotations:
    """What was fitted: `items`, and for each source the item it uses (None: as it is) and whether it is transposed."""

    items: tuple[Rotation, ...] = ()
    use: Mapping[str, int] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    def only(self, keys: Collection[str]) -> Rotations:
        """The rotations of these sources alone."""
        used = sorted({self.use[key] for key in keys if key in self.use})
        use = {key: used.index(self.use[key]) for key in keys if key in self.use}
        return Rotations(tuple(self.items[i] for i in used), use, self.transposed.intersection(keys))


def fit_rotations(
    sources: Sequence[Source],
    read: Reader,
    steps: Mapping[str, float],
    n_threads: int = 2,
    row_steps: Mapping[str, NDArray[np.float64]] | None = None,
) -> Rotations:
    """The rotations that pay for themselves when source `key` is quantized with step `steps[key]`.

    `read(key)` is called once per source that can be rotated, by up to `n_threads` threads at a time where tensors are
    small. The answer does not depend on `n_threads`. Sources in `row_steps`, which are those of rows relative to the
    source's, are not transposed.
    """
    items: list[Rotation] = []
    use: dict[str, int] = {}
    transposed: set[str] = set()
    pools: dict[tuple[int, ...], list[tuple[Source, NDArray[np.float64], int]]] = {}

    def look_at(source: Source) -> _Own | _Pooled | None:
        step = np.float32(steps[source.key])
        if source.kernel == 1:
            own = (row_steps or {}).get(source.key)
            if own is None:
                return _own(read(source.key), step)
            return _own(read(source.key) / own.astype(np.float32)[:, None], step, may_transpose=False)
        vectors = (read(source.key) / step).reshape(-1, source.kernel)
        return _Pooled(_gram(vectors), len(vectors))

    for source, found in _looked_at([source for source in sources if _can_rotate(source)], look_at, n_threads):
        if isinstance(found, _Own):
            use[source.key] = len(items)
            items.append(found.rotation)
            if found.is_transposed:
                transposed.add(source.key)
        elif isinstance(found, _Pooled):
            pools.setdefault(source.kernel_shape, []).append((source, found.gram, found.n_vectors))
    for members in pools.values():
        rotation = _pooled([(gram, n) for _, gram, n in members])
        if rotation is not None:
            use.update({source.key: len(items) for source, _, _ in members})
            items.append(rotation)
    return Rotations(tuple(items), use, frozenset(transposed))


@dataclass(frozen=True)
class _Own:
    """A rotation for one matrix alone."""

    rotation: Rotation
    is_transposed: bool


@dataclass(frozen=True)
class _Pooled:
    """What one convolution adds to the basis of its kernel shape."""

    gram: NDArray[np.float64]
    n_vectors: int


def _can_rotate(source: Source) -> bool:
    if source.kernel == 1:
        return min(source.rows, source.columns) >= _MIN_OWN_SIZE
    return source.n_weights > 0 and source.kernel <= _MAX_POOLED_SIZE


def _looked_at(
    sources: Sequence[Source], work: Callable[[Source], Found], n_threads: int
) -> Iterator[tuple[Source, Found]]:
    """(source, work(source)) in order: large ones one at a time, small ones side by side.

    A call of LAPACK gets one thread: its own threads wait for each other at every turn, which takes ten times as long
    as soon as something else runs on one of the cores.
    """
    from threadpoolctl import threadpool_limits  # which decoding does without

    with threadpool_limits(1, user_api="blas"):
        found = in_order(
            sources, work, n_threads, ahead=n_threads + 1, cost=lambda source: int(source.n_weights > _LARGE)
        )
        yield from zip(sources, found, strict=True)


def apply(weights: Matrix, rotation: Rotation, *, inverse: bool) -> None:
    """Rotate every consecutive `rotation.size` columns of `weights` in place, or undo that.

    Raises ValueError when the columns are not a multiple of the rotation's size.
    """
    from pqcli.core.trellis.rotation_loops import reflect

    if weights.shape[1] % rotation.size:
        raise ValueError(f"a rotation of {rotation.size} does not fit {weights.shape[1]} columns")
    normals, coefficients = rotation.reflections()
    reflect(weights, normals, coefficients, inverse)


def _gram(vectors: Matrix) -> NDArray[np.float64]:
    """The Gram matrix of the vectors, without overflow for any float32."""
    largest = float(np.max(np.abs(vectors), initial=0.0))
    if largest == 0.0:
        return np.zeros((vectors.shape[1], vectors.shape[1]))
    scale = 2.0 ** -np.frexp(largest)[1]
    scaled = vectors * np.float32(scale)
    gram: NDArray[np.float64] = (scaled.T @ scaled).astype(np.float64) / scale**2
    return gram


def _rate(variance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits per weight at the codec's error, by variance in squared steps."""
    return 0.5 * np.log2(1.0 + variance / _ERROR_PER_STEP)


def _pooled(members: Sequence[tuple[NDArray[np.float64], int]]) -> Rotation | None:
    """The basis for vectors with these Gram matrices, if it pays."""
    total = np.sum([gram for gram, _ in members], axis=0)
    size = len(total)
    n_vectors = sum(n for _, n in members)
    energies, vectors = np.linalg.eigh(total)
    energies, vectors = energies[::-1], vectors[:, ::-1]
    before = sum(float(n * _rate(np.diag(gram) / n).sum()) for gram, n in members)
    best: tuple[float, int] = (before, 0)
    for k in sorted({1, 2, 3, *_RANKS, size - 1} & set(range(1, size))):
        basis = _complete(vectors[:, :k])
        after = sum(float(n * _rate(np.einsum("ij,jk,ki->i", basis.T, gram, basis) / n).sum()) for gram, n in members)
        rest = float(np.mean(energies[k:])) / n_vectors
        cost = _cost(_precisions(energies[:k], rest), size)
        if (after + cost) * _MARGIN < best[0]:
            best = (after + cost, k)
    if best[1] == 0:
        return None
    k = best[1]
    return _quantize(vectors[:, :k], energies[:k], float(np.mean(energies[k:])) / n_vectors)


def _own(weights: Matrix, step: np.float32, *, may_transpose: bool = True) -> _Own | None:
    """The leading directions of the columns, or of the rows, of one matrix, if they pay."""
    n_rows, n_columns = weights.shape
    stride = -(-n_rows // _GRAM_ROWS)
    sample = np.ascontiguousarray(weights[::stride] / step)
    largest = float(np.max(np.abs(sample)))
    if not 0.0 < largest < 1e15:
        return None  # nothing to save, or squares beyond float32
    energies, right = _principal(sample)
    left = np.asarray(sample @ right / np.sqrt(energies), np.float32)
    plain = _trial_rate(sample, None, 0) * weights.size
    best: tuple[float, int, bool] = (plain, 0, False)
    for transpose, vectors in ((False, right), (True, left)):
        matrix = sample.T if transpose else sample
        size = matrix.shape[1]
        if size > _MAX_OWN_SIZE or (transpose and (stride > 1 or not may_transpose)):
            continue
        n_vectors = n_rows if not transpose else n_columns
        for k, rate in _trial_rates(matrix, vectors, energies):
            rest = max(float((sample.astype(np.float64) ** 2).sum() - energies[:k].sum()), 0.0) / matrix.size
            cost = _cost(_precisions(energies[:k] * (n_vectors / len(matrix)), rest), size)
            if (rate * weights.size + cost) * _MARGIN < best[0]:
                best = (rate * weights.size + cost, k, transpose)
    _, k, transpose = best
    if k == 0:
        return None
    vectors = left if transpose else right
    rest = max(float((sample.astype(np.float64) ** 2).sum() - energies[:k].sum()), 0.0) / sample.size
    scale = 1 if transpose else n_rows / len(sample)
    return _Own(_quantize(vectors[:, :k].astype(np.float64), energies[:k] * scale, rest), transpose)


def _principal(sample: Matrix) -> tuple[NDArray[np.float64], Matrix]:
    """The leading energies and directions of the columns of `sample` (at most max(_RANKS)), none of zero energy."""
    n_rows, n_columns = sample.shape
    wanted = min(max(_RANKS), n_rows, n_columns)
    if min(n_rows, n_columns) <= 512:
        narrow = sample if n_columns <= n_rows else np.ascontiguousarray(sample.T)
        energies, vectors = np.linalg.eigh((narrow.T @ narrow).astype(np.float64))
        energies, vectors = energies[::-1][:wanted], vectors[:, ::-1][:, :wanted].astype(np.float32)
        n = max(1, int(np.sum(energies > energies[0] * 1e-6)))
        energies, vectors = energies[:n], np.ascontiguousarray(vectors[:, :n])
        if n_columns > n_rows:
            vectors = sample.T @ vectors / np.sqrt(energies).astype(np.float32)
        return energies, vectors
    guess = np.random.default_rng(0).standard_normal((n_columns, wanted + 16)).astype(np.float32)
    for _ in range(3):
        guess = np.linalg.qr(sample.T @ (sample @ guess))[0]
    projected = sample @ guess
    energies, mix = np.linalg.eigh((projected.T @ projected).astype(np.float64))
    energies, mix = energies[::-1][:wanted], mix[:, ::-1][:, :wanted]
    n = max(1, int(np.sum(energies > energies[0] * 1e-6)))
    return energies[:n], guess @ mix[:, :n].astype(np.float32)


def _trial_rate(sample: Matrix, column_energy: NDArray[np.float64] | None, _k: int) -> float:
    """Predicted bits per weight of a matrix, its variances the product of rows' and columns'."""
    chosen = sample[:: -(-len(sample) // _TRIAL_ROWS)].astype(np.float64)
    rows = np.mean(chosen**2, axis=1)
    columns = np.mean(sample.astype(np.float64) ** 2, axis=0) if column_energy is None else column_energy
    return float(np.mean(_rate(np.outer(rows, columns) / max(float(np.mean(columns)), 1e-30))))


def _trial_rates(matrix: Matrix, vectors: Matrix, energies: NDArray[np.float64]) -> list[tuple[int, float]]:
    """(k, predicted bits per weight) with the first k directions taken out, for each k worth a thought."""
    n_vectors, size = matrix.shape
    chosen = matrix[:: -(-n_vectors // _TRIAL_ROWS)].astype(np.float64)
    leading = chosen @ vectors.astype(np.float64)
    row_energy = np.sum(chosen**2, axis=1)
    column_energy = np.sum(matrix.astype(np.float64) ** 2, axis=0)
    rates = []
    for k in _RANKS:
        if k > min(vectors.shape[1], size - 1):
            break
        heads = leading[:, :k] ** 2
        head_rows = heads.mean(axis=1)
        head_columns = energies[:k] / n_vectors
        head = _rate(np.outer(head_rows, head_columns) / max(float(head_columns.mean()), 1e-30)).sum()
        rows = np.maximum(row_energy - heads.sum(axis=1), 0.0) / (size - k)
        columns = np.maximum(column_energy - (vectors[:, :k].astype(np.float64) ** 2) @ energies[:k], 0.0) / n_vectors
        rest = _rate(np.outer(rows, columns) / max(float(columns.mean()), 1e-30)).sum() * (size - k) / size
        rates.append((k, float(head + rest) / chosen.size))
    return rates


def _precisions(energies: NDArray[np.float64], rest: float) -> NDArray[np.int64]:
    """Bits after the binary point that each basis vector is worth.

    An entry's rounding error leaks a share step^2 / 12 of the vector's energy into a coordinate of variance `rest`;
    the bits that costs and the bits a finer step costs balance where step^2 = 6 * rest / energy.
    """
    floor = max(rest, _ERROR_PER_STEP)
    ideal = 0.5 * np.log2(np.maximum(energies, 1e-30) / (6.0 * floor))
    return np.clip(np.round(ideal), 3, _MAX_PRECISION).astype(np.int64)


def _cost(precisions: NDArray[np.int64], size: int) -> float:
    """Bits that basis vectors cost: the entropy of their entries, of variance 1 / size, plus what rounding leaks."""
    entropies = np.maximum(precisions + 2.05 - 0.5 * np.log2(size), 0.5)
    return float((entropies + 0.72).sum()) * size


def _quantize(vectors: NDArray[np.float64], energies: NDArray[np.float64], rest: float) -> Rotation:
    """`vectors (size, k)` as integers of the precision that they are worth, signs chosen so that equal inputs agree."""
    precisions = _precisions(energies, rest)
    signs = np.where(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    basis = np.round((vectors * signs * 2.0**precisions).T).astype(np.int32)
    return Rotation(np.ascontiguousarray(basis), tuple(int(p) for p in precisions))


def _complete(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """An orthonormal basis whose first columns span those of `vectors`; for predictions only."""
    return np.linalg.qr(vectors, mode="complete")[0]
