"""Class tokens of every image of a dataset, computed once and kept; the format is in `sptnet/data/features.py`.

A part is the features of one shard, computed whole by one process in blocks of fixed size: any number of processes
writes the same files. A run that was killed goes on with the parts that are missing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sptnet.config_sections import RemoteConfig
from sptnet.data.augment import normalise
from sptnet.data.blocks import Block, Sample, ShardSource, blocks
from sptnet.data.features import FINGERPRINT, SCHEMA, encode_part, part_path, read_fingerprint
from sptnet.data.format.faults import DatasetError, undecodable
from sptnet.data.format.manifest import KINDS, MANIFEST
from sptnet.data.storage.store import Store, open_store
from sptnet.method.model import Outputs
from sptnet.run.parts import PartsError, begin_parts, write_part
from sptnet.run.progress import Speed
from sptnet.strategy.base import Strategy
from sptnet.strategy.collectives import barrier, rank, world_size
from sptnet.strategy.connect import connect
from sptnet.strategy.create import create_evaluator
from sptnet.strategy.kernels import choose_kernels, kernels_told
from sptnet.strategy.launcher import StrategyError, is_first_on_disk
from sptnet.trained import Encoder

FeatureType = Literal["float16", "float32"]
TIMEOUT_S = 3600.0  # that ranks wait for rank 0 to list what there is to do
Forward = Callable[[Tensor], Outputs]


def open_dataset(root: str, look: bool = True) -> Store:
    """A dataset by path or URL, with the default cache.

    Args:
        look: whether its files are there; by one process of a disk, see `is_first_on_disk`.

    Raises:
        DatasetError: no dataset, or a damaged one.
    """
    return open_store(root, **RemoteConfig().model_dump(), look=look)


def looks_at(root: str) -> bool:
    """Whether this process is the one that looks at a dataset's files for all processes of its disk."""
    return is_first_on_disk(Path(root) / MANIFEST, TIMEOUT_S)


def forward_on_ranks(encoder: Encoder) -> tuple[Forward, Strategy]:
    """Connect the processes and give each a copy of the model: uint8 [n, 3, S, S] -> outputs, on the device.

    Raises:
        StrategyError: another strategy than single or ddp, or not the processes that were asked for.
    """
    accelerator, launch = connect(TIMEOUT_S)
    if launch.strategy not in ("single", "ddp"):
        raise StrategyError(f"every process has a copy of the model here, not {launch.strategy}: use launch/ddp.yaml")
    strategy = create_evaluator(accelerator, launch, encoder.module)
    choose_kernels(strategy.device, *encoder.kernels)
    strategy.module.eval()
    prompt = None if encoder.prompt is None else encoder.prompt.to(strategy.device)

    def forward(images: Tensor) -> Outputs:
        pixels = normalise(images.to(strategy.device, non_blocking=True), encoder.module.statistics)
        return strategy.forward_evaluation(pixels, prompt)

    return forward, strategy


def make_features(data: str, out: Path, encoder: Encoder, dtype: FeatureType, workers: int = 0) -> dict[str, Any]:
    """Compute the class tokens of every image of a dataset into a folder; returns its fingerprint.

    Args:
        data: the dataset's folder or URL.
        out: made here, or begun by the same call.
        dtype: in which they are kept; they are computed in the launch's precision.

    Raises:
        DatasetError: damage.
        PartsError: `out` cannot be written, or holds something else.
    """
    store = open_dataset(data, looks_at(data))
    source = ShardSource(store, [kind for kind in KINDS if store.manifest.samples(kind)])
    forward, strategy = forward_on_ranks(encoder)
    fingerprint = {
        "schema": SCHEMA, "name": store.manifest.name, "dataset": store.manifest.digest(), **encoder.fingerprint(),
        "precision": strategy.launch.precision, "dtype": dtype, **kernels_told(strategy.device, *encoder.kernels),
    }  # fmt: skip
    if rank() == 0:
        begin_parts(out / FINGERPRINT, fingerprint)
    barrier()
    fingerprint = read_fingerprint(out)  # parts are marked by it, and it may name the same model by another path
    paths = [part_path(out, *source.place(part)) for part in range(len(source))]
    mine = range(rank(), len(source), world_size())
    here: list[Sample] = []
    with Speed(sum(source.size(part) for part in mine), active=rank() == 0) as progress:
        progress.console.print(strategy.world, highlight=False)
        tokens: list[np.ndarray] = []
        for block in blocks(
            source, mine, lambda part: not paths[part].exists(), block_size=encoder.batch_size,
            augment=encoder.augment, image_size=encoder.image_size, workers=workers,
        ):  # fmt: skip
            _check(block, source)
            here += block.samples
            if len(block.samples):
                tokens.append(forward(block.images).features.float().cpu().numpy())
            progress.add(len(block.samples))
            if block.begin + len(block.samples) == source.size(block.part):
                width = encoder.module.backbone.num_features
                features = _stored(np.concatenate(tokens or [np.zeros((0, width), np.float32)]), dtype)
                write_part(paths[block.part], _encoded(here, features, fingerprint))
                here, tokens = [], []
    return fingerprint


def _stored(features: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Class tokens as they are kept; raises PartsError where that has no such values."""
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    if np.isfinite(stored).all():
        return stored
    largest = float(np.abs(features).max())
    if not np.isfinite(largest):
        raise PartsError("the backbone gives class tokens that are not finite: its weights are damaged")
    raise PartsError(f"class tokens reach {largest:.3g}, more than {dtype} holds: use --dtype float32")


def _encoded(samples: list[Sample], features: NDArray[Any], fingerprint: dict[str, Any]) -> bytes:
    """The file of a part: features [n, D] of its samples."""
    uids, targets = (np.array([getattr(s, name) for s in samples], np.int64) for name in ("uid", "target"))
    return encode_part(features, uids, targets, fingerprint)


def _check(block: Block, source: ShardSource) -> None:
    for position, sample in enumerate(block.samples, block.begin):
        if sample.error:
            shard = source.shard(block.part)
            names = source.store.paths(shard)
            named = names[position] if names else ""
            raise DatasetError(undecodable(source.store.where(shard.file), sample.uid, sample.error, named))
