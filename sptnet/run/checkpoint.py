"""The format of checkpoints, one for every strategy and world size; sptnet/run/saving.py writes them.

    RUN/checkpoints/step-000001240/
        checkpoint.json             schema, step (the next to be taken), numbers (what decides them), backbone, parts
        part-00000.safetensors      whole tensors, dealt to the ranks that wrote them:
        part-00001.safetensors        model.NAME                   what is trained; with `full`, the rest too
                                      optimizer.NAME.KEY           momentum and the like of each of these
                                      prompt.NAME, prompt_optimizer.NAME.KEY
        KEEP                        made by hand: this one is never removed

Tensors are whole, float32, by the names of the model's state dict: what a strategy shards is gathered tensor by tensor
and kept by one rank only, so each rank writes its share. The frozen backbone is not in it; `backbone` names it by
source and digest. Phase, learning rates, data order and augmentations follow from the step: nothing else is saved.
CHANGING ANYTHING HERE CHANGES THE FORMAT: tests/run/test_checkpoint.py reads one of this version; say so in
CHANGELOG.md.
"""

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

from sptnet.data.format.fields import Count, Digest, FileName
from sptnet.data.format.files import read_regular
from sptnet.errors import SptnetError, outcome_of_reading
from sptnet.run.records import DamagedError, read_json

SCHEMA = "sptnet-checkpoint/1"
FOLDER, FACTS, MARK = "checkpoints", "checkpoint.json", "KEEP"
NAME = re.compile(r"step-(\d{9,})")
WAY_OUT = "remove the checkpoint's folder, and the run continues from the one before"


class CheckpointError(SptnetError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names file and what stays intact."""


class Part(TypedDict):
    """A file of tensors."""

    file: FileName
    bytes: Count
    sha256: Digest


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself.

    Attributes:
        step: the next step to be taken.
        numbers: everything that decides the numbers of the run; see sptnet/run/resume.py.
        backbone: source and sha256 of what is not trained.
        written_by: strategy, world size and precision; another one may continue.
        counters: skipped steps, in all and in a row, replaced samples, the loss scale of fp16 and its steps.
    """

    step: int
    numbers: dict[str, Any]
    backbone: dict[str, str]
    written_by: dict[str, str | int]
    counters: dict[str, float]
    parts: list[Part] = field(default_factory=list)
    schema: str = SCHEMA


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint that may be there; without its facts it is none, whatever happens to the rest."""
    (checkpoint / FACTS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first.

    Raises:
        CheckpointError: they cannot be listed. `glob` would say that there are none, and the run begin anew over them.
    """
    folder = run / FOLDER
    try:
        named = [folder / name for name in sorted(os.listdir(folder)) if NAME.fullmatch(name)]
        return [path for path in named if _is_there(path / FACTS)]
    except FileNotFoundError:
        return []
    except OSError as error:
        told = CheckpointError(f"{folder} cannot be listed ({error.strerror or error}): nothing was started or removed")
        raise told.with_outcome(outcome_of_reading(error)) from None


def _is_there(path: Path) -> bool:
    """Where `Path.exists` takes some errors of a disk for a no, this raises OSError."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_folder(run: Path) -> None:
    """Raise CheckpointError where a run's checkpoints cannot be seen: it would begin anew over what they continue."""
    folder = run / FOLDER
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, or a broken link: is its disk mounted? Nothing was started")


def is_of_run(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint lies in a run's folder."""
    return checkpoint.resolve().parent == (run / FOLDER).resolve()


def left_behind(run: Path, continues: Path | None) -> list[Path]:
    """The run's checkpoints that would be taken for its own, and are not: of steps later than that which it goes on
    from, all of them where that one is another run's, or none.

    Raises:
        CheckpointError: one of them is marked to stay.
    """
    step = read_facts(continues).step if continues is not None and is_of_run(continues, run) else -1
    later = [path for path in checkpoints(run) if read_facts(path).step > step]
    if kept := [path for path in later if (path / MARK).exists()]:
        raise CheckpointError(
            f"{kept[0]} is later than step {step}, where the run is to begin, and marked {MARK}: move it out of the "
            "run's folder, or choose another folder"
        )
    return later


def read_facts(path: Path) -> Facts:
    """What a checkpoint says of itself; raises CheckpointError."""
    file = path / FACTS
    try:
        raw = read_json(file, dict[str, Any])
        if raw.get("schema") != SCHEMA:
            raise CheckpointError(f"{path} has schema {raw.get('schema')!r}, this version reads {SCHEMA!r}")
        facts = TypeAdapter(Facts).validate_python(raw)
        if facts.step < 0 or "sha256" not in facts.backbone:
            raise DamagedError("step or backbone is not what a run writes")
        if not all(math.isfinite(count) and count >= 0 for count in facts.counters.values()):
            raise DamagedError("counters are not what a run writes")
        if (named := NAME.fullmatch(path.name)) and int(named[1]) != facts.step:
            raise CheckpointError(
                f"{path} holds step {facts.step}, and its name says otherwise: rename it to step-{facts.step:09d}"
            )
        return facts
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is not a checkpoint ({FACTS} is missing)") from None
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CheckpointError(f"{file} is damaged ({where}: {error.errors()[0]['msg']}): {WAY_OUT}") from None
    except OSError as error:
        raise _unreadable(file, error) from None
    except DamagedError as error:
        raise CheckpointError(f"{file} is damaged ({error}): {WAY_OUT}") from None


def check_parts(path: Path, facts: Facts) -> None:
    """Look whether the files of a checkpoint are what was written, by their digests; raises CheckpointError."""
    for part in facts.parts:
        _read_part(path, part)


def read_tensors(path: Path, facts: Facts) -> dict[str, Tensor]:
    """All tensors of a checkpoint, checked against its digests; raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    for part in facts.parts:
        try:
            tensors |= load_tensors(_read_part(path, part))
        except SafetensorError as error:
            raise CheckpointError(f"{path / part['file']} cannot be read ({error}): {WAY_OUT}") from None
    return tensors


def _read_part(path: Path, part: Part) -> bytes:
    file = path / part["file"]
    try:
        encoded = read_regular(file, part["bytes"])
    except OSError as error:
        raise _unreadable(file, error) from None
    if hashlib.sha256(encoded).hexdigest() != part["sha256"]:
        raise CheckpointError(f"{file} is damaged (sha256): {WAY_OUT}")
    return encoded


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    """Where a disk fails nothing is said of the file, and nothing is to be removed."""
    outcome = outcome_of_reading(error)
    remedy = WAY_OUT if outcome == "final" else "look after the disk, and start again"
    return CheckpointError(f"{file} cannot be read ({error.strerror or error}): {remedy}").with_outcome(outcome)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of named tensors on the CPU, in the order of their names."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
