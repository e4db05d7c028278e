"""MATLAB files, read in a process of their own: scipy's reader can crash, or ask for memory without end.

A file of a few kB, compressed in itself, can nest its arrays so deep that the interpreter dies. So it is read by a
child with limits on memory and time, which hands plain columns back as JSON; a child that dies is a damaged file.
"""

import faulthandler
import io
import json
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from sptnet.data.format.files import read_regular

LARGEST_MAT = 2**24  # bytes; the devkits' have less than one million
MEMORY = 2**31  # bytes beyond what the process has already
SECONDS = 60
Columns = dict[str, list[Any]]


class MatError(ValueError):
    """Not the MATLAB file that was meant."""


def read_columns(path: Path, variable: str, fields: tuple[str, ...] = ()) -> Columns:
    """Columns of a structure array, or, without `fields`, the one column "" of an array of texts.

    Raises:
        MatError: not such a file, or one that crashes its reader, or asks for too much memory or time.
        OSError: it cannot be read.
    """
    content = read_regular(path, LARGEST_MAT)
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_read, args=(sending, content, variable, fields))
    child.start()
    sending.close()
    try:
        told = receiving.recv_bytes() if receiving.poll(SECONDS) else b""
    except EOFError:
        told = b""
    finally:
        child.kill()
        child.join()
        receiving.close()
    if not told:
        raise MatError("its reader died or did not end: it is damaged")
    answer = json.loads(told)
    if "fault" in answer:
        raise MatError(answer["fault"])
    columns: Columns = answer["columns"]
    if len({len(column) for column in columns.values()}) != 1:
        raise MatError("its columns differ in length")
    return columns


def _read(sending: Connection, content: bytes, variable: str, fields: tuple[str, ...]) -> None:
    """In the child: nothing that happens here reaches the parent but the bytes that are sent."""
    from scipy.io import loadmat

    faulthandler.disable()  # a crash is expected here, and told by the parent
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, in_use + MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        found = loadmat(io.BytesIO(content), squeeze_me=True)[variable]
        named = {field: found[field] for field in fields} or {"": found}
        columns = {field: np.atleast_1d(column).tolist() for field, column in named.items()}
        answer = json.dumps({"columns": columns})
    except Exception as error:  # scipy's reader raises whatever damage makes of it; the parent tells
        answer = json.dumps({"fault": f"{type(error).__name__}: {error}"})
    sending.send_bytes(answer.encode())
    os._exit(0)
