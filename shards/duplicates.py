"""Images that are there twice: in training and test, which makes the test easier, or in two classes."""

from collections.abc import Sequence

import numpy as np
from sptnet_shards.plan import Planned
from sptnet_shards.source import UNKNOWN, Item
from sptnet_shards.writer import Written


def duplicates(planned: Sequence[Planned], written: Sequence[Written], classes: Sequence[str]) -> list[str]:
    """A sentence on stored images of equal bytes in training and test, and one on those in two classes.

    Args:
        planned, written: of the same shards, in the same order.
    """
    contents = np.concatenate([shard.contents for shard in written])
    order = np.argsort(contents, kind="stable")
    # positions in `order` of an image whose follower there is equal to it
    same = np.flatnonzero(contents[order][1:] == contents[order][:-1])
    if not same.size:
        return []
    one, other = order[same], order[same + 1]
    numbers = {UNKNOWN: -1} | {name: number for number, name in enumerate(classes)}
    items: list[Item] = []
    for shard, done in zip(planned, written, strict=True):
        left_out = set(done.skipped)
        items += [item for uid, item in shard.samples if uid not in left_out]
    labels = np.array([numbers[item.class_name] for item in items])
    is_test = np.repeat([shard.kind == "test" for shard in planned], [len(done.contents) for done in written])
    across = is_test[one] != is_test[other]
    mixed = ~across & (labels[one] != labels[other]) & (labels[one] >= 0) & (labels[other] >= 0)
    told = []
    for chosen, where in ((across, "in training and in test"), (mixed, "in two classes")):
        if count := int(chosen.sum()):
            first, second = (items[int(side[chosen][0])].where for side in (one, other))
            told.append(f"{count} images are {where}: the first are {first} and {second}")
    return told
