"""What is chosen once for a journey and kept in OUT/plan.json, and the machine that it is gone on."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sptnet.data.augment import CROP_RATIO
from sptnet.data.format.files import TAKEN, folders_in, told_by_suffix, write_whole
from sptnet.data.format.manifest import MANIFEST
from sptnet.data.listing import images_below
from sptnet.discover.children import Children
from sptnet.discover.request import Request
from sptnet.discover.saved_state import Choices, read_kept
from sptnet.discover.stages import Machine
from sptnet.run.parts import writing_parts
from sptnet.strategy.attention import cpu_has_bf16

CHOICES = "plan.json"
CONVERSION = "conversion.json"  # of a dataset of which images were found
LARGE_IMAGE = 150_000  # bytes of an image file, from which on decoding them again and again takes too long
SAMPLED = 1000  # image files that are looked at for it, of those to be sorted, and of the classes


def look_at_machine(request: Request, processes: int | None, precision: str) -> Machine:
    """How many processes and cores there are; loaders are few where the CPU computes too."""
    gpus, cores = torch.cuda.device_count() if _has_gpu(request) else 0, len(os.sched_getaffinity(0))
    processes = processes or gpus or 1
    share = cores // processes
    workers = min(8, max(1, share - 1)) if gpus else min(4, max(1, share // 2))
    told = request.chosen().get("data.workers", workers)
    return Machine(processes, cores, precision, told if isinstance(told, int) else workers, _on_cpu(request))


def choices_of(request: Request, children: Children) -> dict[str, Any]:
    """What is chosen once for a journey: precision, whether stored images are made smaller; and what is left out.

    Raises:
        ListingError, PartsError, StageError: the folders cannot be read, or the file cannot.
        StoppedError: asked to stop.
    """
    path = request.out / CHOICES
    # before images are converted nothing depends on it, and they may be others now
    if any((request.out / "shards" / name).exists() for name in (CONVERSION, MANIFEST)):
        with suppress(FileNotFoundError):
            return read_kept(path, Choices).model_dump(exclude_unset=True)
    mean_bytes, left_out = _look_at_files(request, children)
    choices = {"precision": _precision(request), "resize": _resize(request, mean_bytes), "left_out": left_out}
    keep(request.out, choices)
    return choices


def _look_at_files(request: Request, children: Children) -> tuple[float, str | None]:
    """Mean bytes of some images of every folder, 0 where there are none, and a sentence on what is left out."""
    of_classes = [request.labelled, *([] if request.test is None else [request.test])]
    sizes, passed_over = [], Counter[str]()
    for trees in ([request.unlabelled], *map(_class_folders, of_classes)):
        paths = (os.path.join(tree, os.fsdecode(name)) for tree in trees for name in images_below(tree, passed_over))
        for path in _some_of(paths, children):
            with suppress(OSError):  # it is named where it is read
                sizes.append(os.stat(path).st_size)
    left_out = None
    if passed_over:
        left_out = (
            f"files are left out for their suffix: {told_by_suffix(passed_over)}. Images are {TAKEN}; convert those "
            "that are images too"
        )
    return sum(sizes) / max(1, len(sizes)), left_out


def _some_of(paths: Iterator[str], children: Children) -> list[str]:
    """At most SAMPLED of them, each as likely as any other, and the same at every start."""
    draws, drawn = random.Random(0), list[str]()
    for number, path in enumerate(paths):
        if number % SAMPLED == 0:
            children.check()
        if number < SAMPLED:
            drawn.append(path)
        elif (place := draws.randrange(number + 1)) < SAMPLED:
            drawn[place] = path
    return drawn


def _class_folders(root: Path) -> list[Path]:
    return [root / name for name in folders_in(root)]


def keep(out: Path, choices: dict[str, Any]) -> None:
    """Write them. Raises PartsError."""
    with writing_parts(out / CHOICES):
        write_whole(out / CHOICES, (json.dumps(choices, indent=1) + "\n").encode())


def _on_cpu(request: Request) -> bool:
    """Whether it was asked to compute on the CPU whatever else there is."""
    return request.chosen().get("device") == "cpu"


def _has_gpu(request: Request) -> bool:
    return torch.cuda.is_available() and not _on_cpu(request)


def _precision(request: Request) -> str:
    """bf16 where this machine has instructions for it: by what it is, not by how busy it is, since numbers follow."""
    if _has_gpu(request):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if cpu_has_bf16() else "no"


def _resize(request: Request, mean_bytes: float) -> int | None:
    """The short side that stored images get, where the files are large; None: they are kept as they are."""
    if mean_bytes < LARGE_IMAGE:
        return None
    size = request.chosen().get("model.image_size", 224)
    return max(256, round(size / CROP_RATIO)) if isinstance(size, int) else 256
