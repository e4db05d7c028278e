"""Results in parts: each whole or absent, made by whichever process it falls to, and not made again.

A folder of parts begins with a small JSON file that says what they are of. Whoever finds it there with the same content
goes on where it stands; with another content the folder is refused, so that old results never pass for new ones.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sptnet.data.format.files import write_whole
from sptnet.data.format.temporary import remove_leftovers, writer_of
from sptnet.errors import SptnetError, in_the_way, outcome_of_writing
from sptnet.run.records import DamagedError, read_json

# in such a file: by what path a model was named; which one it is the digests of its parts say, and the one of its head
# is not in files of earlier versions
SOURCE, HEAD = "source", "head"


class PartsError(SptnetError, OSError):
    """Results that cannot be written, or a folder that holds others."""


@contextmanager
def writing_parts(path: Path) -> Iterator[None]:
    """Turn an OSError into a PartsError that names the path; raised by whichever rank meets it."""
    try:
        yield
    except PartsError:
        raise
    except OSError as error:
        where = in_the_way(error, path)
        told = PartsError(
            f"{where} cannot be written: {error.strerror or error}; what was finished stays, the same command goes on"
        )
        raise told.with_outcome(outcome_of_writing(error)) from error


@contextmanager
def putting_aside() -> Iterator[None]:
    """As `writing_parts`, for what may go to a temporary file: nobody needs one while all is in memory."""
    try:
        yield
    except OSError as error:
        with writing_parts(Path(error.filename or tempfile.gettempdir())):
            raise


def write_part(path: Path, content: bytes) -> None:
    """Write one part. Raises PartsError."""
    with writing_parts(path):
        write_whole(path, content)


def begin_parts(path: Path, says: dict[str, Any]) -> None:
    """Write the file that says what a folder's parts are of, or check that it says the same.

    Raises:
        PartsError: the folder holds other results, or cannot be written.
    """
    with writing_parts(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        if not path.exists():
            others = [entry for entry in path.parent.iterdir() if writer_of(entry.name) is None]
            if others and not path.exists():  # a twin, where the disk has no locks, has begun it or is about to
                raise PartsError(f"{path.parent} is not empty and lacks {path.name}: choose another folder")
            write_whole(path, (json.dumps(says, indent=1) + "\n").encode())
            return
        try:
            found = read_json(path, dict[str, Any])
        except DamagedError as error:
            raise PartsError(
                f"{path} is damaged ({error}), and says what is in its folder: put it back, or choose another folder"
            ) from None
    says = json.loads(json.dumps(says))
    passed_over = HEAD if HEAD in says and HEAD not in found else SOURCE
    odd = [key for key in sorted({*found, *says} - {passed_over}) if found.get(key) != says.get(key)]
    if odd:
        shown = ", ".join(f"{key}: {found.get(key)!s:.40} there, {says.get(key)!s:.40} here" for key in odd[:3])
        raise PartsError(f"{path.parent} holds results of something else ({shown}): remove it or choose another folder")
