"""The points that clustering looks at: features of a dataset, projected once, in memory maps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from sptnet.data.features import FeatureFolder, Split
from sptnet.data.format.manifest import Kind, Manifest
from sptnet.errors import SptnetError
from sptnet.method.kmeans import Ids, Matrix
from sptnet.method.metrics import MAX_CLUSTERS
from sptnet.method.whitening import Projection, fit_pca
from sptnet.run.parts import writing_parts

IMAGES_PER_DIMENSION = 8  # whitened by fewer, all points are nearly as far from each other


class ClusteringError(SptnetError, ValueError):
    """A clustering that this dataset does not allow."""


def check_classes(manifest: Manifest, num_classes: int, labelled: Ids) -> None:
    """Raise ClusteringError for too many classes, too few, or an old one without a sample in `labelled` [n]."""
    if num_classes > MAX_CLUSTERS:
        raise ClusteringError(
            f"{num_classes} classes are more than the {MAX_CLUSTERS} that can be matched: ask for fewer"
        )
    if num_classes < manifest.num_old:
        raise ClusteringError(
            f"{num_classes} classes, but {manifest.name} has {manifest.num_old} old ones: ask for more"
        )
    if lacking := sorted(set(range(manifest.num_old)) - set(np.unique(labelled).tolist())):
        raise ClusteringError(f"{manifest.name} has no labelled sample of {manifest.classes[lacking[0]]}, an old class")


def whitened_dimensions(asked: int, images: int) -> int:
    """How many of the asked dimensions so many images may be whitened to."""
    return min(asked, max(2, images // IMAGES_PER_DIMENSION))


@contextmanager
def projected(
    features: FeatureFolder, kinds: tuple[Kind, ...], folder: Path, dimensions: int | None, whiten: bool
) -> Iterator[Mapping[Kind, Matrix]]:
    """Points [N, d] float32 of unit length of every kind that has samples, in files that are gone afterwards.

    Args:
        folder: where the files are for as long as they are needed: 4 bytes times N times d.
        dimensions: of a PCA of all training features; None: features as they are, of unit length.
        whiten: scale the dimensions to variance 1.

    Raises:
        FeaturesError, PartsError: features that cannot be read, a folder that cannot be written.
        ClusteringError: features that are all the same.
    """
    splits = {kind: features.split(kind) for kind in kinds}
    projection = Projection()
    if dimensions is not None:
        training = chain(*(splits[kind].blocks() for kind in ("labelled", "unlabelled") if kind in splits))
        projection = fit_pca(training, dimensions, whiten)
        if not all(projection.width(split.width) for split in splits.values()):
            raise ClusteringError("all features are the same: there is nothing to cluster")
    with writing_parts(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield {kind: _project(split, projection, folder) for kind, split in splits.items() if split}


def _project(split: Split, projection: Projection, folder: Path) -> Matrix:
    """In a file without a name, which is gone with the map, however the process ends.

    Written by `write`, not through the map: a full disk would end the process with SIGBUS.
    """
    shape = (len(split), projection.width(split.width))
    with TemporaryFile(dir=folder) as file:
        for block in split.blocks():
            file.write(projection(block).tobytes())
        file.flush()
        return np.memmap(file, np.float32, "r", shape=shape)
