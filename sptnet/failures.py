"""What is told when a step fails that all ranks take together: a rank that is gone, or a collective that hangs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sptnet.collectives import rank

log = logging.getLogger(__name__)


@contextmanager
def told_where(phase: str, step: int) -> Iterator[None]:
    """Say on which rank, in which phase and at which step a RuntimeError came; torch's collectives raise no other."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith("sptnet."):
            raise  # it says itself what is wrong
        reason = str(error).partition("\n")[0]
        log.error(
            "rank %d: failed in the %s phase at step %d: %s. The last checkpoint stays; if a connection was closed or "
            "timed out, another rank is gone or hangs: the launcher's summary names the first that ended",
            rank(), phase, step, reason,
        )  # fmt: skip
        raise
