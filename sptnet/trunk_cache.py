"""What a frozen trunk computes of known views, computed once: where it is kept, whether it pays, and how it is made.

The format is in `sptnet/data/tokens.py`. A part is the tokens of one shard, made whole by one process in blocks of
fixed size, before a strategy wraps the model and without collectives: any number of processes of any number of runs
makes the same files. Whoever finds a part that nobody makes, makes it; the others' are waited for.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor

from sptnet.config import Config, ConfigError
from sptnet.data.augment import CROP_RATIO, normalise
from sptnet.data.blocks import Block, ShardSource, blocks
from sptnet.data.cache_room import InUse, make_room
from sptnet.data.manifest import KINDS, DatasetError, Kind
from sptnet.data.store import Store
from sptnet.data.tokens import FINGERPRINT, SCHEMA, PartWriter, Tokens, TokenShape, folder_of, part_path
from sptnet.method.model import PromptedViT
from sptnet.run.parts import ImageProgress, PartsError, begin_parts, writing_parts
from sptnet.strategy.base import DTYPES
from sptnet.strategy.collectives import rank, world_size
from sptnet.strategy.connect import launcher_store
from sptnet.strategy.kernels import kernels_told

DEFAULT = Path("~/.cache/sptnet/tokens")
CODE = 1  # raise it where the tokens of the same views become others
BLOCK = 32  # images of a forward pass, a view at a time; another number may round differently
TRIAL = 8  # images of the forward passes that are timed
PASSES = 4
POLL = 0.2  # seconds between looks at what others make
MOST_WAITING = 86_400.0  # seconds that nothing may happen before a process gives up on the others
TYPES = {"float16": torch.float16, "float32": torch.float32}
TRAINING: tuple[Kind, ...] = ("labelled", "unlabelled")


@dataclass(frozen=True)
class TrunkCache:
    """The tokens of a run, which are not there yet, or only in part.

    Attributes:
        tokens: their reader.
        fingerprint: what they are of and by.
        seconds_per_view: as measured on this machine.
        held: keeps others from removing them.
    """

    tokens: Tokens
    fingerprint: dict[str, Any]
    bytes: int
    missing: int
    views_missing: int
    seconds_per_view: float
    held: InUse

    def where(self) -> str:
        """Which folder, and how large."""
        return f"{self.tokens.folder}, {self.bytes / 1e9:.3f} GB"

    def cost(self) -> str:
        """What making the missing ones takes."""
        minutes = self.views_missing * self.seconds_per_view / 60
        return (
            f"{self.missing / 1e9:.3f} GB to be made, {self.views_missing:,} views at "
            f"{1000 * self.seconds_per_view:.1f} ms, about {minutes:.1f} min of one process"
        )


def stored_type(config: Config, model: PromptedViT) -> torch.dtype | None:
    """To which type the trunk's tokens are rounded in training; None where they are not."""
    if config.data.views is None or config.method != "simgcd" or model.train_from_block == 0:
        return None
    return TYPES[config.data.tokens]


def choose(
    config: Config, store: Store, model: PromptedViT, weights: str, device: torch.device, precision: str, images: int
) -> TrunkCache | str:
    """The cache that a run is to use, or why it uses none; the same on all ranks.

    Args:
        weights: digest of what is frozen.
        images: that the run still looks at, each time it does.

    Raises:
        ConfigError: a folder was asked for that cannot hold the tokens.
    """
    if stored_type(config, model) is None or config.trunk_cache == "off":
        return "none" if config.data.views is None else "none: every view goes through the trunk"
    asked = config.trunk_cache != "auto"
    found = _look(config, store, model, weights, device, precision)
    why = "" if asked else _does_not_pay(found, 2 * images)
    why = why or make_room(found.tokens.folder, found.missing, int(config.trunk_cache_gb * 1e9))
    answers: list[Any] = [why]
    if dist.is_initialized():
        answers = [None] * world_size()
        dist.all_gather_object(answers, why)
    if not (why := next((answer for answer in answers if answer), "")):
        return found
    if asked:
        raise ConfigError(f"trunk_cache {config.trunk_cache}: {why}; choose another disk, or trunk_cache: off")
    return f"none: {why}"


