"""Names of files that are being written: by whom, so that what a process left is removed when it has ended."""

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

DAY = 86_400  # seconds after which a temporary file is nobody's any more
TEMPORARY = re.compile(r"\.?(.+)\.([\w-]{1,16})\.([0-9a-f]{8})\.(\d{1,10})\.[0-9a-f]{8}\.tmp")
BOOT, NAMESPACE = "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"


class Writer(NamedTuple):
    """Who writes, or wrote, a temporary file: the file that it is to become, the host, its machine and the process."""

    file: str
    host: str
    machine: str
    process: int

    def is_dead(self) -> bool:
        """Whether it is a process of this machine that has ended; of other machines nobody can tell."""
        if not self.machine.strip("0") or self.machine != machine():
            return False
        try:
            os.kill(self.process, 0)  # /proc may hide what is another user's
            state = Path(f"/proc/{self.process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except (OSError, OverflowError, IndexError):
            return False
        return state in ("Z", "X")  # it has ended, and nobody has asked how


@cache
def machine() -> str:
    """Eight digits of a name for this boot of this machine, and for its process ids: containers may share a host name.

    Zeros where the system does not tell: then no process is known to have ended.
    """
    try:
        boot, namespace = Path(BOOT).read_bytes(), os.stat(NAMESPACE).st_ino
    except OSError:
        return "0" * 8
    return hashlib.sha256(boot + b"%d" % namespace).hexdigest()[:8]


def host() -> str:
    """The name of this host, as temporary names hold it."""
    return re.sub(r"[^\w-]", "-", socket.gethostname().partition(".")[0], flags=re.ASCII)[:16] or "host"


def temporary_of(path: Path) -> Path:
    """A name beside a path that no other process has, on this host or another one that sees the same disk.

    Hidden: what reads all files of a folder, as pyarrow does, passes it over.
    """
    return path.with_name(f".{path.name}.{host()}.{machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def writer_of(name: str) -> Writer | None:
    """Who has made a temporary name; None if it is none of `temporary_of`."""
    found = TEMPORARY.fullmatch(name)
    return None if found is None else Writer(found[1], found[2], found[3], int(found[4]))


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes that ended on this machine, and any older than a day."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        if (writer := writer_of(name)) is None:
            continue
        with suppress(OSError):
            if writer.is_dead() or time.time() - os.lstat(folder / name).st_mtime > DAY:
                path = Path(folder, name)
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
