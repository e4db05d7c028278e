"""Tokens that enter the first trained block, of every view that is known of every image: written once, read at random.

    FOLDER/tokens.json                       what they are of and by; the folder is named by its digest
    FOLDER/labelled-000003.tokens            [n, V, T, D] float16 or float32, row after row, in the shard's order
    FOLDER/labelled-000003.safetensors       uid [n] and target [n] int64, check [n, V] uint32 (crc32 of every row), and
                                             why rows are absent; written last: a part without it does not exist

Labelled images have the V views that training looks at, unlabelled ones these and the evaluated one behind them, test
images the evaluated one only. Knows no model: the maker is `sptnet/trunk_making.py`.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sptnet.data.format.faults import DamagedSampleError, DatasetError, unreadable
from sptnet.data.format.files import check_regular, create, open_regular, sync_folder, to_disk, write_whole
from sptnet.data.format.manifest import Kind
from sptnet.data.format.temporary import temporary_of
from sptnet.errors import outcome_of_reading

TokenType = Literal["float16", "float32"]
SCHEMA = "sptnet-tokens/1"
FINGERPRINT = "tokens.json"
KEPT_OPEN = 64  # parts


class DamagedTokensError(DatasetError):
    """A row that is not what was written; the part is gone, and the next start makes it again."""

    outcome = "retry"


class AbsentTokensError(DamagedSampleError):
    """A row of an image that could not be decoded when the part was made."""


@dataclass(frozen=True)
class TokenShape:
    """What a row is, and how many there are of an image.

    Attributes:
        views: V, those that training looks at.
        tokens, width: T and D.
    """

    views: int
    tokens: int
    width: int
    dtype: TokenType

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.width * np.dtype(self.dtype).itemsize

    def rows_of(self, kind: Kind) -> int:
        """Rows of an image of a kind."""
        return {"labelled": self.views, "unlabelled": self.views + 1, "test": 1}[kind]

    def evaluated(self, kind: Kind) -> int:
        """Which of them is the evaluated view."""
        return self.rows_of(kind) - 1


def folder_of(root: Path, fingerprint: dict[str, Any]) -> Path:
    """Where the tokens of a fingerprint lie below the folder of a cache."""
    return root.expanduser() / hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def part_path(folder: Path, kind: Kind, number: int) -> Path:
    """The file that makes a part exist; its rows lie beside it."""
    return folder / f"{kind}-{number:06d}.safetensors"


class PartWriter:
    """Writes the part of a shard, row after row; leaving it by an exception leaves nothing.

    Args:
        path: as `part_path` tells it.

    Raises:
        OSError: from every method.
    """

    def __init__(self, path: Path, shape: TokenShape, rows: int):
        self.path, self.shape, self.rows = path, shape, rows
        self._temporary = temporary_of(path.with_suffix(".tokens"))
        self._file = create(self._temporary)
        self._uids: list[int] = []
        self._targets: list[int] = []
        self._checks: list[int] = []
        self._absent: dict[str, str] = {}

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk: what is left in memory is of no use any more
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def add(self, rows: NDArray[Any], uid: int, target: int, error: str) -> None:
        """The rows of the next sample, [rows, T, D]; `error`: why they are none."""
        if error:
            self._absent[str(len(self._uids))] = error
        for row in rows:
            encoded = np.ascontiguousarray(row, self.shape.dtype).data.cast("B")
            self._checks.append(zlib.crc32(encoded))
            self._file.write(encoded)
        self._uids.append(uid)
        self._targets.append(target)

    def finish(self) -> None:
        """Bring all to the disk; from here on the part exists."""
        to_disk(self._file)
        os.replace(self._temporary, self.path.with_suffix(".tokens"))
        arrays: dict[str, NDArray[Any]] = {
            "uid": np.array(self._uids, np.int64),
            "target": np.array(self._targets, np.int64),
            "check": np.array(self._checks, np.uint32).reshape(-1, self.rows),
        }
        told = {"absent": self._absent, "of": _of(self.path, arrays["uid"], arrays["target"])}
        # one entry, since safetensors writes several in any order
        write_whole(self.path, save(arrays, metadata={"part": json.dumps(told)}))
        sync_folder(self.path.parent)


def _of(path: Path, uid: NDArray[Any], target: NDArray[Any]) -> str:
    """Which part of which tokens this is, and a check of whose rows and of what class they are."""
    return f"{path.parent.name}/{path.stem} {zlib.crc32(uid.tobytes() + target.tobytes()):08x}"


def remove_part(path: Path) -> None:
    """Let a part be absent; readers that have it open go on reading it. Raises OSError."""
    path.unlink(missing_ok=True)
    path.with_suffix(".tokens").unlink(missing_ok=True)


class TokenPart:
    """One part, open.

    Attributes:
        uid, target: int64 [n].

    Raises:
        DatasetError: it is not there.
        DamagedTokensError: it is not what was written.
        UnreachableError: its disk fails.
    """

    def __init__(self, path: Path, shape: TokenShape, kind: Kind, samples: int):
        self.path, self.shape, self.rows = path, shape, shape.rows_of(kind)
        try:
            check_regular(path)
            with safe_open(path, "np") as file:
                self.uid, self.target, self._check = (file.get_tensor(name) for name in ("uid", "target", "check"))
                metadata = file.metadata() or {}
            # of an earlier version, which did not say what a part is of
            told = json.loads(metadata["part"]) if "part" in metadata else {"absent": json.loads(metadata["absent"])}
            self._absent: dict[str, str] = told["absent"]
            if told.get("of") not in (None, _of(path, self.uid, self.target)):
                raise ValueError("it is another part, or its columns are not what was written")
            if not isinstance(self._absent, dict) or any(c.dtype.kind not in "iu" for c in self._columns()):
                raise ValueError("it has columns of other types")
            self._descriptor = open_regular(path.with_suffix(".tokens"))
        except FileNotFoundError:
            raise self._damaged("is gone, or its rows are") from None
        except OSError as error:
            raise self._unreadable(error) from None
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise self._damaged(f"cannot be read ({error})") from None
        size, expected = os.fstat(self._descriptor).st_size, samples * self.rows * shape.row_bytes
        if [c.shape for c in self._columns()] != [(samples,), (samples,), (samples, self.rows)]:
            raise self._damaged(f"is not of the {samples} samples of its shard")
        if size != expected:
            raise self._damaged(f"has {size:,} bytes of tokens and should have {expected:,}")

    def _columns(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        return self.uid, self.target, self._check

    def read(self, position: int, row: int, into: NDArray[Any]) -> None:
        """Row `row` of the sample at a position, into an array [T, D] of the stored type.

        Raises:
            AbsentTokensError: the image could not be decoded.
            DamagedTokensError: the row is not what was written.
        """
        if (why := self._absent.get(str(position))) is not None:
            raise AbsentTokensError(f"{self.path}: {why}")
        buffer = into.data.cast("B")
        try:
            read = os.preadv(self._descriptor, [buffer], (position * self.rows + row) * self.shape.row_bytes)
        except OSError as error:
            raise self._unreadable(error) from None
        if read != len(buffer) or zlib.crc32(buffer) != self._check[position, row]:
            raise self._damaged(f"is damaged in row {row} of sample {int(self.uid[position])}")

    def _unreadable(self, error: OSError) -> DatasetError:
        """What a disk that fails says is no proof of damage, and other runs read the same file."""
        if outcome_of_reading(error) == "final":
            return self._damaged(f"cannot be read ({error.strerror or error})")
        return unreadable(f"{self.path} cannot be read", error)

    def _damaged(self, how: str) -> DamagedTokensError:
        try:
            remove_part(self.path)
        except OSError as error:
            told = f"remove it, which cannot be done here ({error.strerror}), and the same command makes it again"
            return DamagedTokensError(f"{self.path} {how}; {told}")
        return DamagedTokensError(f"{self.path} {how}; it is removed, and the same command makes it again")

    def close(self) -> None:
        os.close(self._descriptor)


class Tokens:
    """All parts of a dataset, opened when they are read. Not shared between processes once it has read.

    Args:
        samples: of every shard of every kind, in the manifest's order.
    """

    def __init__(self, folder: Path, shape: TokenShape, samples: dict[Kind, list[int]]):
        self.folder, self.shape, self.samples = folder, shape, samples
        self._open: OrderedDict[tuple[Kind, int], TokenPart] = OrderedDict()

    def part(self, kind: Kind, shard: int) -> TokenPart:
        """Raises DatasetError."""
        key = (kind, shard)
        if key not in self._open:
            path = part_path(self.folder, kind, shard)
            self._open[key] = TokenPart(path, self.shape, kind, self.samples[kind][shard])
            while len(self._open) > KEPT_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        return self._open[key]

    def empty(self, *leading: int) -> NDArray[Any]:
        """Room for rows: [..., T, D]."""
        return np.empty((*leading, self.shape.tokens, self.shape.width), self.shape.dtype)
