"""Time and memory of semi-supervised k-means on synthetic features.

python benchmarks/kmeans.py --points 1000000 --width 768

Unit-length points around K random centres, half of the classes old, half of their points labelled, in a memory map.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from sptnet.method.kmeans import assign, semi_supervised_kmeans
from sptnet.method.metrics import clustering_accuracy

BLOCK = 8192


def synthetic(path: Path, points: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, D] in a map, and their classes [N]: noise as long as a class's centre."""
    draws = np.random.default_rng(seed)
    centres = draws.standard_normal((classes, width), np.float32)
    targets = draws.integers(0, classes, points)
    with open(path, "wb") as file:
        for begin in range(0, points, BLOCK):
            of = targets[begin : begin + BLOCK]
            block = centres[of] + draws.standard_normal((len(of), width), np.float32)
            file.write((block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float32).tobytes())
    return np.memmap(path, np.float32, "r", shape=(points, width)), targets


def copied(points: np.ndarray, rows: np.ndarray, path: Path) -> np.ndarray:
    """Some rows, in a file of their own, mapped."""
    found = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), points.shape[1]))
    for begin in range(0, len(rows), BLOCK):
        found[begin : begin + BLOCK] = points[rows[begin : begin + BLOCK]]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--points", type=int, default=1_000_000)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--classes", type=int, default=1000)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        points, targets = synthetic(Path(folder, "p"), arguments.points, arguments.width, arguments.classes)
        num_old = arguments.classes // 2
        of_labelled = np.flatnonzero(targets[: arguments.points // 2] < num_old)
        of_rest = np.delete(np.arange(arguments.points), of_labelled)
        labelled, rest = (
            copied(points, rows, Path(folder, name)) for name, rows in (("l.npy", of_labelled), ("u.npy", of_rest))
        )
        start = time.perf_counter()

        def told(number: int, inertia: float) -> None:
            print(f"{time.perf_counter() - start:7.1f} s  pass {number + 1}  {inertia:.6g}", flush=True)

        centres = semi_supervised_kmeans(
            labelled, targets[of_labelled], rest, num_old, arguments.classes, told=told
        )  # fmt: skip
        clusters = assign(rest, centres, sums=False).clusters
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        accuracy = clustering_accuracy(targets[of_rest], clusters, num_old).all
        print(f"{arguments.points:,} x {arguments.width}, K = {arguments.classes}: {seconds:.0f} s, accuracy "
              f"{accuracy:.3f}, {peak:.2f} GB resident at most, mapped pages of the points among it")  # fmt: skip


if __name__ == "__main__":
    main()
