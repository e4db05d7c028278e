"""What is chosen once for a journey and kept in OUT/plan.json, and the machine that it is gone on."""

import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sptnet.data.files import write_whole
from sptnet.data.listing import IMAGE_SUFFIXES, images_below
from sptnet.discover.kept import Choices, read_kept
from sptnet.discover.request import Request
from sptnet.discover.stages import Machine
from sptnet.run.parts import writing_parts
from sptnet.run.throughput import matmul_peak

CHOICES = "plan.json"
LARGE_IMAGE = 150_000  # bytes of an image file, from which on decoding them again and again takes too long
SAMPLED = 1000  # image files of a folder that are looked at for it
AS_THEY_ARE = {".jpg", ".jpeg", ".png", ".webp"}  # by their suffix, the images that shards hold without a --resize
CROP = 0.875  # of an image's short side that a model sees
WORTH_IT = 1.5  # times as fast, from which on half precision is taken


def look_at_machine(request: Request, processes: int | None, precision: str) -> Machine:
    """How many processes and cores there are; loaders are few where the CPU computes too."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or gpus or 1
    share = cores // processes
    workers = min(8, max(1, share - 1)) if gpus else min(4, max(1, share // 2))
    told = request.chosen().get("data.workers", workers)
    return Machine(processes, cores, precision, told if isinstance(told, int) else workers)


class Files(NamedTuple):
    """What lies in the folders of a request.

    Attributes:
        mean_bytes: of the first images of every folder; 0 where there are none.
        as_they_are: whether shards can hold all images without storing them anew.
        passed_over: files that are no images by their suffix, by suffix.
    """

    mean_bytes: float
    as_they_are: bool
    passed_over: Counter[str]

    def left_out(self) -> str | None:
        """A sentence where files are passed over."""
        if not self.passed_over:
            return None
        kinds = ", ".join(f"{count:,} {suffix or 'without one'}" for suffix, count in sorted(self.passed_over.items()))
        taken = " ".join(sorted(IMAGE_SUFFIXES))
        return f"files are left out for their suffix: {kinds}. Images are {taken}; convert those that are images too"


def look_at_files(request: Request) -> Files:
    """Their names, and sizes of some. Raises ListingError."""
    sizes, suffixes, passed_over = [], set(), Counter[str]()
    for root in (request.labelled, request.unlabelled, *([] if request.test is None else [request.test])):
        for number, name in enumerate(images_below(root, passed_over)):
            path = os.path.join(root, os.fsdecode(name))
            suffixes.add(os.path.splitext(path)[1].lower())
            if number < SAMPLED:
                with suppress(OSError):  # it is named where it is read
                    sizes.append(os.stat(path).st_size)
    return Files(sum(sizes) / max(1, len(sizes)), suffixes <= AS_THEY_ARE, passed_over)


def choices_of(request: Request, files: Files) -> dict[str, Any]:
    """What is chosen once for a journey: precision, and whether stored images are made smaller."""
    path = request.out / CHOICES
    with suppress(FileNotFoundError):
        return read_kept(path, Choices).model_dump(exclude_unset=True)
    choices = {"precision": _precision(), "resize": _resize(request, files)}
    keep(request.out, choices)
    return choices


def keep(out: Path, choices: dict[str, Any]) -> None:
    """Write them. Raises PartsError."""
    with writing_parts(out / CHOICES):
        write_whole(out / CHOICES, (json.dumps(choices, indent=1) + "\n").encode())


def _precision() -> str:
    """bf16 where this machine multiplies faster in it."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    half, whole = (matmul_peak(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if half > WORTH_IT * whole else "no"


def _resize(request: Request, files: Files) -> int | None:
    """The short side that stored images get; None: they are kept as they are, small and of formats that can be."""
    if files.mean_bytes < LARGE_IMAGE and files.as_they_are:
        return None
    size = request.chosen().get("model.image_size", 224)
    return max(256, round(size / CROP)) if isinstance(size, int) else 256
