"""What may be wrong with a dataset: a fault of its files, of one sample, or a disk that cannot be reached now."""

from sptnet.errors import Outcome, SptnetError, outcome_of_reading


class DatasetError(SptnetError, ValueError):
    """A dataset that cannot be read as one; the message names the file."""


class DamagedSampleError(DatasetError):
    """One sample that is not what it was; the others of its shard may be."""


def undecodable(where: str, uid: int, why: str, path: str = "") -> str:
    """What is told of a sample that does not decode, in which tar, and what to do; `path`: in the source, if known."""
    named = f", {path}," if path else ""
    return (
        f"{where}: sample {uid}{named} does not decode ({why}): make the shards again, in another folder, with "
        "--on-error skip, which leaves it out"
    )


class UnreachableError(DatasetError):
    """Shards that could not be read now, and perhaps can later: a network or a disk that fails."""

    outcome: Outcome = "retry"


def unreadable(told: str, error: OSError) -> DatasetError:
    """What to raise for a file that cannot be read: UnreachableError where its disk may be better later."""
    kind = DatasetError if outcome_of_reading(error) == "final" else UnreachableError
    return kind(f"{told}: {error.strerror or error}")
