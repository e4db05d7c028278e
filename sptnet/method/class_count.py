"""How many classes there are, from how labelled samples fall into clusters.

`brent`, after Vaze et al. (CVPR 2022, section 3.3): k-means on all samples for the numbers that Brent's bounded search
asks for, the accuracy on labelled ones being maximised; one start a number, and points as they are given.

`tree`: one weighted Ward tree over micro-clusters, cut at every number K. With w(K) the share of labelled pairs of one
class that are in one cluster, and q(K) that of labelled pairs of two classes, two numbers bracket the answer:

- lower: split and merged pairs balance *among the labelled classes*, (1 - w) S = q (1 - S), S being the share of pairs
  that are of one class. Too small, since a class that is merged with one that nobody labelled goes unseen.
- upper: they balance if all K classes are confused as the labelled ones are, 1 - w = (K - 1) q. Too large, since
  classes that no clustering keeps apart are then paid for by splitting others.

The answer is their geometric mean. It was chosen among six measures on one set of photographs (81 classes, 41 of them
old, seven choices of those): there it gave 70 to 87, a median error of 7%; maximising the accuracy over the cuts of the
same tree, smoothed over log K, 45 to 76, 31%. docs/discover.md has further choices, and CIFAR-10. Repeats on part of
the labels, with part of the old classes hidden, say how far the answer depends on which happen to be labelled.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize_scalar

from sptnet.method.kmeans import Ids, Matrix, assign, sum_by
from sptnet.method.ward import cut, ward_tree

Method = Literal["tree", "brent"]
Contingency = NDArray[np.float64]  # [clusters, old classes]: labelled samples of a class in a cluster
REPEATS = 10
HIDDEN, KEPT = 1 / 3, 0.63  # shares of the old classes that a repeat does without, and of labels that it has
MICRO = 8192
MICRO_SAMPLE, MICRO_PASSES = 16, 8  # points a micro-cluster that it is fitted on; Lloyd's passes over them
MARGIN = 0.1  # of the interval on either side, at least: the error that remains where clusters are clean
GRID = 160  # numbers of clusters that are tried, at most: equally spaced over log K
LARGEST, PER_OLD = 1000, 4  # number that is tried, at least, as published; and so many for every old class
BANDWIDTH = 0.08  # of the smoothing, in log K
BRENT_SAMPLE = 20_000  # points that brent's k-means runs see, at most


class Estimate(NamedTuple):
    """How many classes, old ones included.

    median: of the repeats; of `brent` the search's answer with all labels.
    low, high: the interval; of `tree` the lower quartile of the lower ends and the upper one of the upper ends, and at
        least `MARGIN` to either side.
    numbers, accuracy: [n] the curve: clusters, and the accuracy on all labelled samples.
    repeats: the answer of every repeat.
    cut_off: whether an answer is the largest number that was tried, and there may be more.
    """

    median: int
    low: int
    high: int
    numbers: list[int]
    accuracy: list[float]
    repeats: list[int]
    cut_off: bool


class Labels(NamedTuple):
    """A repeat's labels: how often every labelled sample counts [n], and the old classes that it sees [C] bool."""

    counts: NDArray[np.int64]
    seen: NDArray[np.bool_]


def resampled(targets: Ids, num_old: int, repeats: int, draws: np.random.Generator) -> list[Labels]:
    """The labels of every repeat: a share of them, as many as differ in a bootstrap, and a share of the old classes.

    Without replacement: a sample drawn twice is a pair that no clustering splits.
    """
    told = []
    for _ in range(repeats):
        seen = np.ones(num_old, bool)
        seen[draws.choice(num_old, min(max(num_old - 2, 0), max(1, round(HIDDEN * num_old))), replace=False)] = False
        told.append(Labels((draws.random(len(targets)) < KEPT).astype(np.int64), seen))
    return told


def contingency(clusters: Ids, targets: Ids, labels: Labels, number: int) -> Contingency:
    """[number, seen classes] of labelled samples, by how often they count."""
    table = np.zeros((number, len(labels.seen)))
    np.add.at(table, (clusters, targets), labels.counts)
    return table[:, labels.seen]


