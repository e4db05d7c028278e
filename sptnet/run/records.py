"""The JSON files of a run, typed where they are read: what a disk or a hand damaged is named, never used."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from sptnet.data.format.fields import Count
from sptnet.data.format.files import open_regular, read_regular

TAIL = 2**20  # bytes that are looked at first, where a file is read from its end
LARGEST = 2**26  # bytes of a JSON file that a run writes as a whole
T = TypeVar("T")


class DamagedError(ValueError):
    """A file that is not what a run writes; the message says what of it is wrong, not which file."""


def _share(value: float) -> float:
    if not (math.isnan(value) or 0 <= value <= 1):
        raise ValueError(f"an accuracy is between 0 and 1, not {value:g}")
    return value


Accuracy = Annotated[float, AfterValidator(_share)]


class Known(BaseModel):
    """How many images of a split have a class that somebody knows."""

    all: Count
    old: Count
    new: Count


class Result(BaseModel):
    """What an evaluation found under one protocol; accuracies are null, or NaN, where no truth is known."""

    model_config = ConfigDict(extra="allow")

    all: Accuracy | None
    old: Accuracy | None
    new: Accuracy | None
    samples: Count
    classes_used: Count
    classes: Count | None = None
    effective_classes: float | None = None
    known: Known | None = None
    known_classes: Count | None = None


class Metrics(BaseModel):
    """metrics.json."""

    model_config = ConfigDict(extra="allow")

    method: str
    dataset: str | None = None
    unlabelled: Result | None = None
    test: Result | None = None


def read_json(path: Path, kind: type[T]) -> T:
    """A JSON file, checked against a type.

    Raises:
        OSError: it cannot be read, or is no regular file of sane size.
        DamagedError: it is not JSON, or not of that type.
    """
    return parse_json(read_regular(path, LARGEST), kind)


def parse_json(encoded: bytes | str, kind: type[T]) -> T:
    """As `read_json`, of its content."""
    try:
        raw = json.loads(encoded)
    except (ValueError, RecursionError, TypeError) as error:  # not JSON, not UTF-8, nested too deeply
        raise DamagedError(f"it is not JSON: {' '.join(str(error).split())[:200]}") from None
    return typed(raw, kind)


def typed(raw: Any, kind: type[T]) -> T:
    """What JSON said, checked against a type. Raises DamagedError."""
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def records_of(path: Path) -> Iterator[dict[str, Any] | None]:
    """What the lines of metrics.jsonl say; None for one that is damaged, or cut off by a kill."""
    with os.fdopen(open_regular(path), encoding="utf-8", errors="replace") as file:
        for line in file:
            yield _record(line)


def forget_from(path: Path, start: int) -> None:
    """Cut metrics.jsonl behind its last line that tells of what was done before step `start` was taken.

    Its lines are in the order of their steps, so it is read from its end: of millions of them a few are looked at.
    """
    with open(path, "r+b") as file:
        end, taken = file.seek(0, os.SEEK_END), TAIL
        begin = max(0, end - taken)
        while (cut := _end_before(file, begin, end, start)) is None and begin > 0:
            taken *= 4
            begin = max(0, end - taken)
        file.truncate(cut or 0)
        os.fsync(file.fileno())


def _end_before(file: BinaryIO, begin: int, end: int, start: int) -> int | None:
    """Where the last line of a part of the file ends that tells of a step before `start`; None if none of it does."""
    file.seek(begin)
    lines = file.read(end - begin).splitlines(keepends=True)
    for line in reversed(lines if begin == 0 else lines[1:]):  # where it begins, a line may be cut
        record = _record(line) if line.endswith(b"\n") else None
        # an evaluation is numbered by the steps done before it; one at `start` is made again
        if record is not None and record["step"] < start:
            return end
        end -= len(line)
    return None


def _record(line: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def known(share: float | None) -> bool:
    """Whether an accuracy is a number."""
    return share is not None and math.isfinite(share)
