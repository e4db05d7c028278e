"""Which shards of an unfinished conversion are done, and with which digests: what is there and differs was damaged.

    conversion.json     {"fingerprint"}: what is being converted
    conversion.shards   a line of JSON per finished shard, as in the manifest
    conversion.lock     held by the conversion that is under way

The three are gone when the manifest is there.
"""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from sptnet_shards.source import SourceError

from sptnet.data.files import append, read_regular, write_whole
from sptnet.data.manifest import MANIFEST, Shard

UNFINISHED, FINISHED, LOCK = "conversion.json", "conversion.shards", "conversion.lock"
LARGEST_RECORD = 2**28  # bytes
_SHARD = TypeAdapter(Shard)


def claim(out: Path, wanted: str) -> None:
    """Make the folder ours, or find that it is ours already. To be called by whoever holds its lock.

    Raises:
        SourceError: it holds a dataset, something else, or an unfinished conversion with another fingerprint.
        OSError: it cannot be written.
    """
    names = {path.name for path in out.iterdir()}
    if MANIFEST in names:
        raise SourceError(f"{out} holds a dataset already: remove it or choose another folder")
    if UNFINISHED not in names:
        if strange := min(names - {LOCK, f"{UNFINISHED}.tmp", f".{UNFINISHED}"}, default=None):
            raise SourceError(f"{out} is not empty ({strange}): choose another folder")
        write_whole(out / UNFINISHED, (json.dumps({"fingerprint": wanted}) + "\n").encode())
        return
    try:
        found = json.loads(read_regular(out / UNFINISHED, 2**16))["fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found != wanted:
        raise SourceError(
            f"{out} holds an unfinished conversion of something else, or with other settings: remove it or choose "
            "another folder"
        )


def finished(out: Path) -> dict[str, Shard]:
    """The shards that an earlier conversion finished, by file, as they were then; a line cut off by a kill is none."""
    try:
        lines = read_regular(out / FINISHED, LARGEST_RECORD).splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            shard = _SHARD.validate_json(line)
        except ValidationError:
            continue
        found[shard.file] = shard
    return found


def add(out: Path, shard: Shard) -> None:
    """Note a shard that is whole and on disk; raises OSError."""
    # a line feed first: the line before may have been cut off
    with append(out / FINISHED) as file:
        file.write(b"\n" + json.dumps(asdict(shard)).encode() + b"\n")


def remove(out: Path) -> None:
    """The conversion is done."""
    for name in (FINISHED, UNFINISHED):
        (out / name).unlink(missing_ok=True)
