"""EM (Lloyd's k-means) on the blocks of one weight: the codebook that spells them with the least squared error.

    E-step  every vector takes the centroid that scores best,    argmax_j  x . c_j + b_j
    M-step  every centroid becomes the mean of its vectors, or (`Options.relaxation`) goes beyond it, as over-relaxation
            does for linear systems: the path to the optimum is long and nearly straight

With b_j = -|c_j|^2 / 2 the best score is the least distance. (Entropy-constrained PQ adds the cost of bits to b_j.)

Where values differ in importance w, the sum of w (x - c)^2 is minimised: the best score is then that of the features
(w x, w) against (c, -c^2 / 2), and the sums of these features give the weighted means. So one primitive serves both.

Shapes: vectors (n, d), codebook (k, d), assignments (n,) int32, counts (k,), sums (k, d) float64.

Invariants, held by tests: the objective never rises from one iteration to the next; no cluster is left empty; the
answer depends on the vectors, the options and the seed only.

Empty clusters. The ancestor (fairseq) splits the most populated cluster into two points at a tiny distance (`eps`) to
either side of its centroid. As that distance goes to zero, the cluster is cut by a plane through its mean, and that is
how it is done here: exactly, for all empty clusters in one pass, with both halves' means known at once. The cluster of
the largest squared error is cut first, because a crowd of identical vectors (pruned weights) cannot be cut at all. A
cluster narrower than `eps` times the data counts as a single point. Where single points are all there is, the clusters
that are still empty are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from pqcli.core import kernels, progress
from pqcli.errors import EmptyClusterResolveError

if TYPE_CHECKING:
    from torch import Tensor

    from pqcli.core.pq.blocks import Blocks

CONVERGED = 1e-6
"""EM stops once an iteration lowers the objective by less than this fraction: float32 scores resolve no more."""
CANDIDATES_PER_CENTROID, FEWEST_CANDIDATES_PER_CENTROID = 16, 4
MANY_CANDIDATES = 1 << 16
"""Initial centroids are chosen from so many random vectors per centroid: the fewest where they would be very many."""
REFINEMENTS = 2
"""Full iterations over all vectors after training on a sample."""
RELAXATION = 1.85
"""How far a centroid moves towards the mean of its vectors. 1 is Lloyd's step; up to 2 the objective cannot rise,
and this much takes about 12 iterations to the error that Lloyd's steps reach in 20."""
SETTLING = 2
"""Last iterations, which go to the mean and no further."""
_SMALLEST_COUNT = 1e-30
"""An empty cluster's sums, which are zero, are divided by this."""
_PIECE = 1 << 15


@dataclass(frozen=True)
class Options:
    """What EM is asked to do.

    sample: the most vectors to train on before a few iterations over all (None: all from the start).
    stages: (vectors, iterations) to begin with, each on a sample of its own; the rest of `n_iter` then takes all.
    relaxation: the step of a centroid, as a multiple of Lloyd's, from 1 to 2.
    restarts: starts to choose the best of.
    """

    n_centroids: int = 256
    n_iter: int = 20
    eps: float = 1e-6
    max_tentatives: int = 30
    seed: int = 0
    sample: int | None = None
    stages: tuple[tuple[int, int], ...] = ()
    relaxation: float = 1.0
    restarts: int = 1


@dataclass(frozen=True)
class Fit:
    """What EM found. `objective` holds the sum of squared errors before each M-step."""

    codebook: Tensor
    objective: tuple[float, ...]


@dataclass(frozen=True)
class _Sweep:
    """One E-step over all parts of the blocks, with what the M-step needs."""

    assignments: list[Tensor]
    sums: Tensor
    counts: (
        Tensor  # (k, d): coordinate t of centroid j is the mean of counts[j, t] values (the sum of their importance)
    )
    population: Tensor  # (k,): vectors of each cluster
    objective: float


