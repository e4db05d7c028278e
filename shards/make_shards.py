#!/usr/bin/env python3
"""Turn a dataset of images into WebDataset shards that sptnet reads."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from shards import digits, imagefolder
from shards.source import Source, SourceError
from shards.writer import Planned, convert
from sptnet.data.manifest import KINDS


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="make_shards.py", description=__doc__)
    sources = top.add_subparsers(dest="source", required=True)
    command = sources.add_parser(
        "digits", help="scikit-learn's handwritten digits, no download", description=digits.__doc__
    )
    command.add_argument("out", type=Path, help="folder to write")
    command = sources.add_parser("imagefolder", help="your own images", description=imagefolder.__doc__)
    command.add_argument("root", type=Path, help="folder of class folders, or of train/ and test/ with class folders")
    command.add_argument("out", type=Path, help="folder to write")
    command.add_argument("--old", type=int, required=True, help="how many classes, the first by name, are old")
    command.add_argument("--name", help="name of the dataset (default: that of the folder)")
    for command in sources.choices.values():
        command.add_argument(
            "--labelled-fraction",
            type=float,
            default=0.5,
            help="share of the training images of old classes that are labelled (default: %(default)s)",
        )
        command.add_argument(
            "--seed", type=int, default=0, help="of that choice and of the dealing to shards (default: %(default)s)"
        )
    return top


def source_of(arguments: argparse.Namespace) -> Source:
    if arguments.source == "digits":
        return digits.source()
    return imagefolder.source(arguments.root, arguments.old, arguments.name)


def with_progress(planned: list[Planned]) -> Iterator[Planned]:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("writing shards", total=sum(len(shard.samples) for shard in planned))
        for shard in planned:
            yield shard
            progress.advance(task, len(shard.samples))


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; what is wrong with the source is one line on stderr."""
    arguments = parser().parse_args(argv)
    try:
        manifest = convert(
            source_of(arguments), arguments.out, arguments.labelled_fraction, arguments.seed, with_progress
        )
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{manifest.samples(kind)} {kind}" for kind in KINDS)
    print(f"{arguments.out}: {manifest.name}, {counts}; {manifest.num_old} old classes of {len(manifest.classes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