def _look(
    config: Config, store: Store, model: PromptedViT, weights: str, device: torch.device, precision: str
) -> TrunkCache:
    shape, seconds = _try(config, model, device, precision)
    mean, std = model.statistics
    fingerprint = {
        "schema": SCHEMA, "code": CODE, "dataset": store.manifest.digest(), "weights": weights,
        "backbone": config.model.backbone, "options": config.model.backbone_options, "block": model.train_from_block,
        "image_size": model.image_size, "augment": config.data.augment, "crop": CROP_RATIO, "mean": list(mean),
        "std": list(std), "views": shape.views, "dtype": shape.dtype, "precision": precision, "device": device.type,
        "images": BLOCK, **kernels_told(device, config.matmul_precision, config.deterministic),
    }  # fmt: skip
    root = DEFAULT if config.trunk_cache == "auto" else Path(config.trunk_cache)
    folder = folder_of(root, fingerprint)
    with writing_parts(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # other ranks and runs begin it too
            begin_parts(folder / FINGERPRINT, fingerprint)
            held = InUse(folder)
    samples = {kind: store.manifest.of_kind(kind).samples.tolist() for kind in KINDS}
    whole = missing = 0
    for kind, counts in samples.items():
        for number, count in enumerate(counts):
            rows = count * shape.rows_of(kind)
            whole += rows
            missing += 0 if part_path(folder, kind, number).exists() else rows
    of = shape.row_bytes
    return TrunkCache(
        Tokens(folder, shape, samples), fingerprint, whole * of, missing * of, missing, seconds, held
    )  # fmt: skip


def _does_not_pay(found: TrunkCache, views: int) -> str:
    if found.views_missing >= views:
        return f"the run looks at {views:,} views, and {found.views_missing:,} would have to be made"
    return ""


def _try(config: Config, model: PromptedViT, device: torch.device, precision: str) -> tuple[TokenShape, float]:
    """The shape of a row, and the seconds that a view takes: the fastest of a few passes of some images."""
    assert config.data.views is not None
    images = torch.zeros(TRIAL, 3, model.image_size, model.image_size, dtype=torch.uint8)
    seconds = float("inf")
    with _on(model, device, precision) as tokens_of:
        for _ in range(PASSES):
            begin = time.perf_counter()
            tokens = tokens_of(images)
            seconds = min(seconds, (time.perf_counter() - begin) / TRIAL)
    return TokenShape(config.data.views, tokens.shape[1], tokens.shape[2], config.data.tokens), seconds


@contextmanager
def _on(model: PromptedViT, device: torch.device, precision: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """The trunk on a device, in a precision: uint8 [n, 3, S, S] -> float32 [n, T, D], there; then back on the CPU."""
    dtype = DTYPES.get(precision)
    model.to(device).eval()

    @torch.no_grad()
    def tokens_of(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return model.trunk(normalise(images.to(device, non_blocking=True), model.statistics)).float().cpu()

    try:
        yield tokens_of
    finally:
        model.to("cpu").train()


def make(
    cache: TrunkCache, config: Config, store: Store, model: PromptedViT, device: torch.device, asked: Callable[[], bool]
) -> bool:
    """Make what is missing, and wait until all of it is there for all ranks; all call it. False if asked to stop.

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
    with ImageProgress(views, active=rank() == 0 and views > 0, unit="views") as progress:
        if rank() == 0 and views:
            progress.console.print(f"trunk cache: {cache.where()}; {cache.cost()}", highlight=False)
        with _on(model, device, cache.fingerprint["precision"]) as tokens_of:
            for kinds in (TRAINING, ("test",)):
                kind_source = ShardSource(store, [kind for kind in kinds if store.manifest.samples(kind)])
                making = _Making(cache, kind_source, tokens_of, config, progress, stopped)
                if not making.all_parts():
                    return False
    if others is not None:
        others.add("there", 1)
        _wait(lambda: others.add("there", 0) >= world_size() or stopped(), "the other ranks' trunk caches")
    return not stopped()


def _wait(done: Callable[[], bool], what: str) -> None:
    begin = time.monotonic()
    while not done():
        if time.monotonic() - begin > MOST_WAITING:
            raise PartsError(f"{what} did not come within {timedelta(seconds=MOST_WAITING)}")
        time.sleep(POLL)


class _Making:
    """Makes the parts of some kinds; which process makes which part is decided by a lock for each."""

    def __init__(
        self, cache: TrunkCache, source: ShardSource, tokens_of: Callable[[Tensor], Tensor], config: Config,
        progress: ImageProgress, stopped: Callable[[], bool],
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
            begin = time.monotonic()
            while missing := [part for part in range(count) if not self.path(part).exists()]:
                if not (self._make(range(first, count)) and self._make(range(first))):
                    return False
                if time.monotonic() - begin > MOST_WAITING:
                    raise PartsError(f"{self.path(missing[0])} did not come within {timedelta(seconds=MOST_WAITING)}")
                time.sleep(POLL)
            return True
        finally:
            for part in list(self._locks):
                self._release(part)

    def _wanted(self, part: int) -> bool:
        """Whether this process is to make a part: it is missing, and nobody else makes it."""
        if self.path(part).exists():
            return False
        lock = FileLock(self.path(part).with_suffix(".lock"))
        with writing_parts(self.tokens.folder):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
            except NotImplementedError:  # no flock here: twins write the same bytes under names of their own
                return True
            self._locks[part] = lock
            if self.path(part).exists():
                self._release(part)
                return False
            for leftover in self.tokens.folder.glob(f"{self.path(part).stem}.*.tmp"):
                leftover.unlink(missing_ok=True)  # of a process that was killed: this one holds the lock
        return True

    def _release(self, part: int) -> None:
        if (lock := self._locks.pop(part, None)) is not None:
            lock.release()

    def _make(self, parts: range) -> bool:
        """The parts of a range that are to be made here; False if asked to stop."""
        if not len(parts) or all(self.path(part).exists() for part in parts):
            return not self.stopped()
        shape = self.tokens.shape
        known = shape.views if self.source.place(0)[0] != "test" else 0
        writer: PartWriter | None = None
        made = blocks(
            self.source, parts, self._wanted, block_size=BLOCK, augment=self.config.data.augment,
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
                told = f"{where}: sample {sample.uid} does not decode ({sample.error}): make the shards again"
                writer.add(of_sample, sample.uid, sample.target, told if sample.error else "")
        self.progress.add(len(pieces) * len(block.samples))

    def _checked(self, tokens: Tensor, writer: PartWriter) -> Tensor:
        largest = float(tokens.abs().max()) if len(tokens) else 0.0
        if not largest <= torch.finfo(TYPES[self.tokens.shape.dtype]).max:
            raise DatasetError(
                f"{writer.path}: the trunk's tokens reach {largest:.3g}, more than {self.tokens.shape.dtype} holds: "
                "set data.tokens=float32"
            )
        return tokens
