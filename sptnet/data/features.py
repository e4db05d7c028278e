"""Class tokens of a dataset, kept: what `sptnet features` writes, and how it is read a block at a time.

    features.json                   what they are: dataset, weights, image size, ...; written first
    unlabelled-000003.safetensors   features [n, D] float16 or float32, uid [n] and target [n] int64 of one shard, in
                                    the shard's order; whole or absent, and marked with the digest of features.json

Knows no model: the maker is `sptnet/features.py`.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sptnet.data.format.files import check_regular, read_regular
from sptnet.data.format.manifest import KINDS, Kind, Manifest
from sptnet.errors import SptnetError

SCHEMA = "sptnet-features/1"
LARGEST = 2**20  # bytes of a fingerprint
FINGERPRINT = "features.json"


class FeaturesError(SptnetError, ValueError):
    """A folder that does not hold the features that are wanted; the message says why."""

    on_all_ranks = True


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """sha256 of what features are of and by."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def part_path(folder: Path, kind: Kind, number: int) -> Path:
    """The file of the features of a kind's shard."""
    return folder / f"{kind}-{number:06d}.safetensors"


def encode_part(
    features: NDArray[Any], uids: NDArray[np.int64], targets: NDArray[np.int64], fingerprint: dict[str, Any]
) -> bytes:
    """The content of a part's file: features [n, D], uids [n], targets [n]."""
    arrays = {"features": features, "uid": uids, "target": targets}
    return save(arrays, metadata={"fingerprint": fingerprint_digest(fingerprint)})


class Part:
    """The features of one shard, of which what is asked for is read, and open only then: a process may map 65,530.

    Attributes:
        span: the least and the largest target; None where there is no sample.

    Raises:
        FeaturesError: not whole, of another fingerprint, or not of the shard's length.
    """

    def __init__(self, path: Path, samples: int, digest: str):
        self.path, self.samples = path, samples
        with self._opened() as file:
            metadata, slices = file.metadata() or {}, [file.get_slice(name) for name in ("features", "uid", "target")]
            (of_rows, shape), *of_columns = [(one.get_dtype(), tuple(one.get_shape())) for one in slices]
            targets = file.get_tensor("target")
        if metadata.get("fingerprint") != digest:
            raise FeaturesError(f"{path} is not of what {FINGERPRINT} beside it says: remove it and make it again")
        rows_fit = of_rows in ("F16", "F32") and len(shape) == 2 and shape[0] == samples and shape[1] > 0
        if not rows_fit or set(of_columns) != {("I64", (samples,))}:
            raise FeaturesError(f"{path} does not hold the {samples} samples of its shard: remove it and make it again")
        self.width = int(shape[1])
        self.span = (int(targets.min()), int(targets.max())) if samples else None

    def array(self, name: str) -> NDArray[np.int64]:
        """`uid` or `target`: [n]; raises FeaturesError."""
        with self._opened() as file:
            return np.asarray(file.get_tensor(name), np.int64)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            check_regular(self.path)
            with safe_open(self.path, "np") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise FeaturesError(f"{self.path} cannot be read ({error}): remove it and make it again") from None

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Features [end - begin, D]; raises FeaturesError."""
        with self._opened() as file:
            rows = np.asarray(file.get_slice("features")[begin:end], np.float32)
        if not np.isfinite(rows).all():
            raise FeaturesError(f"{self.path} has values that are not finite: remove it and make it again")
        return rows


class Split:
    """The features of all samples of a kind, in the manifest's order. len() is their number; `width` is D."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self.width = parts[0].width if parts else 0

    def __len__(self) -> int:
        return sum(part.samples for part in self.parts)

    @cached_property
    def uids(self) -> NDArray[np.int64]:
        """[N]."""
        return self._all("uid")

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """[N]; negative where nobody knows."""
        return self._all("target")

    def _all(self, name: str) -> NDArray[np.int64]:
        return np.concatenate([part.array(name) for part in self.parts] or [np.zeros(0, np.int64)])

    def blocks(self, size: int = 8192) -> Iterator[NDArray[np.float32]]:
        """Features [at most `size`, D], one block after the other; no more than one is in memory."""
        for part in self.parts:
            for begin in range(0, part.samples, size):
                yield part.rows(begin, min(begin + size, part.samples))


class FeatureFolder:
    """The features of a dataset.

    Args:
        folder: made by `sptnet features`.
        manifest: of the dataset that they are to be of.

    Raises:
        FeaturesError: of another dataset, unfinished, or damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.fingerprint = read_fingerprint(folder)
        if self.fingerprint.get("dataset") != manifest.digest():
            name = self.fingerprint.get("name")
            raise FeaturesError(
                f"{folder} holds features of another dataset ({name}, {self.fingerprint.get('dataset')!s:.12}) than "
                f"{manifest.name} ({manifest.digest():.12})"
            )
        # as they are made: none of a kind whose shards are all empty
        kinds = [kind for kind in KINDS if manifest.samples(kind)]
        paths = [part_path(folder, kind, n) for kind in kinds for n in range(len(manifest.of_kind(kind)))]
        if missing := [path for path in paths if not path.exists()]:
            raise FeaturesError(
                f"{folder} lacks {len(missing)} of {len(paths)} parts ({missing[0].name}): run the command that began "
                "it again, it goes on"
            )

    def split(self, kind: Kind) -> Split:
        """The features of a kind. Raises FeaturesError."""
        digest, shards = fingerprint_digest(self.fingerprint), self.manifest.of_kind(kind)
        split = Split([Part(part_path(self.folder, kind, n), s.samples, digest) for n, s in enumerate(shards)])
        least, most = (0, self.manifest.num_old) if kind == "labelled" else (-1, len(self.manifest.classes))
        for part in split.parts:
            named = part.span is None or (least <= part.span[0] and part.span[1] < most)
            if part.width != split.width or not named:
                raise FeaturesError(f"{part.path} is not like the others, or of no class: remove it and make it again")
        return split


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """What a folder's features are of and by. Raises FeaturesError."""
    path = folder / FINGERPRINT
    try:
        fingerprint = json.loads(read_regular(path, LARGEST))
    except FileNotFoundError:
        raise FeaturesError(
            f"{folder} holds no features ({FINGERPRINT} is missing): make them with sptnet features"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FeaturesError(f"{path} cannot be read: {error}") from None
    if not isinstance(fingerprint, dict) or fingerprint.get("schema") != SCHEMA:
        raise FeaturesError(f"{path} is not of schema {SCHEMA}: make the features again in another folder")
    return fingerprint
