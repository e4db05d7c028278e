"""Predictions of a trained run for images: a folder of any depth, a CSV list, or shards; a table in parts.

OUT/predict.json                       of which model and images, the columns, what the confidence is; written first
OUT/listing.bin, listing.npy           which file is which, of a folder or a CSV; see sptnet/data/listing.py
OUT/predictions/part-000000.csv        a row for every image that can be read, in order, or .parquet; whole or absent
OUT/embeddings/part-000000.npy         [rows, D] float32, a row for every row of the table (in Parquet: a column)
OUT/errors/part-000000.csv             the images of a part that cannot be read; written before its table
OUT/errors.csv                         all of those; written last, when every part is there

A part is computed whole by one process in fixed blocks, so that any number of processes writes the same files.
"""

import csv
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sptnet.columns import prediction_columns
from sptnet.data.blocks import Sample, ShardSource, Source, blocks
from sptnet.data.format.files import TAKEN, check_regular, is_url, told_by_suffix, write_whole
from sptnet.data.format.manifest import MANIFEST, Kind, is_dataset
from sptnet.data.format.temporary import remove_leftovers
from sptnet.data.listing import (
    STARTS,
    ListedSource,
    ListingError,
    images_below,
    images_named_by,
    write_listing,
)
from sptnet.data.table import Table, TableFormat, check_format, count_rows, encode_csv, encode_table
from sptnet.errors import visible
from sptnet.features import Forward, forward_on_ranks, looks_at, open_dataset
from sptnet.run.checkpoint import digest
from sptnet.run.model_file import unfinished
from sptnet.run.parts import HEAD, begin_parts, write_part, writing_parts
from sptnet.run.progress import Speed
from sptnet.run.records import DamagedError, read_json
from sptnet.strategy.collectives import barrier, rank, world_size
from sptnet.strategy.kernels import kernels_told
from sptnet.trained import TrainedRun

ABOUT, ERRORS = "predict.json", "errors.csv"
# below OUT, by part
TABLE, EMBEDDINGS, ERRORS_OF_PART = (
    "predictions/part-{:06d}.{}",
    "embeddings/part-{:06d}.npy",
    "errors/part-{:06d}.csv",
)
CALIBRATION = "confidence is a softmax of cosines; it is not calibrated, least of all on new classes"


class What(NamedTuple):
    """What is told of every image beside its class.

    table_format, top, embeddings: as `sptnet predict` has them; kinds: which splits of shards.
    """

    table_format: TableFormat = "csv"
    top: int = 5
    embeddings: bool = False
    kinds: tuple[Kind, ...] = ("unlabelled", "test")


class Done(NamedTuple):
    """How many images have a row, and how many cannot be read."""

    predicted: int
    unreadable: int


def predict_images(run_folder: Path, images: str, out: Path, what: What, workers: int = 0) -> Done | None:
    """Predict every image, on as many processes as this is called by.

    Args:
        images: a folder of images, a .csv file with a column `image`, or a folder or URL of shards.
        out: made here, or begun by the same call.

    Returns:
        The counts, on the process that finished last; None on the others.

    Raises:
        RunError, DatasetError, ListingError, TableError: no model, no images, a format that is not there.
        PartsError: `out` cannot be written, or holds something else.
    """
    check_format(what.table_format)
    run = TrainedRun(run_folder)
    forward, strategy = forward_on_ranks(run.encoder)
    if rank() == 0:
        if how_far := unfinished(run.folder):
            _warn(how_far)
        told = kernels_told(strategy.device, *run.encoder.kernels)
        _begin(run, images, out, what, {"precision": strategy.launch.precision, **told})
    barrier()
    source = open_images(images, out, what.kinds)
    mine = range(rank(), len(source), world_size())
    parts = _Parts(out, run, what, source.size)
    with Speed(sum(source.size(part) for part in mine), active=rank() == 0) as progress:
        progress.console.print(f"{strategy.world}; {CALIBRATION}", highlight=False)
        for part, samples, tokens, logits in _computed(run, source, mine, parts, forward, progress, workers):
            parts.write(part, samples, tokens, logits)
    return _finish(out, source, parts)