def fit(blocks: Blocks, options: Options, codebook: Tensor | None = None) -> Fit:
    """The codebook (at most `n_centroids`, block_size) that EM learns for `blocks`.

    Starts from `codebook` if given, else from distinct vectors drawn at random. Where there are no more distinct
    vectors than `n_centroids`, those vectors are the codebook, and the error is zero.
    Raises EmptyClusterResolveError if `max_tentatives` passes of splitting leave a cluster empty.
    """
    fits = []
    for i in range(options.restarts):
        with progress.within(i / options.restarts, (i + 1) / options.restarts):
            fits.append(_fit_once(blocks, options, codebook, options.seed + i))
    return min(fits, key=lambda found: found.objective[-1] if found.objective else 0.0)


def _fit_once(blocks: Blocks, options: Options, codebook: Tensor | None, seed: int) -> Fit:
    generator = torch.Generator().manual_seed(seed)
    if codebook is None:
        start = initial_codebook(blocks, options.n_centroids, generator)
        if start.is_complete:
            return Fit(start.codebook, (0.0,))
        codebook = start.codebook
    training = sample(blocks, options.sample, generator)
    left = options.n_iter - sum(n_iter for _, n_iter in options.stages)
    n_refine = min(REFINEMENTS, options.n_iter) if training is not blocks else 0
    costs = [min(n, len(training.body)) * n_iter for n, n_iter in options.stages]
    costs += [len(training.body) * left, len(blocks.body) * n_refine]
    parts = iter(_shares(costs))
    for n, n_iter in options.stages:
        drawn = spread_sample(training, n, generator)
        with progress.within(*next(parts)):
            codebook = lloyd(drawn, codebook, replace(options, n_iter=n_iter), generator, settling=0).codebook
    with progress.within(*next(parts)):
        fitted = lloyd(training, codebook, replace(options, n_iter=left), generator)
    if training is not blocks:
        with progress.within(*next(parts)):
            refined = lloyd(blocks, fitted.codebook, replace(options, n_iter=n_refine), generator)
        fitted = replace(refined, objective=fitted.objective + refined.objective)
    return fitted


def _shares(costs: list[int]) -> list[tuple[float, float]]:
    """From which fraction of the whole to which each part goes."""
    ends = [end / max(sum(costs), 1) for end in accumulate(costs, initial=0)]
    return list(pairwise(ends))


def assign(blocks: Blocks, codebook: Tensor) -> Tensor:
    """The nearest centroid of every vector, (n_vectors,) int32 in the order of `Blocks`. Ties go to the lower index."""
    found = [
        _pass(part, importance, codebook, accumulate=False).assignments
        for part, importance in zip(blocks.parts, blocks.importance_parts, strict=True)
    ]
    return blocks.join(found) if found else torch.zeros(0, dtype=torch.int32)


def lloyd(
    blocks: Blocks, codebook: Tensor, options: Options, generator: torch.Generator, settling: int = SETTLING
) -> Fit:
    """At most `n_iter` iterations of E-step, filling of empty clusters, and M-step, from a given start.

    The last `settling` of them go to the mean and no further, whatever the relaxation.
    """
    codebook = codebook.float().clone()
    energy = _energy(blocks)
    objective: list[float] = []
    for i in range(options.n_iter):
        sweep = _sweep(blocks, codebook, energy)
        objective.append(sweep.objective)
        step = options.relaxation if i < options.n_iter - settling else 1.0
        empty = sweep.population == 0
        if bool(empty.any()):
            sweep = _fill_empty(blocks, sweep, options, generator)
            # the centroid of an empty cluster may have been anywhere: nothing to extrapolate
            steps = torch.where(empty, 1.0, step).double()
            codebook = _moved(codebook, sweep, steps[:, None])[sweep.population > 0]
        else:
            codebook = _moved(codebook, sweep, step)
        del sweep  # its assignments: the next one's take their place in memory
        progress.tell((i + 1) / options.n_iter)
        if len(objective) > 1 and objective[-2] - objective[-1] <= CONVERGED * objective[-2]:
            break
    return Fit(codebook, tuple(objective))


def _moved(codebook: Tensor, sweep: _Sweep, step: Tensor | float) -> Tensor:
    """The M-step: every centroid moves by `step` (one for all, or (k, 1)) times what it lacks to its vectors' mean.

    With squared errors J(c) of given clusters, J(c + s (mean - c)) - J(mean) = (1 - s)^2 (J(c) - J(mean)): no step from
    0 to 2 makes it worse.
    """
    before = codebook.double()
    mean = sweep.sums / sweep.counts
    shift = torch.nan_to_num_(mean - before, nan=0.0)  # 0 / 0 where a coordinate has no values
    return before.add_(shift.mul_(step)).float()


