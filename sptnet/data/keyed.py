"""Random numbers by key: the same key gives the same numbers on any machine, in any process, in any order.

Philox is a counter-based generator (Salmon et al., SC 2011): no state is carried from one draw to the next. Only raw
bits are used, since numpy promises the bit stream of its bit generators for all versions (NEP 19) but not what
`Generator.permutation` makes of them.
"""

import numpy as np
from numpy.typing import NDArray

# what a key is used for; values are part of the data order, never renumber them
SHARD_ORDER, SAMPLE_ORDER, AUGMENTATION, DEAL, SHOW, VIEW, VIEW_CHOICE = 1, 2, 3, 4, 5, 6, 7


def raw(seed: int, purpose: int, a: int, b: int, c: int, count: int) -> NDArray[np.uint64]:
    """`count` uint64 that depend on nothing but the key (seed, purpose, a, b, c)."""
    generator = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array([0, a, b, c], np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def permutation(seed: int, purpose: int, a: int, b: int, c: int, count: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1."""
    return np.argsort(raw(seed, purpose, a, b, c, count), kind="stable")


def uniforms(seed: int, purpose: int, a: int, b: int, c: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), of 53 random bits each."""
    bits = raw(seed, purpose, a, b, c, count) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
