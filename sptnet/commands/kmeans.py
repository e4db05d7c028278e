"""Semi-supervised k-means on pixels, a baseline for small datasets.

Clusters the pixels of a small dataset, the centres of old classes begun from labelled images.
"""

import argparse
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", type=Path, help="a folder of shards")
    command.add_argument("run_folder", metavar="RUN", type=Path, help="folder of the results")
    command.add_argument("--image-size", type=int, default=24, help="pixels (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Cluster, score, and write the results."""
    from sptnet.baseline import kmeans_on_pixels

    kmeans_on_pixels(arguments.data, arguments.run_folder, arguments.image_size)
    return 0
