"""The types of what a manifest says: checked where it comes in, so that nothing behind has to ask again."""

import re
from collections import Counter
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field

MOST = 2**53  # of what is counted: JSON's numbers are exact up to here
LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary name is a little longer
DEEPEST = 8  # levels of lists and objects in a protocol
# what rich would take for a tag: names are printed, in tables too
MARKUP = re.compile(r"\[[a-z#/@][^[]*?\]", re.IGNORECASE)


def name_fault(name: str) -> str | None:
    """Why a dataset or a class cannot have this name, or None."""
    if not name or name != name.strip():
        return "is empty, or begins or ends with a space"
    if not name.isprintable():
        return "has characters that cannot be printed"
    if len(name.encode()) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return "has what a terminal would take for markup: [...]" if MARKUP.search(name) else None


def _name(name: str) -> str:
    if fault := name_fault(name):
        raise ValueError(f"a name {fault}")
    return name


def is_file_name(name: str) -> bool:
    """Whether this is the plain name of a file: no path, not hidden, nothing that cannot be printed."""
    strange = not name.isprintable() or name.startswith(".") or "/" in name or "\\" in name
    return not strange and 0 < len(name.encode()) <= LONGEST_NAME


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("this is not the plain name of a file")
    return name


def plain(value: Any, depth: int = DEEPEST) -> Any:
    """The value, if it is JSON of few levels and of text that can be printed; ValueError if not."""
    if isinstance(value, dict | list) and not depth:
        raise ValueError(f"it is more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            plain(key, 1)
            plain(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            plain(inner, depth - 1)
    elif isinstance(value, str) and not value.isprintable():
        raise ValueError("it has characters that cannot be printed")
    elif isinstance(value, float) and not np.isfinite(value):
        raise ValueError("it has a number that is not finite")
    return value


def unique(names: list[str]) -> list[str]:
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{name!r} is there {times} times")
    return names


Name = Annotated[str, AfterValidator(_name)]
FileName = Annotated[str, AfterValidator(_file_name)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MOST)]
Facts = Annotated[dict[str, Any], AfterValidator(plain)]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def short(value: Any) -> str:
    """A value for a message: one line, of what a terminal shows as it is."""
    if isinstance(value, dict | list):
        return "something of several parts" if value else ascii(value)
    told = ascii(value)
    return told if len(told) <= 80 else f"{told[:77]}..."
