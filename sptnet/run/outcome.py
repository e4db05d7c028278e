"""How a run fails: what is told of a failed step, and what a process leaves for whoever started it.

A launcher reports every exit code but 0 as 1.

Where the environment variable SPTNET_OUTCOME names a folder, on a shared disk, every rank leaves a file `rank-N` there:

    continue: asked to stop      a checkpoint is written
    retry: WHY                   something was lost that may be there next time: a peer, the network, a disk
    final: WHY                   trying again changes nothing: a mistake in configuration or data, a full disk, a bug
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sptnet.errors import Outcome, SptnetError

log = logging.getLogger(__name__)

# what a disk says that somebody must see to: it is full, or may not be written
STAYING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


def record_outcome(outcome: Outcome, why: str) -> None:
    """Leave a rank's outcome, one line."""
    folder = os.environ.get("SPTNET_OUTCOME")
    if folder:
        with suppress(OSError):  # a full disk, perhaps the very reason
            Path(folder, f"rank-{os.environ.get('RANK', '0')}").write_text(f"{outcome}: {' '.join(why.split())}\n")


def outcome_of(error: Exception) -> Outcome:
    """What an exception makes of a run: torch's collectives and drivers raise RuntimeErrors, disks OSErrors."""
    if isinstance(error, SptnetError):
        return error.outcome
    final = isinstance(error, NotImplementedError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return "retry" if isinstance(error, RuntimeError | OSError) and not final else "final"


@contextmanager
def log_failed_step(phase: str, step: int) -> Iterator[None]:
    """Say on which rank, in which phase and at which step a RuntimeError came; torch's collectives raise no other."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SptnetError):
            raise  # it says itself what is wrong
        reason = str(error).partition("\n")[0]
        log.error(
            "rank %d: failed in the %s phase at step %d: %s. The last checkpoint stays; if a connection was closed or "
            "timed out, another rank is gone or hangs: the launcher's summary names the first that ended",
            int(os.environ.get("RANK", "0")), phase, step, reason,
        )  # fmt: skip
        raise
