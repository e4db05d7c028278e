"""How a process ended, for whoever started it: a launcher reports every code but 0 as 1.

Where the environment variable SPTNET_OUTCOME names a folder, on a shared disk, every rank leaves a file `rank-N` there:

    continue: asked to stop      a checkpoint is written
    retry: WHY                   something was lost that may be there next time: a peer, the network, a disk
    final: WHY                   trying again changes nothing: a mistake in configuration or data, a full disk, a bug
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from torch import OutOfMemoryError

from sptnet.data.manifest import UnreachableError
from sptnet.run_folder import OccupiedError, RunError

# what a disk says that somebody must see to: it is full, or may not be written
STAYING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
Outcome = Literal["continue", "retry", "final"]


def note(outcome: Outcome, why: str) -> None:
    """Leave a rank's outcome, one line."""
    folder = os.environ.get("SPTNET_OUTCOME")
    if folder:
        with suppress(OSError):  # a full disk, perhaps the very reason
            Path(folder, f"rank-{os.environ.get('RANK', '0')}").write_text(f"{outcome}: {' '.join(why.split())}\n")


def outcome_of(error: Exception) -> Outcome:
    """What an exception makes of a run: torch's collectives and drivers raise RuntimeErrors, disks OSErrors."""
    disk = error.__cause__ if isinstance(error, RunError) else None
    if isinstance(error, UnreachableError | OccupiedError) or (isinstance(disk, OSError) and disk.errno not in STAYING):
        return "retry"
    own = type(error).__module__.startswith("sptnet.")  # a mistake that was recognised
    final = own or isinstance(error, OutOfMemoryError | NotImplementedError)
    return "retry" if isinstance(error, RuntimeError | OSError) and not final else "final"
