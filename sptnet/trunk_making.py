"""The tokens of known views, made: by any number of processes of any number of runs, which write the same files.

A part is the tokens of one shard, made whole by one process in blocks of fixed size, before a strategy wraps the model
and without collectives. Whoever finds a part that nobody makes, makes it; the others' are waited for.
"""

import errno
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from rich.text import Text
from torch import Tensor

from sptnet.config import Config
from sptnet.data.blocks import Block, ShardSource, blocks
from sptnet.data.format.faults import DatasetError, undecodable
from sptnet.data.format.manifest import Kind
from sptnet.data.locks import NO_FLOCK, lock_at
from sptnet.data.storage.store import Store
from sptnet.data.tokens import PartWriter, part_path
from sptnet.errors import visible
from sptnet.method.model import PromptedViT
from sptnet.run.parts import PartsError, writing_parts
from sptnet.run.progress import Speed
from sptnet.strategy.collectives import rank, world_size
from sptnet.strategy.launcher import launcher_store
from sptnet.trunk_cache import BLOCK, TYPES, TrunkCache, trunk_on

POLL, LONGEST_POLL = 0.2, 5.0  # seconds between looks at what others make; longer the longer nothing happens
MOST_WAITING = 86_400.0  # seconds that nothing may happen before a process gives up on the others
TRAINING: tuple[Kind, ...] = ("labelled", "unlabelled")


def make(
    cache: TrunkCache, config: Config, store: Store, model: PromptedViT, device: torch.device, asked: Callable[[], bool]
) -> str:
    """Make what is missing, and wait until all of it is there for all ranks; all call it. Asked to stop, it returns.

    Returns:
        "", or why this rank gave up: its disk is full, and nobody asked for tokens to be kept there. Then all return.

    Raises:
        PartsError: the cache cannot be written.
        DatasetError: a shard that is missing or damaged as a whole; tokens that float16 cannot hold.
    """
    others = launcher_store("tokens", config.collective_timeout_s) if dist.is_initialized() else None

    def stopped() -> bool:
        if asked() and others is not None:
            others.set("stop", "asked")
        return asked() or (others is not None and others.check(["stop"]))

    views = cache.views_missing
    with Speed(views, active=rank() == 0 and views > 0, unit="views") as progress:
        if rank() == 0 and views:
            progress.console.print(Text(visible(f"trunk cache: {cache.where()}; {cache.cost()}")))
        with trunk_on(model, device, cache.fingerprint["precision"]) as tokens_of:
            for kinds in (TRAINING, ("test",)):
                kind_source = ShardSource(store, [kind for kind in kinds if store.manifest.samples(kind)])
                making = _Making(cache, kind_source, tokens_of, config, progress, stopped)
                try:
                    if not making.all_parts():
                        return ""
                except PartsError as error:
                    if config.trunk_cache != "auto" or (reason := _full_disk(error)) is None:
                        raise
                    if others is not None:
                        others.set("stop", "full")
                    return f"{cache.tokens.folder} cannot be written: {reason}; what was made is removed"
    if others is not None:
        others.add("there", 1)
        patience = _Patience()
        while (there := others.add("there", 0)) < world_size() and not stopped():
            patience.wait(there, "the other ranks' trunk caches")
    return ""


def _full_disk(error: PartsError) -> str | None:
    """What the system says of a disk that is full; None of other errors."""
    cause = error.__cause__
    return cause.strerror if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) else None


class _Patience:
    """Waits for others a moment at a time, for as long as they get on."""

    def __init__(self) -> None:
        self._reached, self._since = -1, time.monotonic()

    def wait(self, reached: int, what: str) -> None:
        """Wait a moment; `reached` is another number whenever the others have got on. Raises PartsError."""
        if reached != self._reached:
            self._reached, self._since = reached, time.monotonic()
        if time.monotonic() - self._since > MOST_WAITING:
            raise PartsError(f"{what} did not come within {timedelta(seconds=MOST_WAITING)}")
        time.sleep(min(LONGEST_POLL, max(POLL, (time.monotonic() - self._since) / 10)))


