"""Clustering accuracy of generalized category discovery (Vaze et al., CVPR 2022, section 4.1)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

MAX_CLUSTERS = 32_768  # the square matrix of so many clusters takes 8 GiB; ids beyond that are a mistake


class Accuracy(NamedTuple):
    """Shares between 0 and 1; nan where there is no sample to count."""

    all: float
    old: float
    new: float


class Matching(NamedTuple):
    """counts: [K, K], how many samples of class (column) are in cluster (row); class_of: [K], each cluster's class."""

    counts: np.ndarray
    class_of: np.ndarray


def _class_ids(values: ArrayLike, what: str) -> np.ndarray:
    ids = np.asarray(values)
    if ids.size == 0:
        raise ValueError(f"{what} are empty: there is no accuracy of nothing")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{what} must be a vector of integers, not {ids.dtype} of shape {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= MAX_CLUSTERS:
        raise ValueError(f"{what} range from {low} to {high}: class ids lie between 0 and {MAX_CLUSTERS - 1}")
    return ids.astype(np.int64, copy=False)


def _counted(targets: ArrayLike, predictions: ArrayLike) -> np.ndarray:
    """[K, K], how many samples of class (column) are in cluster (row)."""
    y, p = _class_ids(targets, "targets"), _class_ids(predictions, "predictions")
    if len(y) != len(p):
        raise ValueError(f"{len(y)} targets but {len(p)} predictions")
    size = int(max(y.max(), p.max())) + 1
    return np.bincount(p * size + y, minlength=size * size).reshape(size, size)


def best_matching(targets: ArrayLike, predictions: ArrayLike) -> Matching:
    """Find the one best assignment of clusters to classes, on all samples together; arguments as below.

    Raises:
        ValueError: as `clustering_accuracy`.
    """
    counts = _counted(targets, predictions)
    return Matching(counts, linear_sum_assignment(counts, maximize=True)[1])


def clustering_accuracy(targets: ArrayLike, predictions: ArrayLike, num_old: int, balanced: bool = False) -> Accuracy:
    """Accuracy under the one best assignment of predicted clusters to classes, found on all samples together.

    Args:
        targets: [N] integers; classes below `num_old` are old.
        predictions: [N] integers from 0 to 32,767, also more of them than there are classes.
        num_old: number of old classes.
        balanced: average over the classes that occur instead of over the samples.

    Returns:
        All, Old, New. Old or New is nan where no target belongs to it.

    Raises:
        ValueError: empty input, lengths that differ, or ids that are no class ids.
    """
    return accuracy_of_counts(_counted(targets, predictions), num_old, balanced)


def accuracy_of_counts(counts: np.ndarray, num_old: int, balanced: bool = False) -> Accuracy:
    """`clustering_accuracy` of samples that are counted already.

    Args:
        counts: [K, K], how many samples of class (column) are in cluster (row); not all 0.
    """
    # ids that nothing has would make no difference but to which of several best assignments is found
    size = int(np.flatnonzero(counts.any(0) | counts.any(1))[-1]) + 1
    counts = counts[:size, :size]
    class_of = linear_sum_assignment(counts, maximize=True)[1]
    correct = np.zeros(size)
    correct[class_of] = counts[np.arange(size), class_of]
    samples = counts.sum(0)
    occurs = samples > 0
    old = np.arange(size) < num_old

    def share(classes: np.ndarray) -> float:
        classes = classes & occurs
        if not classes.any():
            return float("nan")
        if balanced:
            return float((correct[classes] / samples[classes]).mean())
        return float(correct[classes].sum() / samples[classes].sum())

    return Accuracy(share(np.ones(size, dtype=bool)), share(old), share(~old))
