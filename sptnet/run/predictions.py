"""What an evaluation predicted, in files: one, or parts that the ranks write where it is more than a window of uids.

predictions.npz                      KIND_uid, KIND_target, KIND_prediction [N] of every kind, sorted by uid; or, where
                                     there are parts, `parts` (16 hexadecimal digits) and KIND_parts, how many
predictions/KIND-000000.PARTS.npz    uid, target, prediction [n] of a window of uids, the lowest first

Which sample is in which part does not depend on the number of ranks. `predictions.npz` is written last: parts of a name
that it does not say are of an evaluation that was not finished, or of the one before.
"""

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sptnet.data.format.files import open_regular, write_whole
from sptnet.data.format.manifest import KINDS, Kind
from sptnet.run.folder import PREDICTIONS, RunError, writing
from sptnet.run.parts import putting_aside, writing_parts
from sptnet.strategy.collectives import barrier, rank

FOLDER, NAMES = "predictions", ("uid", "target", "prediction")
PARTS = re.compile("[0-9a-f]{16}")
MOST_PARTS = 2**20
LARGEST = 2**34  # bytes of a file's arrays; parts keep theirs far below
LAST_CLASS = 2**21  # more than any model may have
HIGHEST = (2**63 - 1, LAST_CLASS, LAST_CLASS)
KEPT = 2**27  # bytes of predictions that a rank puts aside in memory until they are saved
Ids = NDArray[np.int64]


class Predicted(Protocol):
    """[n] each, sorted by uid."""

    @property
    def uid(self) -> Ids: ...
    @property
    def target(self) -> Ids: ...
    @property
    def prediction(self) -> Ids: ...


class PredictionParts:
    """This rank's parts, put aside until they are saved, in memory or in a temporary file."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=KEPT)  # noqa: SIM115
        self._places: dict[tuple[Kind, int], tuple[int, int]] = {}

    def add(self, kind: Kind, part: int, predictions: Predicted) -> None:
        # not the confidences: they differ in their last digits between strategies, and files are the same under all
        self._places[kind, part] = self._file.tell(), len(predictions.uid)
        with putting_aside():
            for name in NAMES:
                self._file.write(np.ascontiguousarray(getattr(predictions, name), np.int64).tobytes())

    def __iter__(self) -> Iterator[tuple[Kind, int]]:
        return iter(self._places)

    def columns(self, kind: Kind, part: int) -> dict[str, Ids]:
        begin, count = self._places[kind, part]
        self._file.seek(begin)
        return {name: np.frombuffer(self._file.read(8 * count), np.int64) for name in NAMES}


def save_predictions(folder: Path, parts: PredictionParts, results: dict[str, Any], numbers: dict[Kind, int]) -> None:
    """Write the parts, every rank its own; all ranks call it.

    Args:
        folder: of a run, which is there.
        results: of the evaluation, the same on every rank; the parts are named after them.
        numbers: how many parts there are of every kind, of all ranks together.

    Raises:
        PartsError, RunError: something cannot be written; `predictions.npz` stays what it was.
    """
    first = rank() == 0
    name = hashlib.sha256(json.dumps([results, numbers], sort_keys=True).encode()).hexdigest()[:16]
    arrays: dict[str, Any] = {}
    below = folder / FOLDER
    if max(numbers.values(), default=1) == 1:
        for kind, part in parts:  # all are with the first rank
            arrays |= {f"{kind}_{column}": values for column, values in parts.columns(kind, part).items()}
    else:
        arrays = {"parts": np.array(name.encode()), **{f"{kind}_parts": np.array(n) for kind, n in numbers.items()}}
        with writing_parts(below):
            below.mkdir(parents=True, exist_ok=True)
            for kind, part in parts:
                write_whole(_path(folder, kind, part, name), _compressed(parts.columns(kind, part)))
        barrier()
    if first:
        with writing(folder):
            write_whole(folder / PREDICTIONS, _compressed(arrays))
            for path in below.glob("*.npz"):
                if "parts" not in arrays or path.name.split(".")[1] != name:
                    path.unlink()


def _path(folder: Path, kind: Kind, part: int, name: str) -> Path:
    return folder / FOLDER / f"{kind}-{part:06d}.{name}.npz"


def _compressed(arrays: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    return content.getvalue()


def load_predictions(folder: Path) -> dict[Kind, tuple[Ids, Ids, Ids]]:
    """uid, target (-1: unknown) and prediction [N] of every kind that has any, sorted by uid; raises RunError."""
    path = folder / PREDICTIONS
    found: dict[Kind, tuple[Ids, Ids, Ids]] = {}
    try:
        with _arrays(path) as arrays:
            for kind in KINDS:
                if f"{kind}_uid" in arrays:
                    found[kind] = _checked([arrays[f"{kind}_{name}"] for name in NAMES])
                elif f"{kind}_parts" in arrays:
                    name, number = _parts_of(arrays["parts"], arrays[f"{kind}_parts"])
                    parts = []
                    for part in range(number):
                        path = _path(folder, kind, part, name)
                        with _arrays(path) as columns:
                            parts.append(_checked([columns[column] for column in NAMES]))
                    uid, target, prediction = (np.concatenate(column) for column in zip(*parts, strict=True))
                    found[kind] = uid, target, prediction
    except FileNotFoundError:
        raise RunError(f"{path} is not there: `sptnet eval {folder}` writes it") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} is damaged ({reason}): `sptnet eval {folder}` writes it again") from None
    if not any(len(columns[0]) for columns in found.values()):
        raise RunError(f"{path} has no prediction: `sptnet eval {folder}` writes it again")
    return {kind: columns for kind, columns in found.items() if len(columns[0])}


@contextmanager
def _arrays(path: Path) -> Iterator[Any]:
    """Raises OSError, and ValueError for anything that is no such file."""
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if (size := sum(member.file_size for member in arrays.zip.infolist())) > LARGEST:
                    raise ValueError(f"it would have {size:,} bytes")
                yield arrays
        except (OSError, ValueError):
            raise
        except Exception as error:  # numpy, zipfile, zlib and tokenize raise whatever damage makes of a file
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _parts_of(name: NDArray[Any], number: NDArray[Any]) -> tuple[str, int]:
    """Name and number of the parts. Raises ValueError."""
    if name.dtype.kind != "S" or name.ndim or number.dtype.kind not in "iu" or number.ndim:
        raise ValueError("it names no parts")
    told, count = name.item().decode("ascii"), int(number)
    if not PARTS.fullmatch(told) or not 0 < count <= MOST_PARTS:
        raise ValueError("it names no parts")
    return told, count


def _checked(columns: Sequence[NDArray[Any]]) -> tuple[Ids, Ids, Ids]:
    for column, highest in zip(columns, HIGHEST, strict=True):
        if column.ndim != 1 or len(column) != len(columns[0]) or not np.issubdtype(column.dtype, np.integer):
            raise ValueError(f"a column is {column.dtype} {list(column.shape)} beside {len(columns[0])} uids")
        if len(column) and column.max() > highest:
            raise ValueError(f"class {column.max()}")
    uid, target, prediction = (column.astype(np.int64) for column in columns)
    return uid, target, prediction
