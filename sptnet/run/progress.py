"""How far something long is: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY = 15.0  # seconds between two lines of a log


class _WithBar:
    """Shows its bar, where there is a terminal, while it is entered."""

    bar: Bar | None

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()


class Progress(_WithBar):
    """Counts one thing after the other, e.g. the images of two splits; only where `active`.

    Args:
        title: what a line of a log begins with.
        say: how a line of a log is told; printed on stderr otherwise.

    Attributes:
        bar: the bar, where there is a terminal.
    """

    def __init__(
        self,
        title: str,
        active: bool = True,
        console: Console | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.title, self.active = title, active
        self.bar = bar_on(console or Console(stderr=True)) if active and sys.stderr.isatty() else None
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._tasks: dict[str, TaskID] = {}
        self._told = time.monotonic()

    def advance(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of something are done; once all are, its bar goes away."""
        if self.bar:
            if what not in self._tasks:
                self._tasks[what] = self.bar.add_task(what, total=total, note="")
            self.bar.update(self._tasks[what], completed=done)
            if done >= total:
                self.bar.remove_task(self._tasks.pop(what))
        elif self.active and time.monotonic() - self._told > PLAIN_EVERY:
            self._told = time.monotonic()
            self._say(f"{self.title}: {what} {done}/{total}")

    def say(self, line: str) -> None:
        """A line beside the bar, or of a log."""
        if self.bar:
            self.bar.console.print(line, highlight=False)
        elif self.active:
            self._say(line)

    def of(self, total: Callable[..., int]) -> Callable[..., None]:
        """`advance` for things whose total is known by their name."""
        return lambda what, done: self.advance(what, done, total(what))


class Speed(_WithBar):
    """How many of many things are done, and how fast: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, total: int, active: bool, unit: str = "images"):
        self.total, self.unit, self.done = total, unit, 0
        self.console = Console(stderr=True, quiet=not active, soft_wrap=not sys.stderr.isatty())
        self.bar = bar_on(self.console) if active and sys.stderr.isatty() else None
        if self.bar:
            self._task = self.bar.add_task(unit, total=total, note="")
        self._start = self._told = time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        speed = f"{self.done / max(now - self._start, 1e-9):,.1f} {self.unit}/s"
        if self.bar:
            self.bar.update(self._task, completed=self.done, note=speed)
        elif now - self._told > PLAIN_EVERY:
            self._told = now
            self.console.print(f"{self.done}/{self.total} {self.unit}  {speed}", highlight=False)


def bar_on(console: Console) -> Bar:
    """A bar that leaves room for its numbers, also at 80 columns."""
    return Bar(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True), console=console, expand=True,
    )  # fmt: skip
