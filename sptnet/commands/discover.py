"""From two folders of images to a page of what was discovered.

LABELLED has a folder of images for each class that you know, UNLABELLED all other images, in folders of any depth. Runs
what stands alone too, one after the other, and prints the line that runs it: sptnet-shards discover, sptnet features,
estimate-k (unless --new says it), train (SimGCD, then what --then says), predict, report --html. What is there is
skipped: killed at any point, the same command goes on, and Ctrl-C leaves a checkpoint. Before it trains it says what it
will do and about how long that takes here; --hours says how long it may. At the end it names the page, the sizes of the
categories, and what looks wrong. On several GPUs, or with --processes on a CPU, it launches itself through accelerate.
"""

import argparse
from functools import partial
from pathlib import Path

from sptnet.arguments import BACKBONE, MOST_WORKERS, positive
from sptnet.data.format.files import local

HOURS = 8.0  # a night


def hours(text: str) -> float:
    """An argument that is a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 24 * 365:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours")
    return value


def folder(text: str) -> Path:
    """A path that other commands do not take for an option: `./-x` is `-x` to pathlib."""
    path = local(text)
    return path.absolute() if str(path).startswith("-") else path


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "labelled", type=folder, metavar="LABELLED", help="a folder of images for each class that you know"
    )
    command.add_argument("unlabelled", type=folder, metavar="UNLABELLED", help="the images to be sorted, at any depth")
    command.add_argument("out", type=folder, metavar="OUT", help="folder of all results")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="of both trainings, e.g. seed=1")
    command.add_argument(
        "--new", type=positive, metavar="N", help="how many new classes there are (default: estimated)"
    )
    command.add_argument("--test", type=folder, metavar="FOLDER", help="class folders to measure on, if you have some")
    command.add_argument(
        "--backbone",
        default=BACKBONE,
        metavar="NAME",
        help="name of a timm ViT: `sptnet backbones` lists them (default: %(default)s)",
    )
    command.add_argument(
        "--weights", default="timm", help="its weights: timm (from its hub), none, or a file (default: %(default)s)"
    )
    command.add_argument(
        "--then", choices=("continued", "sptnet"), default="continued",
        help="what trains behind SimGCD: sptnet, or continued, SimGCD on fresh views (default: %(default)s, which had "
        "more right in docs/results.md)",
    )  # fmt: skip
    command.add_argument(
        "--hours",
        type=hours,
        default=HOURS,
        metavar="H",
        help="what it plans for, from now on; nothing is stopped when they are over (default: %(default)g)",
    )
    command.add_argument(
        "--processes", type=partial(positive, most=MOST_WORKERS), metavar="P",
        help="that share the work (default: one per GPU, or one)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Go the way, from where it was left."""
    from sptnet.discover.journey import discover
    from sptnet.discover.request import Request

    request = Request(
        arguments.labelled, arguments.unlabelled, arguments.out, arguments.new, arguments.test, arguments.backbone,
        arguments.weights, tuple(arguments.overrides), arguments.then,
    )  # fmt: skip
    discover(request, arguments.hours, arguments.processes)
    return 0
