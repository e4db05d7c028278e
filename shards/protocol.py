"""The field's protocol: which classes are old, which images are labelled (Vaze et al., CVPR 2022, section 2)."""

import json
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.source import Source, SourceError

# labelled and unlabelled training images as published, in thousands, and the thousands that the last digit stands for
# (Vaze et al. 2022, table 1; Wen et al. 2023, table 1; ImageNet-1K: Wen et al. 2023, section 4)
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "cifar10": (12.5, 37.5, 0.1),
    "cifar100": (20.0, 30.0, 0.1),
    "imagenet100": (31.9, 95.3, 0.1),
    "imagenet1k": (321, 960, 1),
    "cub": (1.5, 4.5, 0.1),
    "scars": (2.0, 6.1, 0.1),
    "aircraft": (1.7, 5.0, 0.1),
    "herbarium_19": (8.9, 25.4, 0.1),
}
PROTOCOL_FRACTION = 0.5


def class_split(name: str) -> tuple[list[int], list[int]]:
    """Old and new class indices of cub, scars, aircraft (Semantic Shift Benchmark) or herbarium_19.

    0-based, in the dataset's own class order; a target is a class's position in old + new.
    """
    splits = json.loads(resources.files("sptnet_shards").joinpath("class_splits.json").read_text())
    return splits[name]["old"], splits[name]["new"]


def labelled_positions(source: Source, fraction: float, seed: int) -> NDArray[np.int64]:
    """Positions in `source.train` whose labels are given, ascending: a share of the images of old classes.

    As the field draws them: numpy's RandomState(seed).choice over those images in the source's own order. NumPy keeps
    that stream for good (NEP 19).

    Raises:
        SourceError: a fraction that leaves nothing labelled or nothing unlabelled.
    """
    positions = source.part("train").of_classes(source.classes[: source.num_old])
    count = int(fraction * len(positions))
    if not 0 < count <= len(positions) or count == len(source.train):
        raise SourceError(
            f"--labelled-fraction {fraction} of {len(positions)} images of old classes"
            f" labels {count} of {len(source.train)}"
        )
    chosen = np.random.RandomState(seed).choice(len(positions), count, replace=False)
    return np.sort(positions[chosen])


def deviation(name: str, labelled: int, unlabelled: int, fraction: float) -> str | None:
    """What differs from the published counts of a dataset of the field, or None."""
    if name not in PUBLISHED or fraction != PROTOCOL_FRACTION:
        return None
    *published, digit = PUBLISHED[name]
    # a number cut off or rounded at its last digit
    if all(abs(n / 1000 - p) < digit for n, p in zip((labelled, unlabelled), published, strict=True)):
        return None
    return (
        f"{name} has {labelled:,} labelled and {unlabelled:,} unlabelled training images, "
        f"published are {published[0]:g}k and {published[1]:g}k: is the source complete?"
    )
