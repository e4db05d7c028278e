"""Semi-supervised k-means (Vaze et al., CVPR 2022, section 3.2): labelled samples stay in their class's cluster."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]


def squared_distances(points: Matrix, centres: Matrix) -> Matrix:
    """[N, D], [K, D] -> [N, K]."""
    crossed = points @ centres.T
    return (points**2).sum(1)[:, None] - 2 * crossed + (centres**2).sum(1)[None, :]


def seed_centres(
    labelled: Matrix, targets: Ids, unlabelled: Matrix, num_old: int, num_classes: int, draws: np.random.Generator
) -> Matrix:
    """Class means for old classes, k-means++ on the unlabelled points for the others: [K, D]."""
    centres = [labelled[targets == c].mean(0) for c in range(num_old)]
    while len(centres) < num_classes:
        nearest = np.maximum(squared_distances(unlabelled, np.stack(centres)).min(1), 0)
        centres.append(unlabelled[draws.choice(len(unlabelled), p=nearest / nearest.sum())])
    return np.stack(centres)


def semi_supervised_kmeans(
    labelled: Matrix,
    targets: Ids,
    unlabelled: Matrix,
    num_old: int,
    num_classes: int,
    restarts: int = 10,
    seed: int = 0,
) -> Matrix:
    """Centres [K, D] of the best of `restarts` runs, by the sum of squared distances of all points.

    Args:
        labelled, targets: [n, D], [n]: points of the old classes 0 .. num_old - 1, all of which occur.
        unlabelled: [N, D].
    """
    draws = np.random.default_rng(seed)
    best, best_inertia = None, np.inf
    for _ in range(restarts):
        centres = seed_centres(labelled, targets, unlabelled, num_old, num_classes, draws)
        assigned = None
        for _ in range(300):
            distances = squared_distances(unlabelled, centres)
            nearest = distances.argmin(1)
            if assigned is not None and np.array_equal(nearest, assigned):
                break
            assigned = nearest
            points, clusters = np.concatenate([labelled, unlabelled]), np.concatenate([targets, assigned])
            filled = [c for c in range(num_classes) if (clusters == c).any()]
            centres[filled] = [points[clusters == c].mean(0) for c in filled]
        inertia = float(distances.min(1).sum()) + float(((labelled - centres[targets]) ** 2).sum())
        if inertia < best_inertia:
            best, best_inertia = centres, inertia
    assert best is not None
    return best