def is_shards(images: str) -> bool:
    """Whether a path or URL is a dataset's; other tools leave a manifest.json among photographs, too."""
    return is_url(images) or is_dataset(Path(images))


def open_images(images: str, out: Path, kinds: tuple[Kind, ...]) -> Source:
    """The images, in parts; of a folder or a CSV, as listed in `out`."""
    if is_shards(images):
        store = open_dataset(images, looks_at(images))
        return ShardSource(store, [kind for kind in kinds if store.manifest.samples(kind)])
    path = Path(images)
    return ListedSource(out, path.parent if path.is_file() else path)


def _begin(run: TrainedRun, images: str, out: Path, what: What, computed: dict[str, Any]) -> None:
    """Write what `out` is of and list the images, or check that it is the same."""
    about: dict[str, Any] = {
        "images": _place_of(images, out / ABOUT), **what._asdict(), **computed,
        "temperature": run.temperature, "classes": run.classes.names, "num_old": run.classes.num_old,
        **run.encoder.fingerprint(), HEAD: digest(run.encoder.module.head.state_dict().items()), "note": CALIBRATION,
    }  # fmt: skip
    names = None
    if is_shards(images):
        manifest = open_dataset(images, look=False).manifest  # all ranks open it next
        if not sum(manifest.samples(kind) for kind in what.kinds):
            raise ListingError(f"{images} has no image in {', '.join(what.kinds)}")
        about["dataset"] = manifest.digest()
    elif not (out / STARTS).exists():
        names = _names(Path(images))  # a mistake in the path leaves nothing that another one would be compared with
    begin_parts(out / ABOUT, about)
    if names is None and not is_shards(images) and has_changed(Path(images), out):
        _warn(
            f"{images} has changed since {out} was begun: the table is of the images of then; for those of now use "
            "another --out"
        )
    with writing_parts(out):
        (out / "predictions").mkdir(exist_ok=True)
        for below in ("predictions", "embeddings", "errors"):
            remove_leftovers(out / below)
        if names is not None:
            write_listing(out, names)


def _place_of(images: str, about: Path) -> str:
    """Where the images are, whatever folder this is called from; in a table that an earlier version began, as given."""
    with suppress(OSError, DamagedError):
        if read_json(about, dict[str, Any]).get("images") == images:
            return images
    return images if is_url(images) else os.path.abspath(images)


def _names(path: Path) -> Iterator[bytes]:
    if not path.exists():
        raise ListingError(f"{path} is neither a folder of images, a CSV file that lists them, nor shards")
    passed_over = Counter[str]()
    names = images_named_by(path) if path.is_file() else images_below(path, passed_over)
    first = next(names, None)
    if first is None:
        other = f", and its {MANIFEST} is none of shards" if (path / MANIFEST).exists() else ""
        other += f"; its files are {told_by_suffix(passed_over)}, images are {TAKEN}" if passed_over else ""
        raise ListingError(f"{path} holds no image{other}")
    return chain([first], names, _telling(path, passed_over))


def _telling(path: Path, passed_over: Counter[str]) -> Iterator[bytes]:
    """No name: says, when all were taken, which files are none."""
    if passed_over:
        _warn(f"{path} has files that are left out for their suffix: {told_by_suffix(passed_over)}; images are {TAKEN}")
    yield from ()


def has_changed(images: Path, out: Path) -> bool:
    """Whether a folder of images, or a CSV file, lists others now than `out` does, or some of them are others."""
    if not images.exists():
        return False  # its images are looked for, and named, one by one
    names = images_named_by(images) if images.is_file() else images_below(images)
    try:
        listed = ListedSource(out, images.parent if images.is_file() else images)
        return not listed.lists(names) or listed.has_newer()
    except ListingError:
        return True  # it cannot be listed any more


def _warn(sentence: str) -> None:
    print(f"warning: {visible(sentence)}", file=sys.stderr, flush=True)