class _Making:
    """Makes the parts of some kinds; which process makes which part is decided by a lock for each."""

    def __init__(
        self, cache: TrunkCache, source: ShardSource, tokens_of: Callable[[Tensor], Tensor], config: Config,
        progress: Speed, stopped: Callable[[], bool],
    ):  # fmt: skip
        self.tokens, self.source, self.tokens_of, self.config = cache.tokens, source, tokens_of, config
        self.progress, self.stopped = progress, stopped
        self._locks: dict[int, FileLock] = {}

    def path(self, part: int) -> Path:
        return part_path(self.tokens.folder, *self.source.place(part))

    def all_parts(self) -> bool:
        """First this rank's share, then whatever nobody makes, until all are there; False if asked to stop."""
        count, first = len(self.source), rank() * len(self.source) // world_size()
        try:
            if not self._make(range(rank(), count, world_size())):
                return False
            patience = _Patience()
            while missing := self._missing():
                if not self._make([part for part in missing if part >= first] + [p for p in missing if p < first]):
                    return False
                patience.wait(len(missing), str(self.path(missing[0])))
            return True
        finally:
            for part in list(self._locks):
                self._release(part)

    def _missing(self) -> list[int]:
        """Numbers of the parts that are not there, by one look at the folder: hundreds of ranks wait and look."""
        with writing_parts(self.tokens.folder):
            there = set(os.listdir(self.tokens.folder))
        return [part for part in range(len(self.source)) if self.path(part).name not in there]

    def _wanted(self, part: int) -> bool:
        """Whether this process is to make a part: it is missing, and nobody else makes it."""
        if part in self._locks:
            return True
        if self.path(part).exists():
            return False
        lock = lock_at(self.path(part).with_suffix(".lock"))
        with writing_parts(self.tokens.folder):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                return True  # twins write the same bytes under names of their own
            self._locks[part] = lock
            if self.path(part).exists():
                self._release(part)
                return False
        return True

    def _release(self, part: int) -> None:
        if (lock := self._locks.pop(part, None)) is not None:
            lock.release()

    def _make(self, parts: Sequence[int]) -> bool:
        """Those of the parts that are to be made here; False if asked to stop."""
        # before loader processes are forked: who only waits for others would take their cores
        first = next((number for number, part in enumerate(parts) if self._wanted(part)), None)
        if first is None:
            return not self.stopped()
        shape = self.tokens.shape
        known = shape.views if self.source.place(0)[0] != "test" else 0
        writer: PartWriter | None = None
        made = blocks(
            self.source, parts[first:], self._wanted, block_size=BLOCK, augment=self.config.data.augment,
            image_size=self.config.model.image_size, known_views=known, workers=self.config.data.workers,
        )  # fmt: skip
        try:
            for block in made:
                if self.stopped():
                    return False
                kind, path = self.source.place(block.part)[0], self.path(block.part)
                with writing_parts(path):
                    writer = writer or PartWriter(path, shape, shape.rows_of(kind))
                self._add(writer, block, kind)
                if block.begin + len(block.samples) == self.source.size(block.part):
                    with writing_parts(path), writer:
                        writer.finish()
                    self._release(block.part)
                    writer = None
        finally:
            if writer is not None:
                writer.__exit__(None, None, None)
        return True

    def _add(self, writer: PartWriter, block: Block, kind: Kind) -> None:
        """The rows of a block's samples: its known views, and, but for labelled images, the evaluated one."""
        pieces = [] if block.views is None else list(block.views)
        if kind != "labelled":
            pieces.append(block.images)
        # [R, n, T, D] -> [n, R, T, D]
        tokens = torch.stack([self._checked(self.tokens_of(piece), writer) for piece in pieces], 1)
        rows = tokens.to(TYPES[self.tokens.shape.dtype]).numpy()
        with writing_parts(writer.path):
            for sample, of_sample in zip(block.samples, rows, strict=True):
                where = self.source.store.where(self.source.shard(block.part).file)
                told = undecodable(where, sample.uid, sample.error) if sample.error else ""
                writer.add(of_sample, sample.uid, sample.target, told)
        self.progress.add(len(pieces) * len(block.samples))

    def _checked(self, tokens: Tensor, writer: PartWriter) -> Tensor:
        largest = float(tokens.abs().max()) if len(tokens) else 0.0
        if not largest <= torch.finfo(TYPES[self.tokens.shape.dtype]).max:
            raise DatasetError(
                f"{writer.path}: the trunk's tokens reach {largest:.3g}, more than {self.tokens.shape.dtype} holds: "
                "set data.tokens=float32"
            )
        return tokens
