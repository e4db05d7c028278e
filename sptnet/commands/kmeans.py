"""Semi-supervised k-means on class tokens or pixels, the baseline.

Clusters as GCD does it: labelled images stay in the cluster of their class. With --features on what `sptnet features`
made, however much that is; without, on the pixels of a small dataset.
"""

import argparse
import sys
from pathlib import Path

from sptnet.arguments import ArgumentsError, named, path, pixels, positive
from sptnet.data.format.files import local

PIXELS = 24  # an edge that keeps k-means on pixels quick


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", metavar="DATA", type=named, help="a folder of shards")
    command.add_argument("run_folder", metavar="RUN", type=local, help="folder of the results")
    command.add_argument("--image-size", type=pixels, help=f"pixels: their edge (default: {PIXELS})")
    command.add_argument("--features", type=path, metavar="FOLDER", help="made by sptnet features")
    command.add_argument("--pca", type=positive, metavar="N", help="features: to so many dimensions first, e.g. 128")
    command.add_argument(
        "--whiten",
        action="store_true",
        help="features: with --pca, scale every dimension to variance 1; at most one dimension for every 8 images",
    )
    command.add_argument(
        "--num-classes",
        type=positive,
        metavar="K",
        help="old and new together (default: as the dataset says; needed where nobody knows)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Cluster, score, write the results and print them."""
    from sptnet.baseline import kmeans_on_features, kmeans_on_pixels

    folder, number = arguments.run_folder, arguments.num_classes
    if arguments.features is None:
        if arguments.pca is not None or arguments.whiten:
            raise ArgumentsError("--pca and --whiten are for --features")
        kmeans_on_pixels(Path(arguments.data), folder, arguments.image_size or PIXELS, number)
    elif arguments.image_size is not None:
        raise ArgumentsError("--image-size is for pixels, not for --features, which were made at their own")
    elif arguments.whiten and arguments.pca is None:
        raise ArgumentsError("--whiten needs --pca N, e.g. 128")
    else:
        kmeans_on_features(arguments.data, folder, arguments.features, number, arguments.pca, arguments.whiten, _told)
    from sptnet.run.tables import print_table, table_of_runs

    print_table(table_of_runs([folder]))
    return 0


def _told(number: int, inertia: float) -> None:
    print(f"pass {number + 1}: sum of squared distances {inertia:.6g}", file=sys.stderr, flush=True)
