"""Tables as files: CSV or Parquet, from columns.

A table is a mapping of column names to columns of equal length: lists of str, or arrays. `pandas.DataFrame(table)`
takes it as it is.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sptnet.errors import SptnetError

Table = dict[str, Any]  # name -> list of str, or array [n] or, in Parquet only, [n, D]
TableFormat = Literal["csv", "parquet"]
DIGITS = 6  # behind the point, in CSV


class TableError(SptnetError, ValueError):
    """A format that cannot be written here."""

    on_all_ranks = True


def check_format(table_format: TableFormat) -> None:
    """Raise TableError where what a format needs is not installed."""
    if table_format == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise TableError(
                "--format parquet needs pyarrow (in the checkout: pip install -c constraints.txt -e '.[parquet]')"
            ) from None


def encode_table(table: Mapping[str, Any], table_format: TableFormat) -> bytes:
    """The content of a file; text that is no UTF-8 keeps its bytes in CSV, and is told by backslashes in Parquet."""
    return encode_parquet(table) if table_format == "parquet" else encode_csv(table)


def encode_csv(table: Mapping[str, Any]) -> bytes:
    """A header and a row each, quoted where need be; a text may hold commas, quotes and newlines."""
    rows = [list(table), *zip(*(_as_text(column) for column in table.values()), strict=True)]
    return encode_rows(rows)


def encode_rows(rows: Iterable[Sequence[object]]) -> bytes:
    """CSV whose rows end with a newline, quoted where need be."""
    written = io.StringIO(newline="")
    csv.writer(_NewlineEnds(written)).writerows(rows)
    return written.getvalue().encode(errors="surrogateescape")


class _NewlineEnds:
    """Python quotes the characters that end its rows, before 3.13 no others: they end with both, here with one."""

    def __init__(self, out: io.StringIO):
        self._out = out

    def write(self, row: str) -> int:
        return self._out.write(f"{row.removesuffix(chr(13) + chr(10))}\n")


def _as_text(column: Sequence[str] | NDArray[Any]) -> Sequence[str]:
    if not isinstance(column, np.ndarray):
        return column
    if np.issubdtype(column.dtype, np.floating):
        return [f"{value:.{DIGITS}f}" for value in column.tolist()]
    return [str(value) for value in column.tolist()]


def encode_parquet(table: Mapping[str, Any]) -> bytes:
    """One row group; a column [n, D] becomes lists of D."""
    import pyarrow
    from pyarrow import parquet

    columns = {}
    for name, column in table.items():
        if not isinstance(column, np.ndarray):
            columns[name] = pyarrow.array(
                [v.encode(errors="backslashreplace").decode() for v in column], pyarrow.string()
            )
        elif column.ndim == 2:
            columns[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(column.ravel()), column.shape[1])
        else:
            columns[name] = pyarrow.array(column)
    written = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), written)
    return written.getvalue().to_pybytes()


def count_rows(path: Path, table_format: TableFormat) -> int:
    """Rows of a table's file, without its header; a text in it may hold newlines.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read, or is none.
    """
    if table_format == "parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(path).num_rows)
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return sum(1 for _ in csv.reader(file, strict=True)) - 1
