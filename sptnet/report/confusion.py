"""Which class was taken for which, after clusters were matched with classes as the accuracy does it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sptnet.method.metrics import MAX_CLUSTERS, best_matching
from sptnet.report.categories import Sorted

LARGEST = 100  # classes of a matrix; more are aggregated
LISTED = 20  # confusions


class Cell(NamedTuple):
    """row (true), column (taken for), images, and their share of the true class."""

    row: int
    column: int
    images: int
    share: float


class Pair(NamedTuple):
    """A confusion by name."""

    true: str
    taken: str
    images: int
    share: float


class Confusion(NamedTuple):
    """names: [n] classes that occur, old ones first; cells: None above LARGEST classes.

    aggregated: rows of (true: old or new; shares of: the right class, another old, another new; images).
    """

    names: list[str]
    num_old: int
    cells: list[Cell] | None
    aggregated: list[tuple[str, list[float], int]]
    pairs: list[Pair]
    images: int


def confusion_of(found: Sorted, num_old: int, true_name: Callable[[int], str]) -> Confusion | None:
    """The confusion of the images whose class is known; None where there are none, or too many classes to match."""
    known = found.target >= 0
    if not known.any() or max(found.target.max(), found.category.max()) >= MAX_CLUSTERS:
        return None
    counts, class_of = best_matching(found.target[known], found.category[known])
    # [true, taken for]: the cluster of a row of `counts` stands for its matched class
    matrix = np.zeros_like(counts)
    matrix[:, class_of] = counts.T
    sizes = matrix.sum(1)
    occurs = np.flatnonzero(sizes | matrix.sum(0))
    true, taken = np.nonzero(matrix)
    images = matrix[true, taken]
    shares = images / sizes[true]
    place = {int(number): i for i, number in enumerate(occurs)}
    cells = None
    if len(occurs) <= LARGEST:
        cells = [
            Cell(place[int(t)], place[int(c)], int(n), float(s))
            for t, c, n, s in zip(true, taken, images, shares, strict=True)
        ]
    wrong = np.flatnonzero(true != taken)
    most = wrong[np.argsort(-images[wrong], kind="stable")][:LISTED]
    pairs = [Pair(true_name(int(true[i])), true_name(int(taken[i])), int(images[i]), float(shares[i])) for i in most]
    aggregated = []
    for age, of in (("old", true < num_old), ("new", true >= num_old)):
        total = int(images[of].sum())
        if total:
            right, to_old = true == taken, taken < num_old
            parts = [right, ~right & to_old, ~right & ~to_old]
            aggregated.append((age, [float(images[of & part].sum() / total) for part in parts], total))
    names = [true_name(int(number)) for number in occurs]
    return Confusion(names, int((occurs < num_old).sum()), cells, aggregated, pairs, int(known.sum()))
