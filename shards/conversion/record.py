"""What several tasks that write one dataset know of each other: files only, no lock and no messages.

    conversion.json       what is converted, with which settings and codecs, to how many shards; made by whoever comes
                          first, never replaced, and kept beside the manifest
    conversion/F-items.bin    which images there are, see `scan`; F: 16 digits of its sha256
    conversion/scanning   who is finding that out, or, begun with `failed: `, why it cannot be
    conversion/X.tar.json X.tar is whole: its sizes and digests, written last
    conversion/X.tar.members  what is in X.tar, which somebody else made, see `members`

The folder is gone when the manifest is there. Nothing in it is needed then.
"""

import json
import os
import platform
from base64 import b64decode, b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import features
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from sptnet_shards.conversion.writer import Written
from sptnet_shards.source import SourceError

from sptnet.data.format.fields import STRICT, Count, Digest
from sptnet.data.format.files import read_regular, write_once, write_whole
from sptnet.data.format.manifest import Shard
from sptnet.data.format.temporary import remove_leftovers

CONVERSION, FOLDER = "conversion.json", "conversion"
ITEMS, SCANNING, SUFFIX, MEMBERS = "items.bin", "scanning", ".json", ".members"  # in that folder
FAILED = b"failed: "  # how SCANNING begins where a scan has found that the source cannot be converted
LARGEST = 2**28  # bytes of a file of ours


@dataclass(frozen=True, config=STRICT)
class Conversion:
    """What all tasks do together.

    Attributes:
        command: of make_shards.py.
        options: what was asked for beside places and the number of tasks, by name.
        places: folders and files that were named, with links resolved. They differ where a disk is mounted elsewhere.
        fingerprint: sha256 of what was found there.
        samples, shards: how many of every kind.
        codecs: versions of what encodes images; empty where bytes are copied.
        remarks: sentences on what was found, told at the end.
    """

    command: str
    options: dict[str, Any]
    places: dict[str, str]
    fingerprint: Digest
    samples: dict[str, Count]
    shards: dict[str, Count]
    codecs: dict[str, str]
    remarks: list[str]
    format: Literal["sptnet-conversion/1"] = "sptnet-conversion/1"


@dataclass(frozen=True, config=STRICT)
class _Record:
    """A shard that is whole. contents: base64 of little-endian uint64, see `Written`."""

    shard: Shard
    index_bytes: Count
    paths_bytes: Count
    skipped: list[Count]
    contents: str


_CONVERSION, _RECORD = TypeAdapter(Conversion), TypeAdapter(_Record)


def text(value: str | os.PathLike[str]) -> str:
    """A path or another text as JSON can hold it: bytes that are no UTF-8 as escapes."""
    return os.fspath(value).encode(errors="backslashreplace").decode()


def codecs() -> dict[str, str]:
    """Versions of all that decides the bytes of an image that is encoded here."""
    versions = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp", "zlib", "zlib_ng")}
    told = {"pillow": PIL.__version__, "torch": torch.__version__, "machine": platform.machine(), **versions}
    return {name: str(version) for name, version in told.items() if version is not None}


def read_conversion(out: Path) -> Conversion | None:
    """What a folder is a conversion of; None where nobody has said it yet.

    Raises:
        SourceError: it was made by another version, or damaged.
        OSError: it cannot be read.
    """
    try:
        return _CONVERSION.validate_json(read_regular(out / CONVERSION, LARGEST))
    except FileNotFoundError:
        return None
    except ValidationError:
        raise SourceError(
            f"{out / CONVERSION} is damaged, or of another version of this program: remove {out} or choose another "
            "folder"
        ) from None


def claim(out: Path, conversion: Conversion) -> Conversion:
    """Say what a folder is a conversion of, or find that somebody has; returns what it is. Raises OSError."""
    encoded = (json.dumps(asdict(conversion), indent=1, sort_keys=True) + "\n").encode()
    if len(encoded) > LARGEST:
        raise SourceError(f"{out}: there is more to say of this source than {LARGEST:,} bytes hold")
    if write_once(out / CONVERSION, encoded):
        return conversion
    found = read_conversion(out)
    return conversion if found is None else found


def need_same(out: Path, ours: Conversion, theirs: Conversion) -> None:
    """Raise SourceError, with what differs, unless two tasks were asked for the same."""
    if ours.command != theirs.command:
        raise SourceError(f"{out} is a conversion by {theirs.command!r}, not {ours.command!r}: {ELSEWHERE}")
    if told := difference(theirs.options, ours.options):
        raise SourceError(f"{out} is a conversion with other settings: {told}; {ELSEWHERE}")


def need_same_codecs(out: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise SourceError where images are encoded by other versions: their bytes are others."""
    if theirs and (told := difference(theirs, ours)):
        raise SourceError(
            f"{out} has images encoded by other versions: {told}; use the environment that it was begun with, or "
            "choose another folder"
        )


ELSEWHERE = "remove it or choose another folder"


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first key of which two say other things, and what; empty where there is none."""
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            return f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
    return ""


def write_record(out: Path, written: Written) -> None:
    """Note that a shard is whole and on disk; raises OSError."""
    contents = b64encode(written.contents.astype("<u8").tobytes()).decode()
    record = _Record(written.shard, written.index_bytes, written.paths_bytes, written.skipped, contents)
    (out / FOLDER).mkdir(exist_ok=True)
    write_whole(_place(out, written.shard.file), json.dumps(asdict(record)).encode())


def read_record(out: Path, file: str) -> Written | None:
    """A shard that some task has finished, if all its files are there with their sizes."""
    try:
        record = _RECORD.validate_json(read_regular(_place(out, file), LARGEST))
        contents = np.frombuffer(b64decode(record.contents, validate=True), "<u8").astype(np.uint64)
        shard = record.shard
        sizes = {shard.file: shard.bytes, shard.index: record.index_bytes, str(shard.paths): record.paths_bytes}
        there = all(os.stat(out / name).st_size == size for name, size in sizes.items())
    except (OSError, ValueError):  # pydantic's and base64's errors are ValueErrors
        return None
    if not there or shard.file != file or len(contents) != shard.samples:
        return None
    return Written(shard, record.index_bytes, record.paths_bytes, record.skipped, contents)


def recorded(out: Path, suffix: str = SUFFIX) -> list[str]:
    """The tars of which somebody has noted that they are whole, or read (MEMBERS), without looking at them."""
    try:
        names = os.listdir(out / FOLDER)
    except FileNotFoundError:
        return []
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(f".tar{suffix}"))


def make_folder(out: Path) -> None:
    """Make the folder of what tasks tell each other; raises SourceError, OSError."""
    if os.path.islink(out / FOLDER):
        raise SourceError(f"{out / FOLDER} is a link: remove it")
    (out / FOLDER).mkdir(parents=True, exist_ok=True)


def clean_up(out: Path, complete: bool) -> None:
    """Remove what ended processes left behind and, where the manifest is there, what served to get there."""
    for folder in (out, out / FOLDER):
        remove_leftovers(folder)
    if not complete or os.path.islink(out / FOLDER):
        return
    # by name: in a folder of tars that others made, one called so may be somebody's own
    with suppress(OSError):
        for name in os.listdir(out / FOLDER):
            if name == SCANNING or name.endswith((ITEMS, f".tar{SUFFIX}", f".tar{MEMBERS}")):
                (out / FOLDER / name).unlink(missing_ok=True)
        (out / FOLDER).rmdir()


def _place(out: Path, file: str) -> Path:
    return out / FOLDER / f"{file}{SUFFIX}"
