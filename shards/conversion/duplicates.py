"""Images that are there twice: in training and test, which makes the test easier, or in two classes."""

from collections.abc import Sequence

import numpy as np
from sptnet_shards.conversion.plan import Planned
from sptnet_shards.conversion.writer import Written
from sptnet_shards.items import UNKNOWN
from sptnet_shards.source import Source


def duplicates(planned: Sequence[Planned], written: Sequence[Written], source: Source) -> list[str]:
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
    numbers = {UNKNOWN: -1} | {name: number for number, name in enumerate(source.classes)}
    targets = {part: source.part(part).targets(numbers) for part in ("train", "test")}
    uids = np.concatenate(
        [np.setdiff1d(shard.uids, done.skipped, assume_unique=True) if done.skipped else shard.uids
         for shard, done in zip(planned, written, strict=True)]
    )  # fmt: skip
    is_test = np.repeat([shard.kind == "test" for shard in planned], [len(done.contents) for done in written])
    labels = np.empty(len(uids), np.int64)
    for part, chosen in (("train", ~is_test), ("test", is_test)):
        labels[chosen] = targets[part][uids[chosen]]
    across = is_test[one] != is_test[other]
    mixed = ~across & (labels[one] != labels[other]) & (labels[one] >= 0) & (labels[other] >= 0)
    told = []
    for chosen, where in ((across, "in training and in test"), (mixed, "in two classes")):
        if count := int(chosen.sum()):
            first, second = (
                source.part("test" if is_test[place] else "train").where(int(uids[place]))
                for place in (int(side[chosen][0]) for side in (one, other))
            )
            told.append(f"{count} images are {where}: the first are {first} and {second}")
    return told
