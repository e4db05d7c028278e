"""The progress of work on shards: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sptnet.data.format.manifest import Shard

LINE_EVERY = 10.0  # seconds, where there is no terminal
ELSEWHERE_EVERY = 60.0  # seconds between two looks at what all tasks have done: a listing of a shared disk
SCAN_LINE_EVERY = 5.0


class Scan:
    """Counts what is looked at before there is anything to convert, and says so every few seconds."""

    def __init__(self, what: str):
        self._what, self._found, self._told = what, 0, time.monotonic()

    def count(self) -> None:
        self._found += 1
        if (now := time.monotonic()) - self._told > SCAN_LINE_EVERY:
            self._told = now
            print(f"scanning: {self._found:,} {self._what}", file=sys.stderr, flush=True)


class ShardProgress:
    """Counts shards, images and bytes; what an earlier conversion did does not count towards the speed."""

    def __init__(self, console: Console):
        self.console = console
        # no thread of its own: worker processes are forked while it is shown
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total} images"), BarColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(), console=console, auto_refresh=False, disable=not console.is_terminal,
        )  # fmt: skip
        self._images = self._done = self._bytes = 0
        self._total = 0
        self._elsewhere: Callable[[], str] | None = None
        self._looked, self._seen = -ELSEWHERE_EVERY, ""
        self._start = self._told = time.monotonic()

    def __enter__(self) -> "ShardProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, shards: int, images: int, elsewhere: Callable[[], str] | None = None) -> None:
        """How much there is to do; `elsewhere` tells how far all tasks are."""
        self._total, self._elsewhere = images, elsewhere
        self._task = self._bar.add_task("shards", total=images, speed=f"{shards} shards")
        self._start = self._told = time.monotonic()

    def advance(self, shard: Shard, continued: bool) -> None:
        """A shard is there, written now or by an earlier conversion."""
        self.add(shard, counts=not continued)

    def add(self, shard: Shard, counts: bool = True) -> None:
        """A shard is done."""
        self._done += shard.samples
        if counts:
            self._images += shard.samples
            self._bytes += shard.bytes
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        speed = f"{self._images / seconds:,.0f} images/s  {self._bytes / seconds / 1e6:,.1f} MB/s"
        if self._elsewhere is not None and (now - self._looked > ELSEWHERE_EVERY or self._done == self._total):
            self._looked, self._seen = now, self._elsewhere()
        speed = f"{speed}  {self._seen}".rstrip()
        self._bar.update(self._task, completed=self._done, speed=speed)
        self._bar.refresh()
        if not self.console.is_terminal and (now - self._told > LINE_EVERY or self._done == self._total):
            self._told = now
            self.console.print(Text(f"{self._done}/{self._total} images  {speed}"))
