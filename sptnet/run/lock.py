"""One process at a time trains in a run's folder: a lock of the filesystem, and, where that may not do, a lease.

`flock` is gone when its process is; tried on ext4 and tmpfs, on one machine. Some filesystems have none, and on those
that nodes share it may hold on one node only (BeeGFS unless told otherwise, Lustre's `localflock`, NFS's `nolock`).
There a lease is taken too, which was tried with a `flock` that refuses, and with one that always succeeds: `run.lease`
names job, host and process and is written again every ten seconds. One that stands still for a minute and a half, or is
of an earlier start of the same Slurm job, or of a process of this machine that has ended, is taken over.
"""

import errno
import fcntl
import json
import os
import secrets
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

from sptnet.data.format.files import read_regular, write_whole
from sptnet.data.format.temporary import Writer, machine
from sptnet.data.locks import NO_FLOCK, network_file_system
from sptnet.run.folder import OccupiedError, writing
from sptnet.run.records import LARGEST

LOCK, LEASE = "run.lock", "run.lease"
WAY_OUT = "stop it, or choose another folder"
BEAT, PATIENCE = 10.0, 90.0  # seconds; a client of NFS may show for 60 what was there before


class RunLock:
    """Makes a run's folder, and keeps others from training in it until `release`.

    Raises:
        OccupiedError: another process trains there, perhaps one whose launcher was killed.
        RunError: the folder cannot be made.
    """

    def __init__(self, folder: Path):
        self.folder, self._lease = folder, folder / LEASE
        self._descriptor: int | None = None
        self._beating: threading.Thread | None = None
        self._stop = threading.Event()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                    raise OccupiedError(f"{folder} is being trained by another process: {WAY_OUT}") from None
                if error.errno not in NO_FLOCK:
                    raise
                self._take_lease()
            else:
                self._descriptor = descriptor
                if network_file_system(folder):
                    try:
                        self._take_lease()
                    except BaseException:
                        self.forget()
                        raise
            _let_go_in_children(self)

    def release(self) -> None:
        """Let others train there."""
        if self._beating is not None:
            self._stop.set()
            self._beating.join()
            self._beating = None
            with suppress(OSError):
                if (self._read() or {}).get("token") == self._mine["token"]:
                    self._lease.unlink()
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Close the file without letting others train there, where another process still holds it, or its lease."""
        self._beating = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()

    def _take_lease(self) -> None:
        self._mine = {
            "job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "host": os.uname().nodename, "machine": machine(), "process": os.getpid(), "token": secrets.token_hex(8),
        }  # fmt: skip
        end = time.monotonic() + PATIENCE
        seen = self._read()
        if seen is not None and not self._is_over(seen):
            told = f"{self.folder}: looking for up to {PATIENCE:g} s whether another process trains there ({LEASE})"
            print(told, file=sys.stderr, flush=True)
        while seen is not None and not self._is_over(seen):
            time.sleep(min(1.0, PATIENCE / 10))
            now = self._read()
            if now is not None and now != seen:
                raise OccupiedError(
                    f"{self.folder} is being trained by process {now.get('process')} on {now.get('host')}: {WAY_OUT}"
                )
            if now is None or time.monotonic() > end:
                break
        if seen is not None:
            self._remove(seen)
        try:
            os.close(os.open(self._lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            raise OccupiedError(f"{self.folder} is being trained by another process: {WAY_OUT}") from None
        self._write(0)
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beating.start()

    def _remove(self, seen: dict[str, object]) -> None:
        """Remove the lease that was seen to stand still, of several that come at once one; raises OccupiedError."""
        stale = self._lease.with_name(f"{LEASE}.{self._mine['token']}")
        with suppress(FileNotFoundError):
            self._lease.rename(stale)
            if self._read(stale) != seen:  # another had removed it before, and this one is its own
                with suppress(OSError):  # there again, or no links here: its owner writes it at its next beat
                    os.link(stale, self._lease)
                stale.unlink()
                raise OccupiedError(f"{self.folder} is being trained by another process: {WAY_OUT}")
            stale.unlink()

    def _is_over(self, lease: dict[str, object]) -> bool:
        """Whether its holder has ended for certain."""
        same_job = self._mine["job"] is not None and lease.get("job") == self._mine["job"]
        host, process = lease.get("machine"), lease.get("process")
        dead = isinstance(host, str) and isinstance(process, int) and Writer(LEASE, "", host, process).is_dead()
        return dead or (same_job and lease.get("restart") != self._mine["restart"])

    def _read(self, path: Path | None = None) -> dict[str, object] | None:
        try:
            found = json.loads(read_regular(path or self._lease, LARGEST))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}  # being created
        return found if isinstance(found, dict) else {}

    def _write(self, beat: int) -> None:
        write_whole(self._lease, json.dumps(self._mine | {"beat": beat}).encode())

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT):
            beat += 1
            with suppress(OSError):  # a disk that fails for a moment; the next beat may find it
                held = self._read()
                if held and held.get("token") != self._mine["token"]:
                    print(f"error: {self.folder} was taken over by {held.get('host')}", file=sys.stderr, flush=True)
                    os._exit(1)  # nothing more may be written there
                self._write(beat)


def _let_go_in_children(lock: RunLock) -> None:
    """Forked processes do not keep the lock: loader workers outlive a killed run by seconds, and it begins again."""
    held = weakref.ref(lock)

    def forget() -> None:
        if (mine := held()) is not None:
            mine.forget()

    os.register_at_fork(after_in_child=forget)
