"""Which training images are labelled: the field's protocol (Vaze et al., CVPR 2022, section 2)."""

import numpy as np

from shards.source import Source, SourceError


def labelled_positions(source: Source, fraction: float, seed: int) -> set[int]:
    """Positions in `source.train` whose labels are given: a share of the images of old classes.

    As the field draws them: numpy's RandomState(seed).choice over those images in the source's own order. NumPy keeps
    that stream for good (NEP 19).

    Raises:
        SourceError: a fraction that leaves nothing labelled or nothing unlabelled.
    """
    old = set(source.classes[: source.num_old])
    positions = np.array([i for i, item in enumerate(source.train) if item.class_name in old])
    count = int(fraction * len(positions))
    if not 0 < count < len(source.train):
        raise SourceError(
            f"--labelled-fraction {fraction} of {len(positions)} images of old classes"
            f" labels {count} of {len(source.train)}"
        )
    chosen = np.random.RandomState(seed).choice(len(positions), count, replace=False)
    return {int(i) for i in positions[chosen]}
