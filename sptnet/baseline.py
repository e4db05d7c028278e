"""The baseline that needs no network: semi-supervised k-means on pixels, evaluated as a run is."""

from pathlib import Path
from typing import Any

import numpy as np

from sptnet.data.loader import pixels
from sptnet.data.store import LocalStore
from sptnet.evaluate import PROTOCOLS, Predictions, save_evaluation, score
from sptnet.method.kmeans import semi_supervised_kmeans, squared_distances


def kmeans_on_pixels(root: Path, folder: Path, image_size: int) -> dict[str, Any]:
    """Fit on the training pixels, score both protocols, write metrics.json and predictions.npz into `folder`.

    For small datasets: the pixels of a split are held in memory.

    Raises:
        DatasetError: no dataset at `root`.
        RunError: `folder` cannot be written.
    """
    store = LocalStore(root)
    manifest = store.manifest
    labelled, targets, _ = pixels(store, "labelled", "affine", image_size)
    splits = {kind: pixels(store, kind, "affine", image_size) for kind in PROTOCOLS if manifest.samples(kind)}
    centres = semi_supervised_kmeans(
        labelled, targets, splits["unlabelled"][0], manifest.num_old, len(manifest.classes)
    )
    results: dict[str, Any] = {}
    kept: dict[str, Predictions] = {}
    for kind, (points, truth, uids) in splits.items():
        order = np.argsort(uids)
        kept[kind] = Predictions(uids[order], truth[order], squared_distances(points, centres).argmin(1)[order])
        results[kind] = score(kept[kind], manifest.num_old, len(manifest.classes))
    save_evaluation(folder, "k-means on pixels", results, kept)
    return results
