"""Estimate how many classes a dataset has.

From the class tokens of --features, or of the run or backbone that is named, which are then made and kept in
OUT/features. Prints a median and an interval, and the line for the configuration; writes estimate_k.json and .svg.
"""

import argparse
from pathlib import Path

from sptnet.arguments import add_encoder, encoder_of, named, path, positive, seed
from sptnet.data.format.files import local


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", metavar="DATA", type=named, help="a folder of shards, or its URL")
    command.add_argument("--features", type=path, metavar="FOLDER", help="made by sptnet features")
    add_encoder(command)
    command.add_argument("--method", choices=["tree", "brent"], default="tree", help="(default: %(default)s)")
    command.add_argument(
        "--max-classes",
        type=positive,
        metavar="N",
        help="the largest that is tried (default: 4 for each old class, at least 1000; tree goes beyond where need be)",
    )
    command.add_argument(
        "--out", type=local, default=Path("estimate_k"), metavar="FOLDER", help="(default: %(default)s)"
    )
    command.add_argument("--seed", type=seed, default=0, help="of what is drawn (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Estimate, and print what to write into the configuration."""
    from sptnet.estimate_k import PICTURE, RESULT, estimate_classes
    from sptnet.features import make_features, open_dataset
    from sptnet.strategy.collectives import barrier, rank

    out, features = arguments.out, arguments.features
    if features is None:
        features = out / "features"
        make_features(arguments.data, features, encoder_of(arguments), arguments.dtype, arguments.workers)
        barrier()
        if rank() != 0:
            return 0  # the tokens were everybody's work, the estimate is one process's
    found = estimate_classes(
        arguments.data, features, out, arguments.method, arguments.max_classes, arguments.seed
    )  # fmt: skip
    num_old = open_dataset(arguments.data).manifest.num_old
    print(
        f"{found.median} classes, between {found.low} and {found.high}: {num_old} old ones and, for the configuration,"
    )
    print(f"model: {{num_new: {max(1, found.median - num_old)}}}")
    if found.median <= num_old:
        print("It found no class beyond the old ones; a configuration looks for at least one.")
    if found.cut_off:
        more = arguments.method == "brent" or found.numbers[-1] == arguments.max_classes
        told = "say a larger --max-classes" if more else "more are not told apart"
        print(f"No more than {found.numbers[-1]} were tried, and there may be more: {told}.")
    print(f"{out / RESULT} has the curve, {out / PICTURE} a picture of it")
    return 0
