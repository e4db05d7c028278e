"""Where the samples of a shard came from: a line of JSON per sample, in the order of its index.

JSON, since a path may hold line feeds, and on Unix bytes that are no text (Python's surrogate escapes, which it keeps).
"""

import hashlib
import json
from collections.abc import Sequence

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import Shard

LONGEST_PATH = 2**14  # bytes of a line, escapes included


def paths_name(tar: str) -> str:
    """`train-labelled-000000.tar` -> `train-labelled-000000.paths.jsonl`."""
    return tar.removesuffix(".tar") + ".paths.jsonl"


def largest_paths(shard: Shard) -> int:
    """Bytes that the paths of a shard may have."""
    return LONGEST_PATH * shard.samples


def encode_paths(paths: Sequence[str]) -> bytes:
    """The content of the file."""
    return "".join(json.dumps(path) + "\n" for path in paths).encode()


def parse_paths(encoded: bytes, shard: Shard, where: str) -> list[str]:
    """The paths of a shard's samples.

    Raises:
        DatasetError: not the file that the manifest means, or not a path per sample.
    """
    if hashlib.sha256(encoded).hexdigest() != shard.paths_sha256:
        raise DatasetError(f"{where} is not the file that the manifest means (sha256): copy it again")
    try:
        paths = [json.loads(line) for line in encoded.splitlines()]
        for path in paths:
            str(path).encode("utf-8", "surrogateescape")  # as it will be told: half of a pair of surrogates is no text
    except (ValueError, RecursionError):
        paths = []
    if len(paths) != shard.samples or not all(isinstance(path, str) for path in paths):
        raise DatasetError(f"{where} does not have a path for each of {shard.samples} samples: make the shards again")
    return paths
