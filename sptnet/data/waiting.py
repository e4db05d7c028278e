"""Says what a run waits for while shards come from afar: a cold start may need hundreds of them for its first batch."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sptnet.data.batches import Batches

PATIENCE, AGAIN = 20.0, 60.0  # seconds until it is said what is waited for, and until it is said again
log = logging.getLogger(__name__)


class Waiting:
    """Tells, from a thread of its own, which part of a batch's shards is in the cache, where it takes long to come."""

    def __init__(self, dataset: Batches, rank: int):
        self._dataset, self._rank = dataset, rank

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Around the wait for a batch; says nothing where nothing has to come."""
        if not self._dataset.store.remote:
            yield
            return
        come = threading.Event()
        threading.Thread(target=self._tell, args=(number, come), name="waiting", daemon=True).start()
        try:
            yield
        finally:
            come.set()

    def _tell(self, number: int, come: threading.Event) -> None:
        begin, wait = time.monotonic(), PATIENCE
        while not come.wait(wait):
            wait = AGAIN
            shards = self._dataset.needs(number)
            here = [shard for shard in shards if self._dataset.store.is_here(shard)]
            log.warning(
                "rank %d has waited %.0f s for batch %d: %d of its %d shards are in the node's cache, %.1f of %.1f GB",
                self._rank, time.monotonic() - begin, number, len(here), len(shards),
                sum(shard.bytes for shard in here) / 1e9, sum(shard.bytes for shard in shards) / 1e9,
            )  # fmt: skip
