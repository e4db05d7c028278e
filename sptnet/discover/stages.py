"""The commands of the journey: what each is for, the line that runs it, and whether its result is there and whole."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sptnet.config_file import published
from sptnet.data.features import FINGERPRINT, FeatureFolder, FeaturesError
from sptnet.data.format.fields import name_fault
from sptnet.data.format.manifest import MANIFEST, Manifest, read_manifest
from sptnet.data.listing import ListedSource, ListingError
from sptnet.discover.children import StageError
from sptnet.discover.request import Request
from sptnet.discover.saved_state import Estimated, is_kept
from sptnet.estimate_k import RESULT
from sptnet.predict import ABOUT, ERRORS, TABLE
from sptnet.run.folder import FINISHED, METRICS, MODEL, PREDICTIONS
from sptnet.run.records import DamagedError, Metrics, read_json

LABELLED = ("--splits", "labelled")


class Machine(NamedTuple):
    """How commands are run here.

    processes: that share the work; cores: of the CPU that we may use; precision: no, bf16 or fp16.
    workers: loader processes of each; on_cpu: GPUs are left alone.
    """

    processes: int
    cores: int
    precision: str
    workers: int
    on_cpu: bool = False


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        title: what it is for.
        command, environment: what is run.
        is_done: whether its result is there and whole.
        advice: what may help where it fails.
    """

    title: str
    command: list[str]
    environment: Mapping[str, str]
    is_done: Callable[[], bool]
    advice: str = ""


def alone(*arguments: str, module: str = "sptnet") -> tuple[list[str], dict[str, str]]:
    """A command in one process."""
    return [sys.executable, "-m", module, *arguments], {}


def on_all(machine: Machine, *arguments: str, module: str = "sptnet") -> tuple[list[str], dict[str, str]]:
    """A command on all processes, through accelerate where there are several."""
    environment = {"ACCELERATE_USE_CPU": "true"} if machine.on_cpu else {}
    if machine.processes == 1:
        if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != machine.precision:
            environment["ACCELERATE_MIXED_PRECISION"] = machine.precision
        return [sys.executable, "-m", module, *arguments], environment
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(published("launch", "ddp")),
        "--num_processes", str(machine.processes), "--mixed_precision", machine.precision, "--main_process_port", "0",
    ]  # fmt: skip
    environment["PET_SHUTDOWN_TIMEOUT"] = "110"  # a step and a checkpoint may take longer than torchrun's 30 s
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, machine.cores // machine.processes))
    return [*launcher, "-m", module, *arguments], environment


def shards(request: Request, resize: int | None) -> Stage:
    """Images that cannot be read or decoded are left out, and told at the end."""
    out = request.out / "shards"
    arguments = ["discover", str(request.labelled), str(request.unlabelled), str(out), "--on-error", "skip"]
    arguments += [] if request.new is None else ["--new", str(request.new)]
    arguments += [] if request.test is None else ["--test", str(request.test)]
    arguments += [] if resize is None else ["--resize", str(resize)]
    arguments += ["--name", "named"] if name_fault(request.labelled.resolve().name) else []
    command, environment = alone(*arguments, module="sptnet_shards.make_shards")
    advice = "where the error names an option, run that line by hand with it, then this command again"
    return Stage("the images as shards", command, environment, lambda: _shards_are_whole(out), advice)


def _shards_are_whole(out: Path) -> bool:
    if not (out / MANIFEST).exists():
        return False
    read_manifest(out)  # which looks whether they are there, with their sizes
    return True


def check_shards(request: Request, manifest: Manifest) -> None:
    """Raise StageError where results are of other shards than those that are there: their images are numbered anew."""
    out, digest = request.out, manifest.digest()
    told = [out / "features" / FINGERPRINT, out / "estimate_k" / RESULT]
    for name in request.stages:
        told += [out / name / METRICS, out / "checks" / name / ABOUT]
    odd = []
    for path in told:
        with suppress(OSError, DamagedError):  # what is not there, or damaged, its own stage sees to
            if read_json(path, dict[str, Any]).get("dataset", digest) != digest:
                # of a run only what an evaluation wrote: a model that was trained is not to be removed for it
                odd.append(str(path if path.name == METRICS else path.parent))
    if odd:
        raise StageError(
            f"{', '.join(odd)}: made of other shards than {out / 'shards'} has now: remove them, and run the same "
            "command to make them again"
        )