# --- start -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Initial centroids; `is_complete` says that they are all the distinct vectors there are."""

    codebook: Tensor
    is_complete: bool = field(default=False)


def initial_codebook(blocks: Blocks, n_centroids: int, generator: torch.Generator) -> Start:
    """`n_centroids` distinct vectors, far from each other, or all distinct ones there are if that is not more."""
    few = FEWEST_CANDIDATES_PER_CENTROID * n_centroids
    n_candidates = max(few, min(CANDIDATES_PER_CENTROID * n_centroids, MANY_CANDIDATES))
    candidates = _distinct(spread_sample(blocks, n_candidates, generator).body)
    if len(candidates) > n_centroids:
        return Start(_far_apart(candidates, n_centroids, generator))
    everything = torch.cat([blocks.body, _padded_tail(blocks)]) if len(blocks.tail.flatten()) else blocks.body
    distinct = _distinct(everything)
    if len(distinct) <= n_centroids:
        return Start(distinct.clone(), is_complete=True)
    drawn = torch.randperm(len(distinct), generator=generator)[:n_candidates].to(distinct.device)
    return Start(_far_apart(distinct[drawn], n_centroids, generator))


def _far_apart(vectors: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` of the distinct `vectors`, drawn with probabilities that go by the squared distance to those drawn before.

    This is k-means++ (Arthur and Vassilvitskii 2007), but with many draws at a time, as in k-means|| (Bahmani et al.
    2012): an eighth to begin with, then as many as there are, four passes over the vectors instead of `n`. The errors
    after EM are alike.
    """
    drawn = latest = torch.randperm(len(vectors), generator=generator)[: max(n // 8, 1)]
    distance = torch.full((len(vectors),), torch.inf)
    while len(drawn) < n:
        centroids = vectors.index_select(0, latest.to(vectors.device))
        nearest = kernels.sweep(vectors, centroids, _bias(centroids, vectors), accumulate=False).assignments
        distance = torch.minimum(distance, (vectors - centroids.index_select(0, nearest)).square_().sum(1).cpu())
        odds = (distance / distance.max().clamp(min=1e-30)).clamp_(min=1e-30)
        odds[drawn] = 0.0
        latest = torch.multinomial(odds, min(len(drawn), n - len(drawn)), generator=generator)
        drawn = torch.cat([drawn, latest])
    return vectors.index_select(0, drawn.to(vectors.device))


def sample(blocks: Blocks, n: int | None, generator: torch.Generator) -> Blocks:
    """At most `n` full blocks drawn at random; `blocks` itself if it has no more than that."""
    if n is None or n >= len(blocks.body):
        return blocks
    chosen = torch.randperm(len(blocks.body), generator=generator)[:n].sort().values.to(blocks.body.device)
    return blocks.pick(chosen)


def spread_sample(blocks: Blocks, n: int, generator: torch.Generator) -> Blocks:
    """About `n` full blocks, one at random of each stretch of equally many; `blocks` itself if it has no more.

    Unlike a random permutation this costs no more than the vectors drawn, and reads memory in order.
    """
    stretch = len(blocks.body) // max(n, 1)
    if stretch < 2:
        return blocks
    n = len(blocks.body) // stretch
    chosen = torch.randint(stretch, (n,), generator=generator).add_(torch.arange(0, n * stretch, stretch))
    return blocks.pick(chosen.to(blocks.body.device))


def _distinct(vectors: Tensor) -> Tensor:
    """The distinct rows of `vectors` (n, d), ordered by their 64-bit hash; -0 counts as 0.

    Hashing first makes this one sort of integers instead of a lexicographic sort of rows.
    """
    vectors = vectors + 0.0
    words = vectors.view(torch.int32).long()
    multipliers = torch.randint(
        -(2**63), 2**63 - 1, (vectors.shape[1],), generator=torch.Generator().manual_seed(1), dtype=torch.int64
    ).to(vectors.device)
    hashes = (words * (multipliers | 1)).sum(1)
    hashes, order = hashes.sort(stable=True)
    first = torch.ones(len(hashes), dtype=torch.bool, device=vectors.device)
    first[1:] = hashes[1:] != hashes[:-1]
    return vectors[order[first]]


def _padded_tail(blocks: Blocks) -> Tensor:
    return torch.nn.functional.pad(blocks.tail, (0, blocks.block_size - blocks.tail.shape[1]))


# --- E-step ----------------------------------------------------------------------------------------------------------


def _leading(codebook: Tensor, part: Tensor) -> Tensor:
    """The coordinates that a part's vectors have: all for the body, the leading ones for the tail."""
    return codebook if part.shape[1] == codebook.shape[1] else codebook[:, : part.shape[1]].contiguous()


def _bias(codebook: Tensor, part: Tensor) -> Tensor:
    return (-0.5 * _leading(codebook, part).double().square().sum(1)).float()


def _sweep(blocks: Blocks, codebook: Tensor, energy: float) -> _Sweep:
    passes = [
        _pass(part, importance, codebook)
        for part, importance in zip(blocks.parts, blocks.importance_parts, strict=True)
    ]
    score = sum(found.score for found in passes)
    is_by_value = blocks.importance is not None and blocks.importance.block_size > 1
    sums, counts = _added(passes, codebook, is_by_value=is_by_value)
    if blocks.importance is None or is_by_value:
        population = sum((found.counts for found in passes if found.counts is not None), torch.zeros_like(counts[:, 0]))
    else:  # the passes counted importance
        population = torch.zeros_like(counts[:, 0])
        for found in passes:
            population += torch.bincount(found.assignments, minlength=len(codebook))
    return _Sweep([found.assignments for found in passes], sums, counts, population, max(energy - 2 * score, 0.0))


def _pass(part: Tensor, importance: Tensor | None, codebook: Tensor, *, accumulate: bool = True) -> kernels.Pass:
    """The sweep over one part.

    With `importance` by value, sums are (k, 2 * d): of weighted values, and of their weights; by vector, counts are
    sums of importance.
    """
    centroids = _leading(codebook, part)
    if not isinstance(part, torch.Tensor):  # vectors that memory does not hold (`pqcli.core.pq.far`)
        return part.sweep(centroids, _bias(codebook, part), accumulate=accumulate)
    if importance is None:
        return kernels.sweep(part, centroids, _bias(codebook, part), accumulate=accumulate)
    if importance.shape[1] == 1:  # all of a vector's values count alike: the nearest centroid is the ordinary one
        weights = importance[:, 0].contiguous()
        return kernels.sweep(part, centroids, _bias(codebook, part), weights=weights, accumulate=accumulate)
    features = torch.cat([importance * part, importance], dim=1)
    scores = torch.cat([centroids, -0.5 * centroids.square()], dim=1)
    return kernels.sweep(features, scores, torch.zeros_like(centroids[:, 0]), accumulate=accumulate)


def _added(passes: list[kernels.Pass], codebook: Tensor, *, is_by_value: bool) -> tuple[Tensor, Tensor]:
    """Sums and counts (k, d) over all parts."""
    totals = [(p.sums, p.counts[:, None]) for p in passes if p.sums is not None and p.counts is not None]
    if is_by_value:
        totals = [(both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]) for both, _ in totals]
    if len(totals) == 1 and totals[0][0].shape == codebook.shape:  # the usual case, without copies
        return totals[0][0], totals[0][1].expand(codebook.shape)
    sums, counts = (torch.zeros_like(codebook, dtype=torch.float64) for _ in range(2))
    for part_sums, part_counts in totals:
        sums[:, : part_sums.shape[1]] += part_sums
        counts[:, : part_sums.shape[1]] += part_counts
    return sums, counts


# --- empty clusters --------------------------------------------------------------------------------------------------


def _fill_empty(blocks: Blocks, sweep: _Sweep, options: Options, generator: torch.Generator) -> _Sweep:
    """The sweep after cutting populated clusters in two until none is empty. The objective can only fall by it.

    Where every cluster is a single point already, the empty ones stay empty: more centroids would serve nothing.
    """
    spread = _squared_spread(blocks, sweep)
    scale = options.eps**2 * float(sweep.sums.square().sum() + spread.sum()) / max(float(sweep.population.sum()), 1.0)
    for _ in range(options.max_tentatives):
        empty = (sweep.population == 0).nonzero().flatten()
        if not len(empty):
            return sweep
        divisible = ((sweep.population > 1) & (spread > scale)).nonzero().flatten()
        if not len(divisible):  # every cluster is a single point: there are fewer points than centroids
            return sweep
        order = spread[divisible].argsort(descending=True, stable=True)
        donors = divisible[order[: len(empty)]]
        sweep = _split(blocks, sweep, donors, empty[: len(donors)], generator)
        spread = _squared_spread(blocks, sweep)
    n_empty = int((sweep.population == 0).sum())
    if n_empty:
        raise EmptyClusterResolveError(
            f"{n_empty} of {len(sweep.counts)} clusters are still empty after {options.max_tentatives} passes of "
            "splitting; use fewer centroids or raise max_tentatives"
        )
    return sweep


def _squared_spread(blocks: Blocks, sweep: _Sweep) -> Tensor:
    """Sum of squared distances to the mean within every cluster, (k,) float64; clamped at float32's resolution."""
    squares = torch.zeros(len(sweep.counts), dtype=torch.float64, device=sweep.sums.device)
    for part, importance, assignments in zip(blocks.parts, blocks.importance_parts, sweep.assignments, strict=True):
        squares.index_add_(0, assignments.long(), _squares(part, importance).sum(1))
    explained = (sweep.sums.square() / sweep.counts.clamp(min=_SMALLEST_COUNT)).sum(1)
    spread = squares - explained
    return torch.where(spread > 1e-12 * squares, spread, 0.0)


def _split(blocks: Blocks, sweep: _Sweep, donors: Tensor, empty: Tensor, generator: torch.Generator) -> _Sweep:
    """Every donor cut by a random plane through its mean; the far side goes to the empty cluster beside it."""
    k, d = sweep.sums.shape
    device = sweep.sums.device
    mean = sweep.sums / sweep.counts.clamp(min=_SMALLEST_COUNT)
    normal = torch.zeros(k, d, dtype=torch.float64, device=device)
    normal[donors] = torch.randn(len(donors), d, generator=generator, dtype=torch.float64).to(device)
    heir = torch.full((k,), -1, dtype=torch.long, device=device)
    heir[donors] = empty
    sums, counts, population, moved_all = sweep.sums.clone(), sweep.counts.clone(), sweep.population.clone(), []
    for part, importance, assignments in zip(blocks.parts, blocks.importance_parts, sweep.assignments, strict=True):
        t = part.shape[1]
        member = (heir[assignments.long()] >= 0).nonzero().flatten()
        old = assignments[member].long()
        side = ((part[member].double() - mean[old, :t]) * normal[old, :t]).sum(1)
        member, old = member[side > 0], old[side > 0]
        new = heir[old]
        values = part[member].double()
        factors = torch.ones_like(values) if importance is None else importance[member].double().expand_as(values)
        for target, sign in ((new, 1.0), (old, -1.0)):
            sums[:, :t].index_add_(0, target, sign * factors * values)
            counts[:, :t].index_add_(0, target, sign * factors)
            population.index_add_(0, target, torch.full_like(values[:, 0], sign))
        moved = assignments.clone()
        moved[member] = new.int()
        moved_all.append(moved)
    return replace(sweep, assignments=moved_all, sums=sums, counts=counts, population=population)


def _energy(blocks: Blocks) -> float:
    """The sum of all squares, each times its importance; in pieces whose float64 copies fit into a cache."""
    energy = 0.0
    for part, importance in zip(blocks.parts, blocks.importance_parts, strict=True):
        for start in range(0, len(part), _PIECE):
            piece = slice(start, start + _PIECE)
            energy += float(_squares(part[piece], None if importance is None else importance[piece]).sum())
    return energy


def _squares(part: Tensor, importance: Tensor | None) -> Tensor:
    """The squares of a part's values times their importance, in float64."""
    squares = part.double().square_()
    return squares if importance is None else squares.mul_(importance)
