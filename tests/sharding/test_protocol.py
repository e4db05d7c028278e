"""Which classes are old, which images are labelled: against digests computed with numpy's documented calls."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from sptnet_shards.items import Item
from sptnet_shards.protocol import class_split, deviation, labelled_positions
from sptnet_shards.source import Source, SourceError
from sptnet_shards.sources.imagenet import chosen_classes

REFERENCE = Path(__file__).parents[1] / "reference" / "labelled_subsets.json"
SUBSETS = json.loads(REFERENCE.read_text())
SPLITS = {
    "cub": "e85d4cddd27c98e22b3f5b09a0b335ba3104f547e8adc9c37a8a71677527bd34",
    "scars": "e90a9fbd982f839973fddc666e6fbb6cd4dea441c722d7a45acf3ffe5ac8d47e",
    "aircraft": "4f0d320a97783243c8790cfc8058d3cbf4c637e21e63e4444481b9a93d229b0a",
    "herbarium_19": "d4d83286ff87c7b0aba43a3776b7ffe2dde3404b2631a827f3be2f16cad879ea",
}


def source_of(count: int, new: int = 3) -> Source:
    """`count` images of the one old class, interleaved with some of the new one."""
    train = [Item("old", str(i), 1) for i in range(count)]
    train[2:2] = [Item("new", "x", 1)] * new
    return Source("made", ["old", "new"], 1, train, [], lambda where: b"")


@pytest.mark.parametrize("case", [name for name in SUBSETS if ":" in name])
def test_labelled_images_are_those_of_the_protocol(case):
    count, fraction = int(case.split(":")[0]), float(case.split(":")[1])
    labelled = set(labelled_positions(source_of(count), fraction, seed=0).tolist())
    assert not labelled & {2, 3, 4}
    # positions among the old class's images
    chosen = np.array(sorted(p if p < 2 else p - 3 for p in labelled), "<i8")
    assert len(chosen) == SUBSETS[case]["count"]
    assert chosen[:5].tolist() == SUBSETS[case]["first"]
    assert hashlib.sha256(chosen.tobytes()).hexdigest() == SUBSETS[case]["sha256"]


def test_imagenet_100_is_the_published_choice():
    assert chosen_classes() == SUBSETS["imagenet100_classes"]


@pytest.mark.parametrize(("name", "old", "new"), [("cub", 100, 100), ("scars", 98, 98), ("aircraft", 50, 50),
                                                  ("herbarium_19", 341, 342)])  # fmt: skip
def test_class_splits_cover_every_class_once(name, old, new):
    """In the order of the targets; digests of lists that were compared with the published ones, tests/reference."""
    split = class_split(name)
    assert (len(split[0]), len(split[1])) == (old, new)
    assert sorted(split[0] + split[1]) == list(range(old + new))
    assert hashlib.sha256(json.dumps(split).encode()).hexdigest() == SPLITS[name]


def test_fractions_that_leave_nothing_are_refused():
    assert len(labelled_positions(source_of(10), 1.0, 0)) == 10
    with pytest.raises(SourceError, match="labels 0 of 13"):
        labelled_positions(source_of(10), 0.05, 0)
    with pytest.raises(SourceError, match="labels 10 of 10"):
        labelled_positions(source_of(10, new=0), 1.0, 0)


def test_counts_that_are_not_the_published_ones_are_told():
    assert deviation("imagenet1k", 320_577, 960_590, 0.5) is None
    assert deviation("cub", 1498, 4496, 0.5) is None
    assert deviation("mine", 3, 4, 0.5) is None
    assert deviation("cub", 1498, 4496, 0.8) is None
    told = deviation("cub", 1498, 2000, 0.5)
    assert "2,000 unlabelled" in told
    assert "1.5k and 4.5k" in told
