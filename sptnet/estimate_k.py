"""How many classes a dataset has: an estimate from class tokens, kept with its curve and a picture of it.

OUT/estimate_k.json   median, interval, the curve, every repeat, and of what
OUT/estimate_k.svg    the curve and the interval
"""

import json
from math import log
from pathlib import Path

from sptnet.data.features import FeatureFolder
from sptnet.data.format.files import write_whole
from sptnet.data.format.manifest import KINDS
from sptnet.features import open_dataset
from sptnet.method.class_count import Estimate, Method, default_largest, estimate_by_brent, estimate_by_tree
from sptnet.points import ClusteringError, check_classes, projected, whitened_dimensions
from sptnet.run.parts import writing_parts

RESULT, PICTURE = "estimate_k.json", "estimate_k.svg"
DIMENSIONS = 128  # of the whitened class tokens, at most


def estimate_classes(
    data: str, features: Path, out: Path, method: Method = "tree", max_classes: int | None = None, seed: int = 0
) -> Estimate:
    """Estimate how many classes there are, old ones included, and write it to `out`.

    Args:
        data: the dataset's folder or URL; of its targets only those of labelled images are looked at.
        features: made by `sptnet features`.
        max_classes: the largest number that is tried; by default 4 for every old class, 1,000 at least, and by `tree`
            more where the answer would be cut off there.

    Raises:
        DatasetError, FeaturesError: no dataset, or no features of it.
        ClusteringError: fewer classes than old ones, or an old class without a labelled image.
        PartsError: `out` cannot be written.
    """
    manifest = open_dataset(data).manifest
    for kind in KINDS[:2]:
        if not manifest.samples(kind):
            raise ClusteringError(f"{manifest.name} has no {kind} image: labelled and unlabelled ones are needed")
    if manifest.num_old < 3:
        raise ClusteringError(f"{manifest.name} has {manifest.num_old} old classes: at least 3 are needed to compare")
    folder = FeatureFolder(features, manifest)
    targets = folder.split("labelled").targets
    check_classes(manifest, max_classes or default_largest(manifest.num_old), targets)
    images = manifest.samples("labelled") + manifest.samples("unlabelled")
    dimensions = whitened_dimensions(DIMENSIONS, images)
    way = estimate_by_tree if method == "tree" else estimate_by_brent
    with projected(folder, KINDS[:2], out, dimensions, whiten=True) as points:
        estimate = way(points["labelled"], targets, points["unlabelled"], manifest.num_old, max_classes, seed)
    result = {
        "method": method, "dataset": manifest.digest(), "features": folder.fingerprint, "num_old": manifest.num_old,
        "seed": seed, **estimate._asdict(), "num_new": estimate.median - manifest.num_old,
    }  # fmt: skip
    with writing_parts(out):
        write_whole(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
        write_whole(out / PICTURE, picture(estimate).encode())
    return estimate


def picture(estimate: Estimate) -> str:
    """The accuracy on labelled images over log K, with the interval and the median, as SVG."""
    width, height, margin = 640, 360, 48
    first, last = log(estimate.numbers[0]), log(max(estimate.numbers[-1], estimate.numbers[0] + 1))

    def x(number: float) -> float:
        return margin + (width - 2 * margin) * (log(number) - first) / (last - first)

    def y(accuracy: float) -> float:
        return height - margin - (height - 2 * margin) * accuracy

    curve = " ".join(f"{x(k):.1f},{y(a):.1f}" for k, a in zip(estimate.numbers, estimate.accuracy, strict=True))
    ticks = sorted({estimate.numbers[0], estimate.low, estimate.median, estimate.high, estimate.numbers[-1]})
    told = "".join(f'<text x="{x(k):.1f}" y="{height - margin + 16}" text-anchor="middle">{k}</text>' for k in ticks)
    told += "".join(f'<text x="{margin - 6}" y="{y(a):.1f}" text-anchor="end">{a:.1f}</text>' for a in (0.0, 0.5, 1.0))
    left, right, middle, top, bottom = x(estimate.low), x(estimate.high), x(estimate.median), y(1), y(0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="#dde6f2"/>'
        f'<path d="M{middle:.1f} {top:.1f}V{bottom:.1f}" stroke="#c03028"/>'
        f'<path d="M{margin} {top:.1f}V{bottom:.1f}H{width - margin}" fill="none" stroke="black"/>'
        f'<polyline points="{curve}" fill="none" stroke="#204a87" stroke-width="1.5"/>{told}'
        f'<text x="{width / 2:.0f}" y="{height - 8}" text-anchor="middle">clusters K (log); shaded: {estimate.low} to '
        f"{estimate.high} classes, median {estimate.median}</text>"
        f'<text x="{margin}" y="20">clustering accuracy on labelled images</text></svg>\n'
    )