class _Parts:
    """The files of the parts; `size(part)` is how many images one is of."""

    def __init__(self, out: Path, run: TrainedRun, what: What, size: Callable[[int], int]):
        self.out, self.run, self.what, self.size = out, run, what, size

    def path(self, part: int) -> Path:
        return self.out / TABLE.format(part, self.what.table_format)

    def errors(self, part: int) -> Path:
        return self.out / ERRORS_OF_PART.format(part)

    def is_missing(self, part: int) -> bool:
        return not self.path(part).exists()

    def is_wanted(self, part: int) -> bool:
        """Whether a part is to be made: it is missing, or its files are not of as many images as it."""
        if self.is_missing(part):
            return True
        apart = self.what.embeddings and self.what.table_format == "csv"
        try:
            check_regular(self.path(part))
            rows, bad, kept = count_rows(self.path(part), self.what.table_format), 0, None
            if self.errors(part).exists():
                check_regular(self.errors(part))
                bad = count_rows(self.errors(part), "csv")
            if apart:
                kept = len(np.load(self.out / EMBEDDINGS.format(part), mmap_mode="r"))
        except (OSError, ValueError, EOFError, csv.Error):
            return True
        return rows + bad != self.size(part) or kept not in (None, rows)

    def write(self, part: int, samples: list[Sample], tokens: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
        """Write a part: samples [n], class tokens [n, D], logits [n, K]; its table, by which it counts, last."""
        good = np.array([not sample.error for sample in samples], bool)
        columns: Table = {
            "path": [sample.path for sample in samples if not sample.error],
            **prediction_columns(logits[good], self.run.classes, self.run.temperature, self.what.top),
        }
        with writing_parts(self.out):
            if not good.all():
                self.errors(part).parent.mkdir(exist_ok=True)
                bad = [sample for sample in samples if sample.error]
                table = {"path": [sample.path for sample in bad], "error": [sample.error for sample in bad]}
                write_part(self.errors(part), encode_csv(table))
            else:
                self.errors(part).unlink(missing_ok=True)
            if self.what.embeddings and self.what.table_format == "parquet":
                columns["embedding"] = tokens[good]
            elif self.what.embeddings:
                (self.out / "embeddings").mkdir(exist_ok=True)
                content = io.BytesIO()
                np.save(content, tokens[good])
                write_part(self.out / EMBEDDINGS.format(part), content.getvalue())
            write_part(self.path(part), encode_table(columns, self.what.table_format))


Computed = tuple[int, list[Sample], NDArray[np.float32], NDArray[np.float32]]


def _computed(
    run: TrainedRun, source: Source, mine: range, parts: _Parts, forward: Forward, progress: Speed, workers: int
) -> Iterator[Computed]:
    """Part, samples [n], class tokens [n, D] and logits [n, K] of every part that is missing."""
    encoder, width, classes = run.encoder, run.encoder.module.backbone.num_features, len(run.classes.names)
    here: list[Sample] = []
    tokens, logits = [np.zeros((0, width), np.float32)], [np.zeros((0, classes), np.float32)]
    for block in blocks(
        source, mine, parts.is_wanted, block_size=encoder.batch_size, augment=encoder.augment,
        image_size=encoder.image_size, workers=workers,
    ):  # fmt: skip
        here += block.samples
        if len(block.samples):
            outputs = forward(block.images)
            tokens.append(outputs.features.float().cpu().numpy())
            logits.append(outputs.logits.cpu().numpy())
        progress.add(len(block.samples))
        if block.begin + len(block.samples) == source.size(block.part):
            yield block.part, here, np.concatenate(tokens), np.concatenate(logits)
            here, tokens, logits = [], tokens[:1], logits[:1]


def _finish(out: Path, source: Source, parts: _Parts) -> Done | None:
    """Gather the errors when all parts are there, whichever process sees it: no process waits for another."""
    if any(parts.is_missing(part) for part in range(len(source))):
        return None
    rows = b"path,error\n"
    unreadable = 0
    with writing_parts(out):
        for part in range(len(source)):
            if parts.errors(part).exists():
                rows += parts.errors(part).read_bytes().partition(b"\n")[2]
                unreadable += count_rows(parts.errors(part), "csv")
        write_whole(out / ERRORS, rows)  # several may see it at once, and write the same
    return Done(sum(source.size(part) for part in range(len(source))) - unreadable, unreadable)
