"""What the commands of make_shards.py do, and what they say of it. Loaded when the arguments are right."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from rich.console import Console
from sptnet_shards.arguments import SOURCES
from sptnet_shards.conversion import record
from sptnet_shards.conversion.convert import Job, convert, finish_only
from sptnet_shards.conversion.finish import Unfinished
from sptnet_shards.conversion.images import Resize
from sptnet_shards.conversion.plan import Settings
from sptnet_shards.names import CONTACT_SHEET
from sptnet_shards.progress import ShardProgress
from sptnet_shards.protocol import deviation
from sptnet_shards.published import PARTS
from sptnet_shards.share import ALONE
from sptnet_shards.show import classes_told, classes_without_samples, contact_sheet, table, under_way
from sptnet_shards.source import Source, SourceCommand, SourceError
from sptnet_shards.tars.index import finish_index, index
from sptnet_shards.tars.indexing import Indexing
from sptnet_shards.tars.places import place_of
from sptnet_shards.verify import verify, verify_across

from sptnet.data.format.files import open_regular, write_whole
from sptnet.data.format.manifest import KINDS, MANIFEST, Manifest, read_manifest
from sptnet.errors import visible

NUMBERED = re.compile(r"\d+\.tar")  # as img2dataset names them
TOLD = 5  # missing shards that are told by name
LATE = 70.0  # seconds that --finish looks again for what is missing: NFS may show new files a minute late
# of a command's arguments, what may differ between two tasks, and what `Settings.asked` tells
FREE = {"command", "out", "workers", "on_error", "task", "finish", "download"}
SETTINGS = {"labelled_fraction", "seed", "shard_mb", "keep", "resize", "format", "quality"}


def _convert(arguments: argparse.Namespace, source: SourceCommand, console: Console) -> None:
    if arguments.resize is None and (arguments.format or arguments.quality):
        raise SourceError("--format and --quality say how --resize stores images: give --resize too, or neither")
    resize = Resize(arguments.resize, arguments.format or "jpeg", arguments.quality or 95) if arguments.resize else None
    settings = Settings(
        arguments.labelled_fraction, arguments.seed, arguments.shard_mb * 10**6, resize, arguments.on_error
    )
    job, share = _job(arguments, source, settings), arguments.task or ALONE
    if arguments.finish:
        done = finish_only(job, arguments.out, LATE)
    else:
        with ShardProgress(console) as progress:
            done = convert(job, arguments.out, arguments.workers, progress, share)
    if isinstance(done, Unfinished):
        return _unfinished(arguments.out, arguments, done)
    manifest, remarks = done
    _told(arguments.out, manifest)
    if manifest.skipped:
        first = manifest.skipped[0]["file"]
        remarks.append(f"{len(manifest.skipped)} images were left out, the first is {first}")
    counts = manifest.samples("labelled"), manifest.samples("unlabelled")
    if warning := deviation(manifest.name, *counts, settings.labelled_fraction):
        remarks.append(warning)
    _warn(remarks)


def _job(arguments: argparse.Namespace, source: SourceCommand, settings: Settings) -> Job:
    """What the arguments ask for. A folder is the same by whatever path it is named."""
    asked = {key: value for key, value in vars(arguments).items() if key not in FREE | SETTINGS}
    options = {f"--{key.replace('_', '-')}": value for key, value in asked.items() if not isinstance(value, Path)}
    places = {key: record.text(os.path.realpath(path)) for key, path in asked.items() if isinstance(path, Path)}
    options = {key: record.text(value) if isinstance(value, str) else value for key, value in options.items()}
    unofficial = source.name in PARTS and arguments.unofficial

    def build() -> Source:
        built = source.build(arguments)
        if unofficial:
            built.protocol["unofficial"] = True
        return built

    read = partial(source.read, arguments)
    return Job(source.name, settings, build, read, options, places, official=not unofficial)


def _unfinished(where: Path | str, arguments: argparse.Namespace, done: Unfinished) -> None:
    """Say what is missing; an error where somebody asked to finish, or wrote all of it."""
    there, first = done.total - len(done.missing), ", ".join(done.missing[:TOLD])
    more = f" and {len(done.missing) - TOLD} more" if len(done.missing) > TOLD else ""
    if arguments.finish or arguments.task is None:
        raise SourceError(
            f"{where} lacks {len(done.missing)} of {done.total} shards, {first}{more}: run their tasks again, "
            "or the command without --finish"
        )
    _say(f"{where}: {there} of {done.total} shards are there; the last task, or --finish, writes the manifest")


def _say(line: str) -> None:
    print(visible(line), flush=True)


def _warn(remarks: Sequence[str]) -> None:
    for remark in remarks:
        print(f"warning: {visible(remark)}", file=sys.stderr)


def _told(root: Path | str, manifest: Manifest) -> None:
    counts = ", ".join(f"{manifest.samples(kind)} {kind}" for kind in KINDS)
    _say(f"{root}: {manifest.name}, {counts}; {classes_told(manifest)}")


def _verify(arguments: argparse.Namespace, console: Console) -> None:
    manifest, share = read_manifest(arguments.dir), arguments.task or ALONE
    if arguments.finish:
        verify_across(arguments.dir)
        return _say(f"{arguments.dir}: its {len(manifest.shards)} shards have every image once; verify checks each")
    mine, problems = share.of(manifest.shards), 0
    with ShardProgress(console) as progress:
        progress.begin(len(mine), sum(shard.samples for shard in mine))
        for checked in verify(arguments.dir, arguments.decode, arguments.workers, share):
            progress.add(checked.shard)
            problems += len(checked.problems)
            for problem in checked.problems:
                print(visible(problem), file=sys.stderr)
    if problems:
        raise SourceError(f"{arguments.dir} has {problems} faults: make or copy these shards again")
    of = "" if share.is_all() else f" of {len(manifest.shards)}"
    _say(f"{arguments.dir}: {len(mine)}{of} shards are what the manifest says")


def _show(arguments: argparse.Namespace, console: Console) -> None:
    if (told := under_way(arguments.dir)) is not None:
        Console().print(told)
        if arguments.sheet is not None:
            raise SourceError(f"{arguments.dir} is being written: a contact sheet is made of a whole dataset")
        return
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
    own = {MANIFEST, *(name for file, index, _ in manifest.shards.names() for name in (file, index))}
    if path.name in ("", "..") or (os.path.exists(path) and not os.path.isfile(path)):
        raise SourceError(f"{path} is no file: give --sheet the name of a picture")
    if path.name in own and path.parent.resolve() == root.resolve():
        raise SourceError(f"{path} is a file of the dataset: give --sheet another name")
    if os.path.exists(path) and not path.is_symlink() and not _is_png(path):
        raise SourceError(f"{path} is there, and no PNG: give --sheet another name, or remove it")


def _is_png(path: Path) -> bool:
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _index(arguments: argparse.Namespace, console: Console) -> None:
    place = place_of(arguments.dir)
    names = [name for name in place.sizes() if not name.startswith(".")]
    test = [name for name in names if fnmatchcase(name, arguments.test)]
    if arguments.train is None:
        train = [name for name in names if fnmatchcase(name, "train*.tar")]
        train = train or [name for name in names if NUMBERED.fullmatch(name)]
    else:
        train = [name for name in names if fnmatchcase(name, arguments.train)]
    if not train:
        raise SourceError(f"{arguments.dir} has no {arguments.train or 'train*.tar, nor a tar named by a number'}")
    settings = Settings(arguments.labelled_fraction, arguments.seed)
    name = place.name() if arguments.name is None else arguments.name
    job = Indexing(train, test, arguments.old, settings, name, arguments.json_key, arguments.new)
    done = finish_index(place, job, LATE) if arguments.finish else index(place, job, arguments.task or ALONE)
    if isinstance(done, Unfinished):
        return _unfinished(arguments.dir, arguments, done)
    _told(arguments.dir, done.manifest)
    _warn(done.remarks)


def _need_paths(arguments: argparse.Namespace) -> None:
    """Raise SourceError for a path that no file can have, before anything looks at it."""
    for value in vars(arguments).values():
        if isinstance(value, Path | str) and "\0" in str(value):
            raise SourceError(f"{value} has a NUL in it, which no path can have")


def run(arguments: argparse.Namespace) -> None:
    """Run a command. Raises SourceError, DatasetError, OSError."""
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
