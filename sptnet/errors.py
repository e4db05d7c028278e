"""What a user is told instead of a traceback."""

from typing import ClassVar, Literal

Outcome = Literal["continue", "retry", "final"]  # see sptnet/run/outcome.py


class SptnetError(Exception):
    """What a user, a disk, a peer or a file did. `str` is a clear sentence, or a line each: what, where, what to do.

    A bug of ours is any other exception, and keeps its traceback.

    Attributes:
        on_all_ranks: every rank meets it alike, so that rank 0 is enough to tell it.
        outcome: whether trying again may help.
        exit_code: of a process that it ends.
    """

    on_all_ranks: ClassVar[bool] = False
    outcome: Outcome = "final"
    exit_code: ClassVar[int] = 1
