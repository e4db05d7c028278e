"""How many images a run looks at: as its manifest says, as the papers say, or as one is told."""

from dataclasses import dataclass
from pathlib import Path

from sptnet.build import build_store, num_new_classes
from sptnet.config import Config
from sptnet.data.format.files import is_url
from sptnet.plan.hardware import PlanError

MOST_CLASSES = 10**6  # as model.num_new
# labelled, unlabelled, test images, old and all classes: SimGCD (ICCV 2023), table 1, in thousands where it rounds;
# test sets by their publishers
PUBLISHED = {
    "cifar10": (12_500, 37_500, 10_000, 5, 10), "cifar100": (20_000, 30_000, 10_000, 80, 100),
    "imagenet100": (31_900, 95_300, 5_000, 50, 100), "imagenet1k": (321_000, 960_000, 50_000, 500, 1000),
    "cub": (1_500, 4_500, 5_794, 100, 200), "scars": (2_000, 6_100, 8_041, 98, 196),
    "aircraft": (1_700, 5_000, 3_333, 50, 100), "herbarium_19": (8_900, 25_400, 2_679, 341, 683),
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Images by kind and classes of a dataset. `bytes`: of its shards, None where they are not here."""

    labelled: int
    unlabelled: int
    test: int
    old: int
    classes: int
    source: str
    bytes: int | None = None


def counts_of(config: Config, images: tuple[int, int, int] | None, classes: tuple[int, int] | None) -> Counts:
    """The counts of a run's dataset.

    Args:
        images: labelled, unlabelled and test ones, as one is told.
        classes: old and new ones, likewise.

    Raises:
        PlanError, ConfigError: nobody has said it.
        DatasetError: a manifest that is there and damaged.
    """
    if images is not None and classes is not None:
        if 0 in images[:2] or classes[0] == 0 or sum(classes) > MOST_CLASSES:
            raise PlanError(
                "--images and --classes: there are labelled and unlabelled images, one old class or more, and at most "
                f"{MOST_CLASSES:,} classes"
            )
        return Counts(*images, classes[0], sum(classes), "as told")
    root = config.data.root
    if is_url(root) or Path(root, "manifest.json").exists():
        found = build_store(config).manifest
        classes_of = found.num_old + num_new_classes(config, found)
        sizes = (found.samples("labelled"), found.samples("unlabelled"), found.samples("test"))
        size = sum(shard.bytes for shard in {shard.file: shard for shard in found.shards}.values())
        return Counts(*sizes, found.num_old, classes_of, f"{root}/manifest.json", size)
    name = Path(root).name
    if name not in PUBLISHED:
        raise PlanError(
            f"{root} is not here, and no paper's dataset is called {name}: make its shards, or say how many images and "
            "classes it has: --images LABELLED,UNLABELLED,TEST --classes OLD,NEW"
        )
    return Counts(*PUBLISHED[name], f"SimGCD's table 1; {root} is not here")
