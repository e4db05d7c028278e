"""What a user is told instead of a traceback."""

import errno
import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, Self

Outcome = Literal["continue", "retry", "final"]  # see sptnet/run/outcome.py
# what a disk says that somebody must see to: it is full, or may not be written, or something is in the way
STAYING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
           errno.EEXIST}  # fmt: skip
# and of a file that is to be read: it is not there, or is none
OF_THE_FILE = STAYING | {errno.ENOENT, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG}


def in_the_way(error: OSError, path: Path) -> object:
    """What could not be written: of what lies in the folder `path` the file, else `path` itself."""
    below = isinstance(error.filename, str) and Path(error.filename).is_relative_to(path)
    return error.filename if below else path


def outcome_of_writing(error: OSError) -> Outcome:
    """Final where somebody must see to the disk, retry where it may be better later."""
    return "final" if error.errno in STAYING else "retry"


def outcome_of_reading(error: OSError) -> Outcome:
    """Final where the file is not there or is none, retry where its disk may be better later."""
    return "final" if error.errno in OF_THE_FILE else "retry"


def visible(line: str) -> str:
    """A line as a terminal may have it: control characters, marks of direction and bytes that are no text written out.

    Paths, URLs, names of files and words of servers are in most of what is told, and may hold any of them.
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in line)


def print_any_text() -> None:
    """Let both streams write out what their encoding lacks: a path is told in whatever the terminal can print."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def on_linux_only() -> None:
    """End the process elsewhere: processes, locks and disks are asked what other systems do not know."""
    if sys.platform != "linux":
        sys.exit(f"error: sptnet runs on Linux, not on {sys.platform}; on Windows use WSL, on a Mac a virtual machine")


def in_a_folder_only() -> None:
    """End the process where its working folder was removed: torch could not be loaded, and blame its installation."""
    try:
        os.getcwd()
    except OSError as error:
        sys.exit(f"error: the working folder cannot be found ({error.strerror}): change to one that is there")


@contextmanager
def ctrl_c_just_ends_it() -> Iterator[None]:
    """While packages are imported, which takes seconds: they would answer a Ctrl-C with a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


TO_BE_CONTINUED = 75  # exit code of what was asked to stop: os.EX_TEMPFAIL, where there is one


class SptnetError(Exception):
    """What a user, a disk, a peer or a file did. `str` is a clear sentence, or a line each: what, where, what to do.

    Whatever it was made of, `str` can be printed.

    A bug of ours is any other exception, and keeps its traceback.

    Attributes:
        on_all_ranks: every rank meets it alike, so that rank 0 is enough to tell it.
        outcome: whether trying again may help.
        exit_code: of a process that it ends.
    """

    on_all_ranks: ClassVar[bool] = False
    outcome: Outcome = "final"
    exit_code: ClassVar[int] = 1

    def with_outcome(self, outcome: Outcome) -> Self:
        """This error, with another outcome than those of its kind have."""
        self.outcome = outcome
        return self

    def __str__(self) -> str:
        return "\n".join(map(visible, super().__str__().split("\n")))
