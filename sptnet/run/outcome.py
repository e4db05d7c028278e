"""How a run fails: what is told of a failed step, and what a process leaves for whoever started it.

A launcher reports every exit code but 0 as 1.

Where the environment variable SPTNET_OUTCOME names a folder, on a shared disk, every rank leaves a file `rank-N` there:

    continue: WHAT IS KEPT       it was asked to stop, and wrote a checkpoint, or has made a part of its tokens
    retry: WHY                   something was lost that may be there next time: a peer, the network, a disk
    final: WHY                   trying again changes nothing: a mistake in configuration or data, a full disk, a bug
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sptnet.errors import Outcome, SptnetError, outcome_of_writing

log = logging.getLogger(__name__)


def record_outcome(outcome: Outcome, why: str) -> None:
    """Leave a rank's outcome, one line."""
    folder = os.environ.get("SPTNET_OUTCOME")
    if folder:
        with suppress(OSError):  # a full disk, perhaps the very reason
            Path(folder, f"rank-{os.environ.get('RANK', '0')}").write_text(f"{outcome}: {' '.join(why.split())}\n")


# what torch and the system say in exceptions of no class of their own: words, what is told, and the outcome
KNOWN: tuple[tuple[tuple[str, ...], str, Outcome], ...] = (
    (("OutOfMemoryError", "can't allocate memory", "MemoryError", "out of memory", "ALLOC_FAILED",
      "could not create a primitive", "bad_alloc"),
     "out of memory: in training raise memory.micro_batches or memory.gradient_checkpointing, elsewhere lower "
     "evaluate.batch_size (of a trained run in its config.yaml)", "final"),
    (("can't start new thread",),
     "no more processes and threads are allowed to this user: raise `ulimit -u`, or have fewer workers", "final"),
    (("no kernel image is available",),
     "this build of torch has no kernels for this GPU, which is too old, or too new, for it", "final"),
    (("unable to allocate shared memory", "unable to write to file </torch_", "signal: Bus error"),
     "the shared memory of this machine (/dev/shm) is full: enlarge it, or set data.workers=0", "final"),
    (("DataLoader worker",),
     "a loader worker was killed, perhaps for want of memory: have fewer of them (data.workers, --workers)", "retry"),
    (("DistBackendError", "DistNetworkError", "DistStoreError", "Connection closed by peer", "Connection reset by peer",
      "gloo/transport", "Timed out waiting", "NCCL error", "Broken pipe", "wait timeout"),
     "another rank is gone or hangs (the launcher's summary names the first that ended)", "retry"),
    (("InductorError", "BackendCompilerFailed", "torch._dynamo", "torch._inductor"),
     "torch.compile failed: set compile=false, or give it the compiler that it asks for", "final"),
    (("AcceleratorError", "CUDA error", "cuDNN error", "CUDA driver"), "the GPU failed", "retry"),
    (("EADDRINUSE", "address already in use", "Address already in use"),
     "the port of the process group is in use: choose another by --main_process_port", "retry"),
)  # fmt: skip


def explain(error: Exception) -> tuple[str, Outcome] | None:
    """What an exception of torch or the system means, as a sentence, and its outcome; None for a bug of ours."""
    reason = " ".join(str(error).partition("\n")[0].split()).rstrip(".")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", outcome_of_writing(error)
    if not isinstance(error, RuntimeError | MemoryError | OSError):
        return None
    if reason.startswith("Symlink loop from "):  # of Path.resolve, before Python 3.13
        return f"{reason.partition(' from ')[2]}: a link that leads back to itself", "final"
    said = f"{type(error).__name__}: {error}"
    for words, told, outcome in KNOWN:
        if any(word in said for word in words):
            return f"{told}: {reason}" if reason else told, outcome
    return None


def outcome_of(error: Exception) -> Outcome:
    """What an exception makes of a run: torch's collectives and drivers raise RuntimeErrors, disks OSErrors."""
    if isinstance(error, SptnetError):
        return error.outcome
    if (explained := explain(error)) is not None:
        return explained[1]
    return (
        "retry" if isinstance(error, RuntimeError | OSError) and not isinstance(error, NotImplementedError) else "final"
    )


class StepError(SptnetError, RuntimeError):
    """A step that a rank could not take, for a reason outside of this code."""


@contextmanager
def naming_step(phase: str, step: int) -> Iterator[None]:
    """Say of what ends a step on which rank, in which phase and at which step it did.

    Raises:
        StepError: for what torch and the system raise; a bug of ours keeps its traceback, below a line in the log.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, SptnetError | BrokenPipeError):
            raise  # it says itself what is wrong
        where = f"rank {os.environ.get('RANK', '0')}: failed in the {phase} phase at step {step}"
        if (explained := explain(error)) is None:
            log.error("%s: %s. The last checkpoint stays", where, str(error).partition("\n")[0])
            raise
        told = StepError(f"{where}: {explained[0]}. The last checkpoint stays")
        raise told.with_outcome(explained[1]) from error
