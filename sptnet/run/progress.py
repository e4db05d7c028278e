"""How far something long is: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY = 15.0  # seconds between two lines of a log


class Progress:
    """Counts one thing after the other, e.g. the images of two splits; only where `active`."""

    def __init__(self, title: str, active: bool = True, console: Console | None = None):
        self.title, self.active = title, active
        self.console = console or Console(stderr=True)
        self._bar = bar_on(self.console) if active and sys.stderr.isatty() else None
        self._tasks: dict[str, TaskID] = {}
        self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of something are done."""
        if self._bar:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total, note="")
            self._bar.update(self._tasks[what], completed=done)
        elif self.active and time.monotonic() - self._told > PLAIN_EVERY:
            self._told = time.monotonic()
            print(f"{self.title}: {what} {done}/{total}", file=sys.stderr, flush=True)

    def of(self, total: Callable[..., int]) -> Callable[..., None]:
        """`advance` for things whose total is known by their name."""
        return lambda what, done: self.advance(what, done, total(what))


def bar_on(console: Console) -> Bar:
    """A bar that leaves room for its numbers, also at 80 columns."""
    return Bar(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True), console=console, expand=True,
    )  # fmt: skip
