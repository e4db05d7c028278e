"""The baselines that train nothing: semi-supervised k-means on pixels or on class tokens, evaluated as a run is."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sptnet.data.features import FeatureFolder
from sptnet.data.format.manifest import KINDS, MANIFEST, Kind, Manifest
from sptnet.data.loader import pixels
from sptnet.data.storage.store import LocalStore
from sptnet.evaluate import PROTOCOLS, save_evaluation, score
from sptnet.exact_counts import WINDOW, Counts, Predictions, windows_of
from sptnet.features import open_dataset
from sptnet.method.kmeans import Ids, Matrix, assign, semi_supervised_kmeans
from sptnet.points import ClusteringError, check_classes, projected, whitened_dimensions
from sptnet.run.folder import CONFIG, METRICS, RunError
from sptnet.run.predictions import PredictionParts
from sptnet.run.tables import read_metrics


class Samples(NamedTuple):
    """points: [N, D]; targets, uids: [N]."""

    points: Matrix
    targets: Ids
    uids: Ids


def check_not_trained(folder: Path) -> None:
    """Raise RunError if a folder is a trained run's, or a dataset's, or has metrics that these would overwrite."""
    if (folder / MANIFEST).exists():
        raise RunError(f"{folder} is the folder of a dataset: choose another folder")
    if (folder / METRICS).exists() and not _is_baseline(folder):
        raise RunError(f"{folder} holds a {METRICS} that is not of k-means, and stays: choose another folder")
    if (folder / CONFIG).exists():
        raise RunError(f"{folder} is the folder of a training run, whose metrics.json stays: choose another folder")


def _is_baseline(folder: Path) -> bool:
    try:
        return str(read_metrics(folder)["method"]).startswith("k-means")
    except RunError:
        return False


def kmeans_on_pixels(root: Path, folder: Path, image_size: int, num_classes: int | None = None) -> dict[str, Any]:
    """Fit on the training pixels, score both protocols, write metrics.json and predictions.npz into `folder`.

    For small datasets: the pixels of a split are held in memory.

    Raises:
        DatasetError: no dataset at `root`.
        ClusteringError: fewer classes than old ones.
        RunError: `folder` cannot be written, or is a training run's.
    """
    check_not_trained(folder)
    store = LocalStore(root)
    splits = {k: Samples(*pixels(store, k, "affine", image_size)) for k in KINDS if store.manifest.samples(k)}
    return _fit_and_score(store.manifest, folder, "k-means on pixels", splits, num_classes)


def kmeans_on_features(
    data: str,
    folder: Path,
    features: Path,
    num_classes: int | None = None,
    dimensions: int | None = None,
    whiten: bool = False,
    told: Callable[[int, float], None] = lambda number, inertia: None,
) -> dict[str, Any]:
    """The same on class tokens of unit length, as GCD has it, in memory that does not grow with their width.

    Args:
        data: the dataset's folder or URL.
        features: made by `sptnet features`.
        num_classes: K; the manifest's by default.
        dimensions, whiten: of a PCA in front, or None; whitened to fewer where there are few images.
        told: called after every pass over all of many points with its number and the sum of squared distances.

    Raises:
        DatasetError, FeaturesError: no dataset, or no features of it.
        ClusteringError, RunError, PartsError: as for pixels; a full disk.
    """
    check_not_trained(folder)
    manifest = open_dataset(data).manifest
    kinds = tuple(kind for kind in KINDS if manifest.samples(kind))
    folder_of = FeatureFolder(features, manifest)
    if whiten and dimensions is not None:
        images, asked = manifest.samples("labelled") + manifest.samples("unlabelled"), dimensions
        if (dimensions := whitened_dimensions(asked, images)) < asked:
            print(f"whitened to {dimensions} dimensions, not {asked}: of {images} images", file=sys.stderr, flush=True)
    method = f"k-means on {'PCA of ' if dimensions else ''}class tokens"
    with projected(folder_of, kinds, folder, dimensions, whiten) as points:
        of = {kind: folder_of.split(kind) for kind in kinds}
        splits = {kind: Samples(points[kind], of[kind].targets, of[kind].uids) for kind in kinds}
        return _fit_and_score(manifest, folder, method, splits, num_classes, told)


def _fit_and_score(
    manifest: Manifest,
    folder: Path,
    method: str,
    splits: Mapping[Kind, Samples],
    num_classes: int | None,
    told: Callable[[int, float], None] = lambda number, inertia: None,
) -> dict[str, Any]:
    new = manifest.new_classes()
    if num_classes is None and new is None:
        raise ClusteringError(f"nobody has said how many classes {manifest.name} has: give --num-classes K")
    number = num_classes or manifest.num_old + (new or 0)
    for kind in ("labelled", "unlabelled"):
        if kind not in splits:
            raise ClusteringError(f"{manifest.name} has no {kind} image: k-means needs labelled and unlabelled ones")
    labelled = splits["labelled"]
    check_classes(manifest, number, labelled.targets)
    centres = semi_supervised_kmeans(
        labelled.points, labelled.targets, splits["unlabelled"].points, manifest.num_old, number, told=told
    )
    results: dict[str, Any] = {}
    kept = PredictionParts()
    for kind in PROTOCOLS:
        if kind in splits:
            points, targets, uids = splits[kind]
            order = np.argsort(uids)
            if (repeated := uids[order][1:][np.diff(uids[order]) == 0]).size:
                raise ClusteringError(f"{manifest.name} has a {kind} sample twice (uid {repeated[0]}): verify it")
            clusters = assign(points, centres, sums=False).clusters
            found = Predictions(uids[order], targets[order], clusters[order])
            for window in range(windows_of(len(found.uid))):
                part = slice(window * WINDOW, (window + 1) * WINDOW)
                kept.add(kind, window, Predictions(found.uid[part], found.target[part], found.prediction[part]))
            counts = Counts.of(found, max(len(centres), len(manifest.classes)))
            results[kind] = score(counts, manifest.num_old, len(centres))
    save_evaluation(folder, method, manifest, results, kept)
    return results
