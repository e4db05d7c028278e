"""How near `sptnet estimate-k` comes, over choices of old classes, and what it takes on many points.

python benchmarks/estimate_k.py --data data/grocery --features FOLDER    # made by sptnet features, targets known
python benchmarks/estimate_k.py --points 1000000                         # synthetic, 128 dimensions, 1,000 classes
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from kmeans import synthetic
from rich.console import Console
from rich.table import Table

from sptnet.data.features import FeatureFolder
from sptnet.data.format.manifest import read_manifest
from sptnet.method.class_count import estimate_by_brent, estimate_by_tree
from sptnet.method.whitening import fit_pca

WAYS = {"tree": estimate_by_tree, "brent": estimate_by_brent}


def measure(data: Path, features: Path, ways: list[str], choices: int) -> None:
    """Half of the classes old, drawn anew for every choice, half of their training images labelled."""
    folder = FeatureFolder(features, read_manifest(data))
    splits = [folder.split("labelled"), folder.split("unlabelled")]
    tokens = np.concatenate([block for split in splits for block in split.blocks()])
    points = fit_pca([tokens], 128, whiten=True)(tokens)
    truth = np.concatenate([split.targets for split in splits])
    classes = int(truth.max()) + 1
    table = Table("way", "choice", "estimate", "interval", "truth", "error", "truth inside", "s")
    for way in ways:
        errors, inside = [], 0
        for choice in range(choices):
            draws = np.random.default_rng(choice)
            targets = draws.permutation(classes)[truth]
            labelled = np.zeros(len(targets), bool)
            for old in range((classes + 1) // 2):
                of = np.flatnonzero(targets == old)
                labelled[draws.choice(of, max(1, len(of) // 2), replace=False)] = True
            start = time.perf_counter()
            found = WAYS[way](points[labelled], targets[labelled], points[~labelled], (classes + 1) // 2, 700)
            seconds = time.perf_counter() - start
            errors.append(abs(found.median / classes - 1))
            inside += found.low <= classes <= found.high
            table.add_row(
                way, str(choice), str(found.median), f"{found.low} to {found.high}", str(classes), f"{errors[-1]:.1%}",
                str(found.low <= classes <= found.high), f"{seconds:.1f}",
            )  # fmt: skip
        table.add_row(way, "all", "", "", "", f"median {statistics.median(errors):.1%}", f"{inside} of {choices}", "")
    Console(width=100).print(table)


def scale(number: int, classes: int = 1000, width: int = 128) -> None:
    """Half of the classes old, half of their points labelled."""
    with tempfile.TemporaryDirectory() as folder:
        points, targets = synthetic(Path(folder, "p"), number, width, classes)
        labelled = np.flatnonzero(targets[: number // 2] < classes // 2)
        rest = np.delete(np.arange(number), labelled)
        given = np.asarray(points[labelled]), targets[labelled], np.asarray(points[rest])
        start = time.perf_counter()
        found = estimate_by_tree(*given, classes // 2, 4 * classes)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"{number:,} x {width}: {found.median} classes, {found.low} to {found.high}, of {classes}")
        print(f"{seconds:.0f} s, {peak:.2f} GB resident at most")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path)
    options.add_argument("--features", type=Path)
    options.add_argument("--ways", nargs="+", choices=list(WAYS), default=["tree"])
    options.add_argument("--choices", type=int, default=5)
    options.add_argument("--points", type=int)
    arguments = options.parse_args()
    if arguments.points:
        scale(arguments.points)
    if arguments.features:
        measure(arguments.data, arguments.features, arguments.ways, arguments.choices)


if __name__ == "__main__":
    main()
