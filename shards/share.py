"""Which part of the work is whose: task I of N, said by hand or by Slurm."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")
MOST = 10**6  # tasks
ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT"))


class Share(NamedTuple):
    """Task `task` of `tasks`, counted from 0."""

    task: int
    tasks: int

    def of(self, work: Sequence[T]) -> list[T]:
        """Every `tasks`-th piece."""
        return list(work[self.task :: self.tasks])

    def is_all(self) -> bool:
        return self.tasks == 1


ALONE = Share(0, 1)


def share(text: str, environment: Mapping[str, str] = os.environ) -> Share:
    """An argument I/N with 0 <= I < N, or `auto`: that of a Slurm array which is whole, 0 to N - 1."""
    if text == "auto":
        return _of_slurm(environment)
    task, _, tasks = text.partition("/")
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in (task, tasks)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/16, nor auto")
    if not int(task) < int(tasks) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a task from 0/{tasks} to {max(int(tasks) - 1, 0)}/{tasks}")
    return Share(int(task), int(tasks))


def _of_slurm(environment: Mapping[str, str]) -> Share:
    told = [environment.get(name, "") for name in ARRAY]
    if not all(number.isascii() and number.isdigit() for number in told):
        raise argparse.ArgumentTypeError("auto reads the variables of a Slurm array, and there are none: give I/N")
    task, first, last, count = map(int, told)
    # of --array=3,7 the count is 2, and what part of the whole that is nobody has told us
    if first != 0 or last != count - 1 or not task < count:
        raise argparse.ArgumentTypeError(
            f"auto is for an array from 0 to N - 1, and this one has {count} tasks from {first} to {last}: give I/N"
        )
    return Share(task, count)
