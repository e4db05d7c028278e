"""The command line of make_shards.py: what its commands take, checked by type and range."""

import argparse
import os
from pathlib import Path

from sptnet_shards.names import CONTACT_SHEET, SUFFIX
from sptnet_shards.published import FORCED, PARTS
from sptnet_shards.share import share as task_share
from sptnet_shards.source import SourceCommand
from sptnet_shards.sources import (
    aircraft,
    cifar,
    csv_list,
    cub,
    digits,
    discover,
    herbarium_19,
    imagefolder,
    imagenet,
    scars,
)
from sptnet_shards.sources.discover import add_new
from sptnet_shards.whole_numbers import positive, whole

from sptnet.data.format.files import is_url, local

LARGEST_SIDE = 8192  # pixels of --resize

SOURCES: list[SourceCommand] = [
    command
    for source in (cifar, imagenet, cub, scars, aircraft, herbarium_19, imagefolder, csv_list, discover, digits)
    for command in source.COMMANDS
]


def cores() -> int:
    """Cores that this process may use, which a scheduler may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def seed(text: str) -> int:
    """An argument that NumPy takes for a seed."""
    if whole(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is above {2**32 - 1}")
    return int(text)


def side(text: str) -> int:
    """An argument that is a number of pixels."""
    if positive(text) > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text} is above {LARGEST_SIDE}")
    return int(text)


def quality(text: str) -> int:
    """An argument from 1 to 100."""
    if positive(text) > 100:
        raise argparse.ArgumentTypeError(f"{text} is above 100")
    return int(text)


def share(text: str) -> float:
    """An argument above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return value


def folder_or_url(text: str) -> Path | str:
    """An argument that is a folder here or one behind a URL."""
    return text if is_url(text) else Path(text)


def _add_protocol(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--labelled-fraction",
        type=share,
        default=0.5,
        help="share of the training images of old classes that are labelled, where the source does not say which "
        "(default: %(default)s, the protocol's)",
    )
    command.add_argument(
        "--seed", type=seed, default=0, help="of that choice and of the dealing to shards (default: %(default)s)"
    )


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=local, help="folder to write")
    _add_protocol(command)
    command.add_argument(
        "--workers", type=positive, default=cores(), help="processes (default: one per core that may be used)"
    )
    command.add_argument(
        "--shard-mb", type=positive, default=256, help="about how large a shard becomes (default: %(default)s MB)"
    )
    kept = command.add_mutually_exclusive_group()
    kept.add_argument(
        "--keep", action="store_true", help="copy the image bytes untouched, BMP, GIF and TIFF as PNG (the default)"
    )
    kept.add_argument("--resize", type=side, metavar="PIXELS", help="store images with this short side (bicubic)")
    command.add_argument("--format", choices=list(SUFFIX), help="of --resize (default: jpeg)")
    command.add_argument("--quality", type=quality, help="of --resize, for JPEG and WebP (default: 95)")
    command.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="an image that cannot be read or does not decode stops the conversion, or is left out and listed in the "
        "manifest",
    )
    _add_tasks(
        command,
        "write a share of the shards: task I of N, from 0/N to N-1/N, on any machines that see source and output",
        "write the manifest when all tasks are done, or say which shards are missing",
    )


def _add_tasks(command: argparse.ArgumentParser, share: str, finish: str) -> None:
    """--task and --finish, which exclude each other."""
    tasks = command.add_mutually_exclusive_group()
    tasks.add_argument("--task", type=task_share, metavar="I/N", help=f"{share}; auto: a Slurm array's")
    tasks.add_argument("--finish", action="store_true", help=finish)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of all commands; `description`: of the program."""
    top = argparse.ArgumentParser(description=description)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for source in SOURCES:
        command = commands.add_parser(source.name, help=source.help, description=source.description)
        source.add_arguments(command)
        _add_conversion(command)
        if source.name in PARTS:
            command.add_argument(
                FORCED, action="store_true", help="take what has other counts or digests than the published dataset"
            )
    command = commands.add_parser(
        "verify",
        help="check a dataset against its manifest",
        description="Check digests, counts and indexes of every shard; each fault is a line, and the exit code is 1.",
    )
    command.add_argument("dir", type=local, help="a folder of shards")
    command.add_argument("--decode", action="store_true", help="decode every image too")
    command.add_argument("--workers", type=positive, default=cores(), help="processes (default: cores)")
    _add_tasks(command, "check a share of the shards", "check what goes across shards, once all shares are checked")
    command = commands.add_parser(
        "show",
        help="table and contact sheet of a dataset",
        description="Print splits, classes, shards and bytes, and write a PNG of random samples of every class; of a "
        "dataset that is being written, how far it is.",
    )
    command.add_argument("dir", type=local, help="a folder of shards")
    command.add_argument("--sheet", type=local, help=f"where the picture goes (default: DIR/{CONTACT_SHEET})")
    command = commands.add_parser(
        "index",
        help="make others' WebDataset tars readable",
        description="Write indexes and a manifest for WebDataset tars (jpg, png or webp, with .cls or .json) that "
        "another tool made; the tars stay as they are. The first --old classes, by number or else by name, are old.",
    )
    command.add_argument(
        "dir", type=folder_or_url, help="folder or URL (s3://...) of the tars, where indexes and manifest are written"
    )
    command.add_argument(
        "--train",
        help="which tars are for training (default: train*.tar, or those named by a number, as img2dataset's)",
    )
    command.add_argument("--test", default="test*.tar", help="which tars are for testing (default: %(default)s)")
    command.add_argument("--old", type=positive, help="how many classes, the first, are old (not if tars lack labels)")
    add_new(command)
    command.add_argument("--json-key", default="label", help="where a .json has the class (default: %(default)s)")
    command.add_argument("--name", help="name of the dataset (default: that of the folder)")
    _add_protocol(command)
    _add_tasks(
        command,
        "read a share of the tars: task I of N, from 0/N to N-1/N, on any machines",
        "write indexes and manifest when all tasks are done, or say which tars are not read",
    )
    return top
