"""Semi-supervised k-means (Vaze et al., CVPR 2022, section 3.2): labelled samples stay in their class's cluster.

For millions of points: they may lie in a memory map, of which a block is looked at at a time. Where there are many, the
starts and the restarts are tried on a sample, whose best centres then go on over all points. Labelled points never
move, so that only the count, sum and squared norm of every class enter.

Measured on 2 cores (AMD EPYC, AVX2, shared with other work), blocks of 8,192 points, GFLOP/s: of 768 dimensions against
1,000 centres numpy's OpenBLAS 20, torch 9, torch in bfloat16 2; of 128 against 8,192: 26, 15, 0.7. So numpy it is.
benchmarks/kmeans.py times the whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]

BLOCK = 8192  # points that are looked at at a time
SAMPLE, SAMPLE_PER_CENTRE = 32_768, 32  # points on which starts are tried, where there are more
LARGE_RESTARTS = 3  # of them, there


class Labelled(NamedTuple):
    """What labelled points weigh: count [C], sum [C, D] float64, squared norm [C] of every old class."""

    counts: NDArray[np.float64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]

    def scaled(self, factor: float) -> "Labelled":
        return Labelled(self.counts * factor, self.sums * factor, self.squares * factor)


class Pass(NamedTuple):
    """One look at all points: clusters [N], their counts [K] and sums [K, D], and the sum of squared distances."""

    clusters: Ids
    counts: NDArray[np.float64]
    sums: NDArray[np.float64]
    inertia: float


def nearest(points: Matrix, centres: Matrix) -> tuple[Ids, NDArray[np.float32]]:
    """The nearest centre of every point of a block, and its squared distance: [n], [n]."""
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2): in place, one matrix [n, K]
    closeness = points @ centres.T
    closeness -= (centres**2).sum(1) / 2
    best = closeness.argmax(1)
    return best, np.maximum((points**2).sum(1) - 2 * closeness[np.arange(len(best)), best], 0)


def assign(points: Matrix, centres: Matrix, sums: bool = True) -> Pass:
    """Look at all points [N, D], a block at a time; without `sums`, those stay zero."""
    number, width = centres.shape
    clusters, counts = np.zeros(len(points), np.int64), np.zeros(number)
    total, inertia = np.zeros((number if sums else 0, width)), 0.0
    for begin in range(0, len(points), BLOCK):
        block = np.asarray(points[begin : begin + BLOCK])
        best, distances = nearest(block, centres)
        clusters[begin : begin + len(block)] = best
        counts += np.bincount(best, minlength=number)
        inertia += float(distances.sum(dtype=np.float64))
        if sums:
            total += sum_by(block, best, number)
    return Pass(clusters, counts, total, inertia)


def sum_by(points: NDArray[np.floating], clusters: Ids, number: int) -> NDArray[np.float64]:
    """Sums of the points of every cluster: [number, D]; a sparse product is ten times as fast as np.add.at."""
    ones, rows = np.ones(len(points)), np.arange(len(points) + 1)
    members = csr_matrix((ones, clusters, rows), shape=(len(points), number))
    return np.asarray(members.T @ points.astype(np.float64))


def weigh(points: Matrix, targets: Ids, num_old: int) -> Labelled:
    """What labelled points [n, D] of classes 0 .. num_old - 1 weigh."""
    sums, squares = np.zeros((num_old, points.shape[1])), np.zeros(num_old)
    for begin in range(0, len(points), BLOCK):
        block, of = np.asarray(points[begin : begin + BLOCK]), targets[begin : begin + BLOCK]
        sums += sum_by(block, of, num_old)
        squares += np.bincount(of, (block.astype(np.float64) ** 2).sum(1), num_old)
    return Labelled(np.bincount(targets, minlength=num_old).astype(np.float64), sums, squares)


def seed_centres(labelled: Labelled, unlabelled: Matrix, num_classes: int, draws: np.random.Generator) -> Matrix:
    """Class means for old classes, k-means++ on the unlabelled points, all in memory, for the others: [K, D]."""
    means = (labelled.sums / labelled.counts[:, None]).astype(np.float32)
    centres = np.concatenate([means, np.zeros((num_classes - len(means), means.shape[1]), np.float32)])
    distances = nearest(unlabelled, means)[1]
    squares = (unlabelled**2).sum(1)
    for number in range(len(means), num_classes):
        shares = distances.astype(np.float64)
        total = shares.sum()  # nothing, where every point is a centre already
        centre = unlabelled[draws.choice(len(unlabelled), p=shares / total if total > 0 else None)]
        centres[number] = centre
        distances = np.minimum(distances, np.maximum(squares - 2 * (unlabelled @ centre) + centre @ centre, 0))
    return centres


def lloyd(
    labelled: Labelled,
    unlabelled: Matrix,
    centres: Matrix,
    passes: int,
    tolerance: float = 0.0,
    told: Callable[[int, float], None] = lambda number, inertia: None,
) -> tuple[Matrix, float]:
    """Lloyd's iterations from `centres` [K, D]; returns the last ones, and the sum of squared distances of all points.

    Args:
        passes: at most so many looks at the unlabelled points.
        tolerance: stop when the sum falls by no more than this share of it; 0: when no point changes its cluster.
        told: called after every pass with its number and the sum.
    """
    num_old = len(labelled.counts)
    clusters, last = None, np.inf
    for number in range(passes):
        seen = assign(unlabelled, centres)
        inertia = seen.inertia + _spread(labelled, centres)
        told(number, inertia)
        settled = tolerance > 0 and last - inertia <= tolerance * inertia
        if settled or (clusters is not None and np.array_equal(clusters, seen.clusters)):
            break
        clusters, last = seen.clusters, inertia
        counts, sums = seen.counts.copy(), seen.sums.copy()
        counts[:num_old] += labelled.counts
        sums[:num_old] += labelled.sums
        filled = counts > 0
        centres = centres.copy()
        centres[filled] = sums[filled] / counts[filled, None]
    return centres, inertia


def _spread(labelled: Labelled, centres: Matrix) -> float:
    """Sum of squared distances of the labelled points to the centres of their classes."""
    own = centres[: len(labelled.counts)].astype(np.float64)
    return float((labelled.squares - 2 * (own * labelled.sums).sum(1) + labelled.counts * (own**2).sum(1)).sum())


def semi_supervised_kmeans(
    labelled: Matrix,
    targets: Ids,
    unlabelled: Matrix,
    num_old: int,
    num_classes: int,
    restarts: int = 10,
    seed: int = 0,
    told: Callable[[int, float], None] = lambda number, inertia: None,
) -> Matrix:
    """Centres [K, D] of the best of `restarts` runs, by the sum of squared distances of all points.

    Args:
        labelled, targets: [n, D], [n]: points of the old classes 0 .. num_old - 1, all of which occur.
        unlabelled: [N, D], in memory or in a map. Beyond `SAMPLE` (and `SAMPLE_PER_CENTRE` a centre) at most
            `LARGE_RESTARTS` runs are made, on a sample, and the best one goes on over all points until the sum falls by
            less than a thousandth, 30 passes at most.
        told: called after every pass over all of many points with its number and the sum.
    """
    draws = np.random.default_rng(seed)
    weights, sample, factor = weigh(labelled, targets, num_old), unlabelled, 1.0
    size = max(SAMPLE, SAMPLE_PER_CENTRE * num_classes)
    if large := len(unlabelled) > size:
        chosen = np.sort(draws.choice(len(unlabelled), size, replace=False))
        sample, factor = np.asarray(unlabelled[chosen]), size / len(unlabelled)
    best, least = None, np.inf
    for _ in range(min(restarts, LARGE_RESTARTS) if large else restarts):
        start = seed_centres(weights, sample, num_classes, draws)
        centres, inertia = lloyd(weights.scaled(factor), sample, start, 300, 1e-3 if large else 0.0)
        if inertia < least:
            best, least = centres, inertia
    assert best is not None
    return lloyd(weights, unlabelled, best, 30, 1e-3, told)[0] if large else best