def features(request: Request, image_size: int, machine: Machine) -> Stage:
    """Class tokens of the backbone as it comes."""
    out = request.out / "features"
    command, environment = on_all(
        machine, "features", str(request.out / "shards"), "--out", str(out), "--backbone", request.backbone,
        "--weights", request.weights, "--image-size", str(image_size), "--workers", str(machine.workers),
    )  # fmt: skip
    return Stage("what the backbone sees in them", command, environment, lambda: _has_features(request.out))


def _has_features(out: Path) -> bool:
    try:
        found = FeatureFolder(out / "features", read_manifest(out / "shards"))
        for kind in ("labelled", "unlabelled"):
            found.split(kind)
    except FeaturesError:
        return False
    return True


def estimate(request: Request) -> Stage:
    """How many classes there are."""
    out = request.out
    command, environment = alone("estimate-k", str(out / "shards"), "--features", str(out / "features"),
        "--out", str(out / "estimate_k"),
    )  # fmt: skip
    advice = "say how many new classes there are by --new N, with an OUT of its own"
    return Stage(
        "how many classes there are",
        command,
        environment,
        lambda: is_kept(out / "estimate_k" / RESULT, Estimated),
        advice,
    )


def measured(request: Request, machine: Machine, one_size: bool) -> Stage:
    """What a step costs here; made again at every start that has no plan yet."""
    out = request.out
    files = (str(out / name) for name in (*(f"{stage}.yaml" for stage in request.stages), "measured.json"))
    command, environment = on_all(machine, *files, str(one_size), module="sptnet.discover.measure")
    advice = "the same steps would not fit in training: more memory, or a smaller --backbone with an OUT of its own"
    return Stage("a few steps, measured", command, environment, lambda: False, advice)


def train(request: Request, name: str, title: str, machine: Machine) -> Stage:
    """One of the two trainings; `finished` is written last."""
    run = request.out / name
    command, environment = on_all(machine, "train", str(request.out / f"{name}.yaml"))
    files = [run / file for file in (FINISHED, MODEL, PREDICTIONS)]
    return Stage(
        title, command, environment, lambda: all(file.is_file() for file in files) and is_kept(run / METRICS, Metrics),
        "a checkpoint is kept, and the same command continues from it",
    )  # fmt: skip


def checked(request: Request, name: str, machine: Machine) -> Stage:
    """Where a run puts the labelled images, for the comparison of both."""
    out = request.out / "checks" / name
    command, environment = on_all(
        machine, "predict", str(request.out / name), str(request.out / "shards"), "--out", str(out), *LABELLED,
        "--workers", str(machine.workers),
    )  # fmt: skip
    return Stage(f"the labelled images, by {name}", command, environment, lambda: _is_checked(request, out, name))


def predict(request: Request, machine: Machine) -> Stage:
    """Which image belongs where."""
    out, run = request.out / "sorted", request.out / request.then
    command, environment = on_all(
        machine, "predict", str(run), str(request.unlabelled), "--out", str(out), "--workers", str(machine.workers)
    )
    return Stage("which image belongs where", command, environment, lambda: _is_sorted(out, run))


def _predicted(out: Path, run: Path) -> bool:
    """Whether predictions were finished, after the run was: those of another model are refused by the command."""
    errors, model = out / ERRORS, run / MODEL
    return errors.is_file() and errors.stat().st_mtime_ns >= model.stat().st_mtime_ns


def _is_checked(request: Request, out: Path, name: str) -> bool:
    """As `_is_sorted`, of labelled shards: a part for each."""
    parts = len(read_manifest(request.out / "shards").of_kind("labelled"))
    return _predicted(out, request.out / name) and _has_parts(out, parts)


def _has_parts(out: Path, number: int) -> bool:
    return all((out / TABLE.format(part, "csv")).is_file() for part in range(number))


def _is_sorted(out: Path, run: Path) -> bool:
    if not _predicted(out, run):
        return False
    try:
        parts = len(ListedSource(out, out))
    except ListingError:
        return False
    return _has_parts(out, parts)


def page(request: Request) -> Stage:
    """The page, made again where a result is newer."""
    path, runs = request.out / "page.html", [request.out / name for name in request.stages]
    command, environment = alone("report", *map(str, runs), "--html", str(path))

    def is_done() -> bool:
        newest = max((run / METRICS).stat().st_mtime_ns for run in runs)
        return path.is_file() and path.stat().st_mtime_ns >= newest

    return Stage("the page", command, environment, is_done)