def accuracy_of(table: Contingency) -> float:
    """Share of samples in the cluster that their class is matched with, under the best matching."""
    table = table[table.any(1)]
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / max(table.sum(), 1))


class Balance(NamedTuple):
    """log of split pairs over merged pairs: among the labelled classes, and as if all K classes were such."""

    among_labelled: float
    among_all: float


def balance_of(table: Contingency, number: int) -> Balance:
    """The balance of `number` clusters, by distinct pairs of labelled samples."""
    classes, total = table.sum(0), table.sum()
    same, pairs = (classes * (classes - 1)).sum(), total * (total - 1)
    together = (table.sum(1) * (table.sum(1) - 1)).sum()
    within = (table * (table - 1)).sum()
    split, merged = same - within, together - within
    # one pair more of each: where labelled samples fall into clusters without fault, neither side is infinite
    apart, q = (split + 1) / (same + 1), (merged + 1) / (pairs - same + 1)
    return Balance(float(np.log((split + 1) / (merged + 1))), float(np.log(apart / (max(number - 1, 1) * q))))


def crossing(numbers: NDArray[np.int64], balances: NDArray[np.float64]) -> int:
    """The number of clusters at which a balance, a Gaussian mean over log K, is nearest to 0."""
    apart = np.log(numbers)[:, None] - np.log(numbers)[None, :]
    weights = np.exp(-0.5 * (apart / BANDWIDTH) ** 2)
    return int(numbers[np.abs((weights @ balances) / weights.sum(1)).argmin()])


def micro_clusters(labelled: Matrix, unlabelled: Matrix, seed: int) -> tuple[Ids, Matrix, NDArray[np.float64]]:
    """At most `MICRO` clusters of all points: those of the labelled ones [n], centres [M, D], and counts [M]."""
    draws = np.random.default_rng(seed)
    total = len(labelled) + len(unlabelled)
    number = min(MICRO, total)
    size = min(total, MICRO_SAMPLE * number)
    places = np.sort(draws.choice(total, size, replace=False))
    split = int(np.searchsorted(places, len(labelled)))
    sample = np.concatenate([labelled[places[:split]], unlabelled[places[split:] - len(labelled)]])
    centres = sample[draws.choice(len(sample), number, replace=False)]
    for _ in range(MICRO_PASSES):
        seen = assign(sample, centres)
        filled = seen.counts > 0
        centres = (seen.sums[filled] / seen.counts[filled, None]).astype(np.float32)
    of_labelled, others = assign(labelled, centres), assign(unlabelled, centres)
    counts, sums = of_labelled.counts + others.counts, of_labelled.sums + others.sums
    kept = np.flatnonzero(counts)
    renamed = np.full(len(counts), -1)
    renamed[kept] = np.arange(len(kept))
    return renamed[of_labelled.clusters], (sums[kept] / counts[kept, None]).astype(np.float32), counts[kept]


def grid(low: int, high: int) -> NDArray[np.int64]:
    """Numbers of clusters from `low` to `high`: all of them, or `GRID` equally spaced over their logarithm."""
    if high - low < GRID:
        return np.arange(low, high + 1)
    return np.unique(np.geomspace(low, high, GRID).round().astype(np.int64))


def default_largest(num_old: int) -> int:
    """The largest number of classes that is tried where nobody says one."""
    return max(LARGEST, PER_OLD * num_old)


