"""The JSON files of a run, typed where they are read: what a disk or a hand damaged is named, never used."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sptnet.data.format.fields import Count
from sptnet.data.format.files import open_regular, read_regular

LARGEST = 2**26  # bytes of a JSON file that a run writes as a whole
T = TypeVar("T")


class DamagedError(ValueError):
    """A file that is not what a run writes; the message says what of it is wrong, not which file."""


class Result(BaseModel):
    """What an evaluation found under one protocol; accuracies are null, or NaN, where no truth is known."""

    model_config = ConfigDict(extra="allow")

    all: float | None = Field(ge=0, le=1)
    old: float | None
    new: float | None
    samples: Count
    classes_used: Count
    classes: Count | None = None
    effective_classes: float | None = None


class Metrics(BaseModel):
    """metrics.json."""

    model_config = ConfigDict(extra="allow")

    method: str
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


def lines_of(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The lines of metrics.jsonl with what each says; None for one that is damaged, or cut off by a kill."""
    with os.fdopen(open_regular(path), encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line, _record(line)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def known(share: float | None) -> bool:
    """Whether an accuracy is a number."""
    return share is not None and math.isfinite(share)
