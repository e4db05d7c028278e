"""How many images the datasets of the field have: exactly, per part and per class, or a source is not that dataset.

Sources: CIFAR's, CUB's, Stanford Cars', FGVC-Aircraft's and ILSVRC2012's own pages and papers; Herbarium 19: Tan et
al., arXiv 1906.05372. Where the counts of a class are not published one by one, the smallest and the largest are.
"""

from typing import NamedTuple

from sptnet_shards.source import Counts, Source, SourceError

FORCED = "--unofficial"


class Part(NamedTuple):
    """Images of one part of a dataset, and the least and the most that a class of it has."""

    images: int
    least: int
    most: int


# training and test part
PARTS: dict[str, tuple[Part, Part]] = {
    "cifar10": (Part(50_000, 5_000, 5_000), Part(10_000, 1_000, 1_000)),
    "cifar100": (Part(50_000, 500, 500), Part(10_000, 100, 100)),
    "imagenet1k": (Part(1_281_167, 732, 1_300), Part(50_000, 50, 50)),
    "imagenet100": (Part(1_281_167, 732, 1_300), Part(50_000, 50, 50)),  # of all of ImageNet, which it is chosen from
    "cub": (Part(5_994, 29, 30), Part(5_794, 11, 30)),
    "scars": (Part(8_144, 1, 8_144), Part(8_041, 1, 8_041)),
    "aircraft": (Part(6_667, 66, 67), Part(3_333, 33, 34)),
    "herbarium_19": (Part(34_225, 1, 34_225), Part(2_679, 0, 2_679)),
}


def check_published(source: Source) -> None:
    """Raise SourceError where a dataset of the field has other counts than the published ones.

    One image too few changes which images are labelled, for they are drawn from all of an old class's.
    """
    if source.name not in PARTS:
        return
    counted = source.whole or (_per_class(source, "train"), _per_class(source, "test"))
    for name, part, found in zip(("training", "test"), PARTS[source.name], counted, strict=True):
        _check_part(f"{source.name} has", name, part, found)


def _per_class(source: Source, part: str) -> Counts:
    return dict.fromkeys(source.classes, 0) | source.part(part).counts()


def _check_part(told: str, name: str, part: Part, found: Counts) -> None:
    advice = f"complete the source, or convert it as it is with {FORCED}"
    if (images := sum(found.values())) != part.images:
        raise SourceError(f"{told} {images:,} {name} images, published are {part.images:,}: {advice}")
    for label, count in found.items():
        if not part.least <= count <= part.most:
            wanted = str(part.least) if part.least == part.most else f"{part.least} to {part.most}"
            raise SourceError(f"{told} {count} {name} images of class {label!r}, published are {wanted}: {advice}")
