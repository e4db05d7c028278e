"""What a frozen trunk computes of known views, computed once: where it is kept, and whether it pays.

The format is in `sptnet/data/tokens.py`, how it is made in `sptnet/trunk_making.py`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sptnet.config import Config, ConfigError
from sptnet.data.augment import CROP_RATIO, normalise
from sptnet.data.cache_room import InUse, lock_of, make_room, remove
from sptnet.data.format.manifest import KINDS
from sptnet.data.locks import locked
from sptnet.data.storage.cache import in_user_cache
from sptnet.data.storage.store import Store
from sptnet.data.tokens import FINGERPRINT, SCHEMA, Tokens, TokenShape, folder_of, part_path
from sptnet.method.model import PromptedViT
from sptnet.run.parts import PartsError, begin_parts, writing_parts
from sptnet.strategy.base import DTYPES
from sptnet.strategy.collectives import barrier, world_size
from sptnet.strategy.kernels import kernels_told
from sptnet.strategy.launcher import is_first_on_disk, is_on_one_node

DEFAULT = Path("~/.cache/sptnet/tokens")
CODE = 1  # raise it where the tokens of the same views become others
SHORTCUT = 2  # likewise of the last block, which is of the trunk where nothing of the backbone is trained
BLOCK = 32  # images of a forward pass, a view at a time; another number may round differently
TRIAL = 8  # images of the forward passes that are timed
PASSES = 4
TYPES = {"float16": torch.float16, "float32": torch.float32}


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

    def progress(self) -> str:
        """How many of its files are there."""
        parts = [
            part_path(self.tokens.folder, kind, number)
            for kind, counts in self.tokens.samples.items()
            for number in range(len(counts))
        ]
        return f"{sum(path.exists() for path in parts)} of {len(parts)} files of tokens are in {self.tokens.folder}"

    def give_up(self) -> None:
        """Remove the folder, unless another run uses it; all ranks call it."""
        self.held.release()
        barrier()
        remove(self.tokens.folder)

    def cost(self) -> str:
        """What making the missing ones takes."""
        minutes = self.views_missing * self.seconds_per_view / 60
        elsewhere = "" if is_on_one_node() else ", on every node with a disk of its own"
        return (
            f"{self.missing / 1e9:.3f} GB to be made, {self.views_missing:,} views at "
            f"{1000 * self.seconds_per_view:.1f} ms, about {minutes:.1f} min of one process{elsewhere}"
        )


def stored_type(config: Config, model: PromptedViT) -> torch.dtype | None:
    """To which type the trunk's tokens are rounded in training; None where they are not."""
    if config.data.views is None or config.method != "simgcd" or model.train_from_block == 0:
        return None
    return TYPES[config.data.tokens]


def choose(
    config: Config, store: Store, model: PromptedViT, weights: str, device: torch.device, precision: str,
    images_left: Callable[[], int],
) -> TrunkCache | str:  # fmt: skip
    """The cache that a run is to use, or why it uses none; the same on all ranks.

    Args:
        weights: digest of what is frozen.
        images_left: how many images the run still looks at, each time it does; all ranks call it where tokens can be
            kept, and what it raises is raised.

    Raises:
        ConfigError: a folder was asked for that cannot hold the tokens.
    """
    if stored_type(config, model) is None or config.trunk_cache == "off":
        return "none" if config.data.views is None else "none: every view goes through the trunk"
    asked = config.trunk_cache != "auto"
    images = images_left()
    found, why = None, ""
    try:
        found = _look(config, store, model, weights, device, precision)
        why = "" if asked else does_not_pay(found.views_missing, 2 * images)
    except PartsError as error:
        if asked:
            raise
        why = str(error)
    if not (why := _first_of_all(why)):
        assert found is not None
        folder = found.tokens.folder
        # one process of a disk looks at all that is kept there: hundreds of them would keep it busy for minutes
        looks = is_first_on_disk(folder / FINGERPRINT, config.collective_timeout_s)
        if not (why := _first_of_all(make_room(folder, found.missing, limit_of(config)) if looks else "")):
            return found
    if asked:
        raise impossible(config, why)
    return f"none: {why}"


def _first_of_all(why: str) -> str:
    """The first rank's reason that has one, on all ranks, which all call it."""
    answers: list[Any] = [why]
    if dist.is_initialized():
        answers = [None] * world_size()
        dist.all_gather_object(answers, why)
    return next((answer for answer in answers if answer), "")


def _look(
    config: Config, store: Store, model: PromptedViT, weights: str, device: torch.device, precision: str
) -> TrunkCache:
    shape, seconds = _try(config, model, device, precision)
    mean, std = model.statistics
    all_frozen = model.train_from_block == len(model.backbone.blocks)
    fingerprint = {
        "schema": SCHEMA, "code": [CODE, SHORTCUT] if all_frozen else CODE,
        "dataset": store.manifest.digest(), "weights": weights, "backbone": config.model.backbone,
        "options": config.model.backbone_options, "block": model.train_from_block,
        "image_size": model.image_size, "augment": config.data.augment, "crop": CROP_RATIO, "mean": list(mean),
        "std": list(std), "views": shape.views, "dtype": shape.dtype, "precision": precision, "device": device.type,
        "images": BLOCK, **kernels_told(device, config.matmul_precision, config.deterministic),
    }  # fmt: skip
    folder = folder_of(root_of(config), fingerprint)
    with writing_parts(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock_of(folder)):  # other ranks and runs begin it too
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


def root_of(config: Config) -> Path:
    """The folder of folders of tokens. Raises PartsError where nobody says where this user's caches are."""
    try:
        return in_user_cache(DEFAULT if config.trunk_cache == "auto" else Path(config.trunk_cache))
    except RuntimeError as error:
        raise PartsError(f"trunk_cache {config.trunk_cache}: {error}") from None


def limit_of(config: Config) -> int:
    """Bytes that the tokens of all runs in a folder may take."""
    return int(config.trunk_cache_gb * 1e9)


def impossible(config: Config, why: str) -> ConfigError:
    """A folder was asked for that cannot hold the tokens."""
    return ConfigError(f"trunk_cache {config.trunk_cache}: {why}; choose another disk, or trunk_cache: off")


def does_not_pay(made: int, looked_at: int) -> str:
    """Why nobody who was not asked to keeps tokens, "" where it pays: views to make, and views that a run looks at."""
    if made and made >= looked_at:
        return f"the run looks at {looked_at:,} views, and {made:,} would have to be made"
    return ""


def _try(config: Config, model: PromptedViT, device: torch.device, precision: str) -> tuple[TokenShape, float]:
    """The shape of a row, and the seconds that a view takes: the fastest of a few passes of some images."""
    assert config.data.views is not None
    images = torch.zeros(TRIAL, 3, model.image_size, model.image_size, dtype=torch.uint8)
    seconds = float("inf")
    with trunk_on(model, device, precision) as tokens_of:
        for _ in range(PASSES):
            begin = time.perf_counter()
            tokens = tokens_of(images)
            seconds = min(seconds, (time.perf_counter() - begin) / TRIAL)
    return TokenShape(config.data.views, tokens.shape[1], tokens.shape[2], config.data.tokens), seconds


@contextmanager
def trunk_on(model: PromptedViT, device: torch.device, precision: str) -> Iterator[Callable[[Tensor], Tensor]]:
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
