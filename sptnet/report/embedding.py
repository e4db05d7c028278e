"""The images as a map: t-SNE (van der Maaten and Hinton, JMLR 2008) of their class tokens, by scikit-learn."""

from typing import NamedTuple

import numpy as np

from sptnet.report.categories import Sorted
from sptnet.report.inference import Inferred

MAPPED, FEWEST = 5000, 8  # images at most, and at least
DIMENSIONS, PERPLEXITY = 50, 30.0  # of a PCA in front; t-SNE's usual one
SIZE = 720  # of the picture, in its own units
GOLDEN = 137.508  # degrees: neighbours in number get colours far apart


class Group(NamedTuple):
    """A category's images in the map: one path of dots, in units of the picture."""

    category: int
    hue: int
    path: str


class Map(NamedTuple):
    """groups by category, `height` of the picture, and how many images they are of how many."""

    groups: list[Group]
    height: int
    images: int
    total: int


def map_of(looked: Inferred, found: Sorted) -> Map | None:
    """A map of at most MAPPED of the images that were looked at; None where they are too few."""
    rows, tokens = looked.rows, looked.tokens
    if len(rows) > MAPPED:
        chosen = np.sort(np.random.default_rng(0).choice(len(rows), MAPPED, replace=False))
        rows, tokens = rows[chosen], tokens[chosen]
    if len(rows) < FEWEST or np.ptp(tokens, axis=0).max() == 0:
        return None
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    points = tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
    if min(points.shape) > DIMENSIONS:
        points = PCA(DIMENSIONS, random_state=0).fit_transform(points)
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    # threads would wait for each other in each of a thousand rounds: minutes, where others use the cores too
    with threadpool_limits(1, user_api="openmp"):
        flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    low, extent = flat.min(0), np.maximum(np.ptp(flat, axis=0).max(), 1e-12)
    placed = 10 + (SIZE - 20) * (flat - low) / extent
    groups = []
    for number in np.unique(found.category[rows]).tolist():
        mine = placed[found.category[rows] == number]
        # a dot is a line of no length with round ends: one path for all of a category
        path = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in mine)
        groups.append(Group(number, round(GOLDEN * number) % 360, path))
    return Map(groups, round(placed[:, 1].max()) + 10, len(rows), len(found.uid))
