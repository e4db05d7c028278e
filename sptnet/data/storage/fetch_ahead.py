"""Fetches in the background that nobody waits for, least of all a process that ends."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

log = logging.getLogger(__name__)


class FetchAhead:
    """Runs jobs in up to `threads` daemon threads, which end when there is nothing to do.

    Daemons, unlike those of concurrent.futures: at the end of a process Python waits for the latter, and a fetch from
    a server that stalls takes minutes. What a fetch leaves when it is cut off, the cache finds abandoned.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, Callable[[], None]] = OrderedDict()
        self._under_way: set[str] = set()

    def __reduce__(self) -> tuple[type["FetchAhead"], tuple[int]]:
        """Another process gets one that does nothing yet: a loader worker, under any start method."""
        return FetchAhead, (self._threads,)

    def add(self, name: str, job: Callable[[], None]) -> None:
        """Run a job some time, unless one of this name waits or is under way."""
        with self._lock:
            if name in self._waiting or name in self._under_way:
                return
            self._waiting[name] = job
            if len(self._under_way) >= self._threads:
                return
            first, next_job = self._waiting.popitem(last=False)
            self._under_way.add(first)
        threading.Thread(target=self._run, args=(first, next_job), name="fetch-ahead", daemon=True).start()

    def clear(self) -> None:
        """Leave out what has not begun."""
        with self._lock:
            self._waiting.clear()

    def _run(self, name: str, job: Callable[[], None]) -> None:
        while True:
            try:
                job()
            except Exception as error:  # whoever needs the file tries again, and tells
                log.debug("fetching %s ahead failed: %s", name, error)
            with self._lock:
                self._under_way.remove(name)
                if not self._waiting:
                    return
                name, job = self._waiting.popitem(last=False)
                self._under_way.add(name)
