"""Ward's tree over weighted points, by nearest-neighbour chains (Murtagh 1983); scipy's and sklearn's take no weights.

Merging clusters of weights a and b raises the sum of squared distances by a b / (a + b) |c_a - c_b|^2. That never falls
from merge to merge, so chains of mutual nearest neighbours give the same tree as looking for the smallest rise every
time. A chain needs one row of distances at a time: O(M) memory beside the points, O(M^2 D) time.
"""

import numpy as np
from numpy.typing import NDArray


def ward_tree(points: NDArray[np.floating], weights: NDArray[np.floating]) -> NDArray[np.float64]:
    """The merges of M points [M, D] of weights [M], from the smallest rise to the largest.

    Returns:
        [M - 1, 3]: two members that stand for their clusters, of which the first stands for both from then on, and by
        how much the sum of squared distances rises.
    """
    centres, weight = points.astype(np.float64), weights.astype(np.float64)
    squares, alive = (centres**2).sum(1), np.ones(len(centres), bool)
    merges, chain = list[tuple[int, int, float]](), list[int]()
    while len(merges) < len(centres) - 1:
        if not chain:
            chain.append(int(alive.argmax()))
        last = chain[-1]
        rises = squares[last] + squares - 2 * (centres @ centres[last])
        rises *= weight[last] * weight / (weight[last] + weight)
        rises[~alive] = np.inf
        rises[last] = np.inf
        nearest = int(rises.argmin())
        # of equal ones the one before, or a chain would never end
        if len(chain) > 1 and rises[chain[-2]] <= rises[nearest]:
            nearest = chain[-2]
        if len(chain) == 1 or nearest != chain[-2]:
            chain.append(nearest)
            continue
        del chain[-2:]
        keep, gone = min(last, nearest), max(last, nearest)
        merges.append((keep, gone, max(float(rises[nearest]), 0.0)))
        total = weight[keep] + weight[gone]
        centres[keep] = (weight[keep] * centres[keep] + weight[gone] * centres[gone]) / total
        squares[keep], weight[keep], alive[gone] = centres[keep] @ centres[keep], total, False
    tree = np.array(merges, np.float64).reshape(-1, 3)
    return tree[np.argsort(tree[:, 2], kind="stable")]


def cut(tree: NDArray[np.float64], number: int) -> NDArray[np.int64]:
    """The clusters [M] of a tree's members when `number` are left, numbered from 0."""
    parent = np.arange(len(tree) + 1)
    for keep, gone in tree[: max(0, len(parent) - number), :2].astype(np.int64):
        # a member stands for its cluster in the order of the chains, not of the rises: join the roots
        a, b = _root(parent, keep), _root(parent, gone)
        parent[max(a, b)] = min(a, b)
    roots = np.array([_root(parent, member) for member in range(len(parent))])
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def _root(parent: NDArray[np.int64], member: int) -> int:
    while parent[member] != member:
        parent[member] = parent[parent[member]]
        member = int(parent[member])
    return member
