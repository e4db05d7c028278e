"""Convert a source into shards: each of several tasks writes its share, and whoever finds all of them finishes.

What is written is a pure function of source, settings and codecs, so nothing is coordinated but who scans the source;
tasks may be killed, run twice and run anywhere that sees source and output.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sptnet_shards.conversion import record
from sptnet_shards.conversion.checks import check_source
from sptnet_shards.conversion.finish import Converted, Unfinished, finish
from sptnet_shards.conversion.plan import Planned, Settings, plan, shard_counts
from sptnet_shards.conversion.record import Conversion
from sptnet_shards.conversion.scan import fingerprint, need_the_same_source, read_items, turn_to_scan, write_items
from sptnet_shards.conversion.writer import Written, index_name, write_shard
from sptnet_shards.published import check_published
from sptnet_shards.share import ALONE, Share
from sptnet_shards.source import Read, Source, SourceError
from sptnet_shards.workers import run_all

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.files import file_sha256
from sptnet.data.format.manifest import MANIFEST, UNKNOWN, Shard, read_manifest
from sptnet.data.format.paths import paths_name
from sptnet.data.format.shard_index import read_entries
from sptnet.data.format.temporary import writer_of

KEPT_AS_PNG = re.compile(rb"(?i)\.(bmp|gif|tiff?)")  # by their names; one more costs nothing but the same versions


class Progress(Protocol):
    """What is told while shards are written."""

    def begin(self, shards: int, images: int, elsewhere: Callable[[], str] | None = None) -> None:
        """How much there is to do; `elsewhere` tells how far all tasks are."""

    def advance(self, shard: Shard, continued: bool) -> None:
        """A shard is done; `continued`: by an earlier or another task."""


@dataclass(frozen=True)
class Job:
    """What somebody asked for.

    Attributes:
        command: the name of the source's command.
        options: what was asked of it, by option, as JSON has it; `places`: the folders and files among it.
        build: finds the source's images; `read`: reads one of them, where somebody else found them.
        official: whether a dataset of the field must have the published counts.
    """

    command: str
    settings: Settings
    build: Callable[[], Source]
    read: Callable[[], Read]
    options: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    official: bool = False


class _Joined(NamedTuple):
    """A conversion that is under way, and the source that it is of."""

    conversion: Conversion
    source: Source


def convert(job: Job, out: Path, workers: int, progress: Progress, share: Share = ALONE) -> Converted | Unfinished:
    """Write the shards of a share, and the manifest if all others are there: a folder with one is complete.

    Whole shards that are there already are kept, if they are still what was written. The bytes of every file are the
    same for any number of tasks and of workers, and whether or not they were killed on the way.

    Raises:
        SourceError: `out` holds another dataset or conversion, an image cannot be read or does not decode, or the disk
            is full.
    """
    try:
        if (complete := _complete(job, out)) is not None:
            return complete
        conversion, source = _joined(job, out, share.is_all())
        planned = plan(source, job.settings, conversion.shards)
        _write_share(out, share.of(planned), source, job.settings, workers, progress, conversion)
        return finish(out, conversion, source, planned, job.settings)
    except OSError as error:
        raise SourceError(f"{error.filename or out} cannot be written: {error.strerror}") from None


def finish_only(job: Job, out: Path, late: float) -> Converted | Unfinished:
    """Write the manifest if all shards are there, with `late` seconds for a disk that shows new files late.

    Raises:
        SourceError: nothing was begun in `out`, or something else.
    """
    try:
        if (complete := _complete(job, out)) is not None:
            return complete
        conversion = record.read_conversion(out)
        if conversion is None:
            raise SourceError(f"{out} holds no conversion that was begun: run the same command without --finish first")
        record.need_same(out, _asked(job), conversion)
        source = _read_source(job, out, conversion, _unread)
        return finish(out, conversion, source, plan(source, job.settings, conversion.shards), job.settings, late)
    except OSError as error:
        raise SourceError(f"{error.filename or out} cannot be written: {error.strerror}") from None


def _complete(job: Job, out: Path) -> Converted | None:
    """The dataset that is there already, where it is what was asked for; raises SourceError where it is not."""
    if not os.path.lexists(out / MANIFEST):
        return None
    conversion = record.read_conversion(out)
    if conversion is None:
        raise SourceError(f"{out} holds a dataset already: {record.ELSEWHERE}")
    record.need_same(out, _asked(job), conversion)
    if job.places != conversion.places:
        need_the_same_source(out, conversion.fingerprint, _built(job))
    try:
        manifest = read_manifest(out)
    except DatasetError as error:
        raise SourceError(f"{error}; or remove {out / MANIFEST}, and run this again") from None
    record.clean_up(out, complete=True)
    return Converted(manifest, [])


def _asked(job: Job) -> Conversion:
    """What is known of a conversion before the source is looked at."""
    options = {**job.options, **job.settings.asked()}
    return Conversion(job.command, options, job.places, "0" * 64, {}, {}, {}, [])


def _joined(job: Job, out: Path, alone: bool) -> _Joined:
    """The conversion in a folder: begun by another task, or else by us, who scan the source then.

    Args:
        alone: there are no other tasks.

    Raises:
        SourceError: it is another one, or the folder holds something else.
    """
    conversion = record.read_conversion(out)
    if conversion is None:
        was_there = os.path.lexists(out)
        _need_empty(out)
        record.make_folder(out)
        try:
            with turn_to_scan(out, lambda: _is_begun(out), alone):
                conversion = record.read_conversion(out)
                if conversion is None:
                    return _begun(job, out)
        except BaseException:
            _unmake(out, was_there)
            raise
    record.need_same(out, _asked(job), conversion)
    source = _read_source(job, out, conversion, job.read())
    if _encodes(source, job.settings):
        record.need_same_codecs(out, conversion.codecs, record.codecs())
    return _Joined(conversion, source)


def _is_begun(out: Path) -> bool:
    """Listed, not looked up: a network disk may remember for a minute that a name was not there."""
    try:
        return record.CONVERSION in os.listdir(out)
    except FileNotFoundError:  # a task whose scan failed has removed what it had made
        return False


def _begun(job: Job, out: Path) -> _Joined:
    """Scan the source, and say what is converted; or find that another task said it in the same moment."""
    source = _built(job)
    counts = shard_counts(source, job.settings)
    wanted = fingerprint(source)
    ours = Conversion(
        job.command, _asked(job).options, job.places, wanted,
        {kind: samples for kind, (samples, _) in counts.items()},
        {kind: shards for kind, (_, shards) in counts.items()},
        record.codecs() if _encodes(source, job.settings) else {}, [record.text(remark) for remark in source.remarks],
    )  # fmt: skip
    # first: who finds the conversion finds these too
    write_items(out, source, wanted)
    theirs = record.claim(out, ours)
    record.need_same(out, ours, theirs)
    record.need_same_codecs(out, theirs.codecs, ours.codecs)
    if theirs.fingerprint != ours.fingerprint:
        need_the_same_source(out, theirs.fingerprint, source)
    return _Joined(theirs, source)


def _encodes(source: Source, settings: Settings) -> bool:
    """Whether the bytes that are written depend on the version of an encoder."""
    kept_as_png = any(KEPT_AS_PNG.search(source.part(part).names) for part in ("train", "test"))
    return settings.resize is not None or source.encodes or kept_as_png


def _built(job: Job) -> Source:
    source = job.build()
    if job.official:
        check_published(source)
    check_source(source)
    return source


def _unread(where: str) -> bytes:
    """Whoever finishes reads no image, and need not see them."""
    raise AssertionError(where)


def _read_source(job: Job, out: Path, conversion: Conversion, read: Read) -> Source:
    """The source as the first task found it; found again where it was named by another path, or that is lost."""
    if job.places == conversion.places:
        found = read_items(out, conversion.fingerprint, read)
        if found is not None:
            return found
    source = _built(job)
    need_the_same_source(out, conversion.fingerprint, source)
    return source


def _need_empty(out: Path) -> None:
    """Raise SourceError for a folder that holds something else than traces of tasks that are about to begin."""
    try:
        names = set(os.listdir(out))
    except FileNotFoundError:
        return
    being_written = {name for name in names if (writer := writer_of(name)) and writer.file == record.CONVERSION}
    ours = being_written | {record.FOLDER}
    # it may have come in between
    if (strange := min(names - ours, default=None)) and not os.path.lexists(out / record.CONVERSION):
        raise SourceError(f"{out} is not empty ({strange}): choose another folder")


def _unmake(out: Path, was_there: bool) -> None:
    """Leave nothing of a conversion that never began, unless another task is about to."""
    try:
        (out / record.FOLDER).rmdir()
        if not was_there:
            out.rmdir()
    except OSError:
        pass


def _write_share(
    out: Path, share: list[Planned], source: Source, settings: Settings, workers: int, progress: Progress,
    conversion: Conversion,
) -> None:  # fmt: skip
    """Every shard of a share that is not there yet."""
    record.clean_up(out, complete=False)
    total = sum(conversion.shards.values())

    def elsewhere() -> str:
        return "" if len(share) == total else f"all tasks: {len(record.recorded(out))}/{total} shards"

    progress.begin(len(share), sum(len(planned.uids) for planned in share), elsewhere)
    try:
        for shard, continued in run_all(_written, (out, share, source, settings), range(len(share)), workers):
            progress.advance(shard, continued)
    finally:
        record.clean_up(out, complete=False)  # of workers that were stopped in the middle of a shard


def _written(out: Path, share: list[Planned], source: Source, settings: Settings, number: int) -> tuple[Shard, bool]:
    """Write a shard, unless an earlier task, or a twin of this one, has."""
    planned = share[number]
    if (found := _whole(out, planned, source, settings)) is not None:
        return found.shard, True
    written = write_shard(out, planned, source, settings)
    record.write_record(out, written)
    return written.shard, False


def _whole(out: Path, planned: Planned, source: Source, settings: Settings) -> Written | None:
    """A shard that somebody has finished, if it is still what that wrote, and may stay as it is."""
    found = record.read_record(out, planned.file)
    if found is None or (found.skipped and settings.on_error == "fail"):
        return None  # the other one was told to leave images out, this one was not
    shard, targets = found.shard, range(source.num_old)
    if planned.kind != "labelled":
        targets = range(UNKNOWN if planned.kind == "unlabelled" else 0, len(source.classes))
    names = index_name(planned.file), planned.kind, paths_name(planned.file)
    if (shard.index, shard.kind, shard.paths) != names:
        return None
    try:
        if file_sha256(out / shard.file) != shard.sha256 or file_sha256(out / names[2]) != shard.paths_sha256:
            return None
        read_entries(out / shard.index, shard, targets)
    except (OSError, DatasetError):
        return None
    return found
