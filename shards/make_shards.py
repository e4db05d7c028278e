#!/usr/bin/env python3
"""Turn a dataset of images into WebDataset shards that sptnet reads; check, show and index shards.

One command per dataset of the field, and for your own images; `make_shards.py COMMAND --help` says which files it
expects and where they are published. shards/README.md describes the format.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # while torch is imported, which takes seconds, a Ctrl-C ends the process without a traceback; `main` tells it
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from rich.console import Console
from sptnet_shards import aircraft, cifar, csv_list, cub, digits, discover, herbarium_19, imagefolder, imagenet, scars
from sptnet_shards.convert import convert
from sptnet_shards.discover import add_new
from sptnet_shards.images import SUFFIX, Resize
from sptnet_shards.index import index
from sptnet_shards.plan import Settings
from sptnet_shards.progress import ShardProgress
from sptnet_shards.protocol import deviation
from sptnet_shards.published import FORCED, PARTS, check_published
from sptnet_shards.show import CONTACT_SHEET, classes_told, classes_without_samples, contact_sheet, table
from sptnet_shards.source import SourceCommand, SourceError
from sptnet_shards.verify import verify
from sptnet_shards.workers import cores

from sptnet.data.files import write_whole
from sptnet.data.manifest import KINDS, MANIFEST, DatasetError, Manifest, read_manifest
from sptnet.errors import visible

LARGEST_SIDE = 8192  # pixels of --resize
INTERRUPTED = 130  # the exit code that a shell gives to what a Ctrl-C ended

SOURCES: list[SourceCommand] = [
    command
    for source in (cifar, imagenet, cub, scars, aircraft, herbarium_19, imagefolder, csv_list, discover, digits)
    for command in source.COMMANDS
]


def whole(text: str) -> int:
    """An argument that is a whole number, 0 or more."""
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 16) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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


def _add_protocol(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--labelled-fraction",
        type=share,
        default=0.5,
        help="share of the training images of old classes that are labelled (default: %(default)s, the protocol's)",
    )
    command.add_argument(
        "--seed", type=seed, default=0, help="of that choice and of the dealing to shards (default: %(default)s)"
    )


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path, help="folder to write")
    _add_protocol(command)
    command.add_argument(
        "--workers", type=positive, default=cores(), help="processes (default: one per core that may be used)"
    )
    command.add_argument(
        "--shard-mb", type=positive, default=256, help="about how large a shard becomes (default: %(default)s MB)"
    )
    kept = command.add_mutually_exclusive_group()
    kept.add_argument("--keep", action="store_true", help="copy the image bytes untouched (the default)")
    kept.add_argument("--resize", type=side, metavar="PIXELS", help="store images with this short side (bicubic)")
    command.add_argument("--format", choices=list(SUFFIX), help="of --resize (default: jpeg)")
    command.add_argument("--quality", type=quality, help="of --resize, for JPEG and WebP (default: 95)")
    command.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="an image that does not decode stops the conversion, or is left out and listed in the manifest",
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="make_shards.py", description=__doc__)
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
    command.add_argument("dir", type=Path, help="a folder of shards")
    command.add_argument("--decode", action="store_true", help="decode every image too")
    command.add_argument("--workers", type=positive, default=cores(), help="processes (default: cores)")
    command = commands.add_parser(
        "show",
        help="table and contact sheet of a dataset",
        description="Print splits, classes, shards and bytes, and write a PNG of random samples of every class.",
    )
    command.add_argument("dir", type=Path, help="a folder of shards")
    command.add_argument("--sheet", type=Path, help=f"where the picture goes (default: DIR/{CONTACT_SHEET})")
    command = commands.add_parser(
        "index",
        help="make others' WebDataset tars readable",
        description="Write indexes and a manifest for WebDataset tars (jpg, png or webp, with .cls or .json) that "
        "another tool made; the tars stay as they are. The first --old classes, by number or else by name, are old.",
    )
    command.add_argument("dir", type=Path, help="the folder of the tars, where indexes and manifest are written")
    command.add_argument("--train", default="train*.tar", help="which tars are for training (default: %(default)s)")
    command.add_argument("--test", default="test*.tar", help="which tars are for testing (default: %(default)s)")
    command.add_argument("--old", type=positive, help="how many classes, the first, are old (not if tars lack labels)")
    add_new(command)
    command.add_argument("--json-key", default="label", help="where a .json has the class (default: %(default)s)")
    command.add_argument("--name", help="name of the dataset (default: that of the folder)")
    _add_protocol(command)
    return top


def _convert(arguments: argparse.Namespace, source: SourceCommand, console: Console) -> None:
    if arguments.resize is None and (arguments.format or arguments.quality):
        raise SourceError("--format and --quality say how --resize stores images: give --resize too, or neither")
    resize = Resize(arguments.resize, arguments.format or "jpeg", arguments.quality or 95) if arguments.resize else None
    settings = Settings(
        arguments.labelled_fraction, arguments.seed, arguments.shard_mb * 10**6, resize, arguments.on_error
    )
    built = source.build(arguments)
    unofficial = source.name in PARTS and arguments.unofficial
    if unofficial:
        built.protocol["unofficial"] = True
    else:
        check_published(built)
    with ShardProgress(console) as progress:
        manifest, remarks = convert(built, arguments.out, settings, arguments.workers, progress)
    _told(arguments.out, manifest)
    if manifest.skipped:
        first = manifest.skipped[0]["file"]
        remarks.append(f"{len(manifest.skipped)} images were left out, the first is {first}")
    counts = manifest.samples("labelled"), manifest.samples("unlabelled")
    if warning := deviation(manifest.name, *counts, settings.labelled_fraction):
        remarks.append(warning)
    _warn(remarks)


def _say(line: str) -> None:
    print(visible(line), flush=True)


def _warn(remarks: Sequence[str]) -> None:
    for remark in remarks:
        print(f"warning: {visible(remark)}", file=sys.stderr)


def _told(root: Path, manifest: Manifest) -> None:
    counts = ", ".join(f"{manifest.samples(kind)} {kind}" for kind in KINDS)
    _say(f"{root}: {manifest.name}, {counts}; {classes_told(manifest)}")


def _verify(arguments: argparse.Namespace, console: Console) -> None:
    manifest = read_manifest(arguments.dir)
    problems = 0
    with ShardProgress(console) as progress:
        progress.begin(len(manifest.shards), sum(shard.samples for shard in manifest.shards))
        for checked in verify(arguments.dir, arguments.decode, arguments.workers):
            progress.add(checked.shard)
            problems += len(checked.problems)
            for problem in checked.problems:
                print(visible(problem), file=sys.stderr)
    if problems:
        raise SourceError(f"{arguments.dir} has {problems} faults: make or copy these shards again")
    _say(f"{arguments.dir}: {len(manifest.shards)} shards are what the manifest says")


def _show(arguments: argparse.Namespace, console: Console) -> None:
    manifest = read_manifest(arguments.dir)
    Console().print(table(manifest))
    if empty := classes_without_samples(arguments.dir, manifest):
        _say(f"classes without samples: {', '.join(empty)}")
    path = arguments.dir / CONTACT_SHEET if arguments.sheet is None else arguments.sheet
    _need_sheet(path, arguments.dir, manifest)
    sheet = contact_sheet(arguments.dir, manifest)
    if sheet.bad:
        _warn([f"{len(sheet.bad)} images are shown as a cross, the first: {sheet.bad[0]}"])
    try:
        write_whole(path, sheet.png)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
    _say(f"contact sheet: {path}")


def _need_sheet(path: Path, root: Path, manifest: Manifest) -> None:
    """Raise SourceError where a picture would take the place of a folder, a device, or a file of the dataset."""
    own = {MANIFEST, *(name for shard in manifest.shards for name in (shard.file, shard.index))}
    if path.name in ("", "..") or (os.path.exists(path) and not os.path.isfile(path)):
        raise SourceError(f"{path} is no file: give --sheet the name of a picture")
    if path.name in own and path.parent.resolve() == root.resolve():
        raise SourceError(f"{path} is a file of the dataset: give --sheet another name")


def _index(arguments: argparse.Namespace, console: Console) -> None:
    root = arguments.dir
    train, test = (_matching(root, pattern) for pattern in (arguments.train, arguments.test))
    if not train:
        raise SourceError(f"{root} has no {arguments.train}")
    settings = Settings(arguments.labelled_fraction, arguments.seed)
    name = root.resolve().name if arguments.name is None else arguments.name
    manifest, remarks = index(root, train, test, arguments.old, settings, name, arguments.json_key, arguments.new)
    _told(root, manifest)
    _warn(remarks)


def _matching(root: Path, pattern: str) -> list[Path]:
    """The files of a folder whose names a pattern fits; hidden ones are none."""
    try:
        names = os.listdir(root)
    except OSError as error:
        raise SourceError(f"{root} cannot be listed: {error.strerror}") from None
    return sorted(root / name for name in names if fnmatchcase(name, pattern) and not name.startswith("."))


def _need_paths(arguments: argparse.Namespace) -> None:
    """Raise SourceError for a path that no file can have, before anything looks at it."""
    for value in vars(arguments).values():
        if isinstance(value, Path) and "\0" in str(value):
            raise SourceError(f"{value} has a NUL in it, which no path can have")


def _run(arguments: argparse.Namespace) -> None:
    console = Console(stderr=True)
    commands: dict[str, Callable[[argparse.Namespace, Console], None]] = {
        "verify": _verify,
        "show": _show,
        "index": _index,
    }
    _need_paths(arguments)
    if arguments.command in commands:
        commands[arguments.command](arguments, console)
    else:
        _convert(arguments, next(s for s in SOURCES if s.name == arguments.command), console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what a user, disk, network or file did is one line on stderr, and a bug of ours a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = parser().parse_args(argv)
    try:
        _run(arguments)
    except (SourceError, DatasetError) as error:
        return _failed(str(error))
    except BrokenPipeError:
        # whoever read our output has left; nothing more may be written, not even at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _failed(f"{error.filename or 'the output'} cannot be read or written: {error.strerror or error}")
    except MemoryError:
        return _failed("out of memory: give fewer --workers, or more memory")
    except KeyboardInterrupt:
        _failed("stopped by Ctrl-C; the same command goes on where it stood, where it had begun to write")
        return INTERRUPTED
    return 0


def _failed(reason: str) -> int:
    print(f"error: {visible(reason)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