def estimate_by_tree(
    labelled: Matrix, targets: Ids, unlabelled: Matrix, num_old: int, max_classes: int | None, seed: int = 0
) -> Estimate:
    """See the module; points as for `semi_supervised_kmeans`.

    Args:
        max_classes: the largest number that is tried; None: `default_largest`, and twice as many as long as one of the
            ends, which the answer is the mean of, is the largest.
    """
    micro, centres, counts = micro_clusters(labelled, unlabelled, seed)
    tree = ward_tree(centres, counts)
    everything = Labels(np.ones(len(targets), np.int64), np.ones(num_old, bool))
    labels = [everything, *resampled(targets, num_old, REPEATS, np.random.default_rng(seed))]
    tables = [contingency(micro, targets, one, len(centres)) for one in labels]
    largest = default_largest(num_old) if max_classes is None else max_classes
    while True:
        numbers = grid(num_old, max(num_old, min(largest, len(centres))))
        ends, accuracy = _ends(tree, tables, numbers)
        cut_off = ends.max() == numbers[-1] < len(labelled) + len(unlabelled)
        if not cut_off or max_classes is not None or largest >= len(centres):
            break
        largest *= 2
    found = np.sqrt(ends.prod(1)).round().astype(int).tolist()
    low, high = int(np.quantile(ends[:, 0], 0.25)), int(np.ceil(np.quantile(ends[:, 1], 0.75)))
    median = int(np.median(found))
    low = max(num_old, min(low, int((1 - MARGIN) * median)))
    high = max(high, int(np.ceil((1 + MARGIN) * median)))
    return Estimate(median, low, high, numbers.tolist(), accuracy.tolist(), found, bool(cut_off))


def _ends(
    tree: NDArray[np.float64], tables: Sequence[Contingency], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends [repeats, 2] of every table behind the first, and the accuracy [n] by the first.

    Args:
        tables: of micro-clusters; the first has all labels.
    """
    balances = np.zeros((len(tables) - 1, 2, len(numbers)))
    accuracy = np.zeros(len(numbers))
    for column, number in enumerate(numbers.tolist()):
        clusters = cut(tree, number)
        cells = [sum_by(table, clusters, number) for table in tables]
        accuracy[column] = accuracy_of(cells[0])
        balances[:, :, column] = [balance_of(one, number) for one in cells[1:]]
    return np.array([[crossing(numbers, curve) for curve in repeat] for repeat in balances], np.float64), accuracy


def estimate_by_brent(
    labelled: Matrix,
    targets: Ids,
    unlabelled: Matrix,
    num_old: int,
    max_classes: int | None,
    seed: int = 0,
    told: Callable[[int], None] = lambda number: None,
) -> Estimate:
    """See the module; on a sample of at most `BRENT_SAMPLE` points; a k-means run serves every repeat that asks for it.

    Args:
        max_classes: the largest number that is tried; None: `default_largest`.
        told: called with the number of clusters of every k-means run.
    """
    from sklearn.cluster import KMeans

    draws = np.random.default_rng(seed)
    share = min(1.0, BRENT_SAMPLE / (len(labelled) + len(unlabelled)))
    chosen = [np.sort(draws.choice(len(p), round(share * len(p)), replace=False)) for p in (labelled, unlabelled)]
    targets = targets[chosen[0]]
    points = np.concatenate([labelled[chosen[0]], unlabelled[chosen[1]]])
    runs: dict[int, Ids] = {}

    largest = default_largest(num_old) if max_classes is None else max_classes
    most = min(largest, len(points))

    def clusters(number: int) -> Ids:
        if number not in runs:
            told(number)
            fitted = KMeans(number, n_init=1, max_iter=100, random_state=seed).fit(points)
            runs[number] = fitted.labels_[: len(targets)].astype(np.int64)
        return runs[number]

    def search(labels: Labels) -> int:
        def loss(number: float) -> float:
            return -accuracy_of(contingency(clusters(int(number)), targets, labels, int(number)))

        return int(minimize_scalar(loss, bounds=(num_old, most), method="bounded", options={"maxiter": 20}).x)

    everything = Labels(np.ones(len(targets), np.int64), np.ones(num_old, bool))
    with_all = search(everything)
    found = [search(one) for one in resampled(targets, num_old, REPEATS, draws)]
    numbers = np.array(sorted(runs))
    curve = np.array([accuracy_of(contingency(runs[n], targets, everything, n)) for n in numbers.tolist()])
    low, high = min(with_all, *found), max(with_all, *found)
    cut_off = largest < len(points) and high >= most - 1  # the search never looks at a bound itself
    return Estimate(with_all, low, high, numbers.tolist(), curve.tolist(), found, cut_off)
