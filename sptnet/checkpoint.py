"""Checkpoints: one format for every strategy and world size, written in the background, whole or not at all.

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
CHANGING ANYTHING HERE CHANGES THE FORMAT: tests/test_checkpoint.py reads one of this version; say so in CHANGELOG.md.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sptnet.durable import sync_folder, write_through

SCHEMA = "sptnet-checkpoint/1"
FOLDER, FACTS, MARK = "checkpoints", "checkpoint.json", "KEEP"
WAY_OUT = "remove the checkpoint's folder, and the run continues from the one before"
OTHERS_WAIT = 600  # seconds that rank 0 waits for the parts of the others


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names file and what stays intact."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself.

    Attributes:
        step: the next step to be taken.
        numbers: everything that decides the numbers of the run; see sptnet/resume.py.
        backbone: source and sha256 of what is not trained.
        written_by: strategy, world size and precision; another one may continue.
        counters: skipped steps, replaced samples, and the loss scale of fp16.
    """

    step: int
    numbers: dict[str, Any]
    backbone: dict[str, str]
    written_by: dict[str, Any]
    counters: dict[str, float]
    parts: list[dict[str, Any]] = field(default_factory=list)
    schema: str = SCHEMA


class Writer:
    """Writes a run's checkpoints, one at a time, in a thread; every rank has one.

    Args:
        run: the run's folder.
        rank, world_size: of this process.
        keep: how many of the newest stay; marked ones stay too.
        attempt: the same on every rank and another in every start of the run, so that what a killed one left unfinished
            is not taken for a part of this one's.
    """

    def __init__(self, run: Path, rank: int, world_size: int, keep: int, attempt: str):
        self.folder, self.rank, self.world_size, self.keep = run / FOLDER, rank, world_size, keep
        self.attempt = attempt
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def begin(self, facts: Facts, tensors: dict[str, Tensor]) -> None:
        """Start to write this rank's tensors, which are on the CPU and nobody else's.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(facts, tensors), name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Raise the error of a write that failed, if one did."""
        if self._error is not None:
            raise CheckpointError(self._error)

    def wait(self) -> None:
        """Wait for what is being written; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def _write(self, facts: Facts, tensors: dict[str, Tensor]) -> None:
        final = self.folder / f"step-{facts.step:09d}"
        partial = final.with_name(f"{final.name}.{self.attempt}.tmp")
        try:
            if self.rank == 0:
                self._remove_leftovers()
            partial.mkdir(parents=True, exist_ok=True)
            self._write_part(partial, tensors)
            if self.rank == 0:
                parts = self._parts_of_all(partial)
                whole = replace(facts, parts=parts)
                write_through(partial / FACTS, json.dumps(asdict(whole), indent=1).encode())
                _remove(final)
                partial.rename(final)
                sync_folder(self.folder)
                self._remove_old()
        except Exception as error:  # whatever ends this thread must end the run
            previous = checkpoints(self.folder.parent)
            stays = f"{previous[-1]} is intact" if previous else "there is none before it"
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            self._error = f"{final} cannot be written on rank {self.rank}: {why}; {stays}"
            shutil.rmtree(partial, ignore_errors=True)

    def _write_part(self, partial: Path, tensors: dict[str, Tensor]) -> None:
        encoded = save_tensors(tensors)
        part = partial / f"part-{self.rank:05d}.safetensors"
        write_through(part, encoded)
        told = {"file": part.name, "bytes": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest()}
        # its name appears when the part is on disk: that is what rank 0 waits for
        announced = partial / f"part-{self.rank:05d}.json"
        write_through(announced.with_suffix(".new"), json.dumps(told).encode())
        announced.with_suffix(".new").rename(announced)

    def _parts_of_all(self, partial: Path) -> list[dict[str, Any]]:
        names = [partial / f"part-{rank:05d}.json" for rank in range(self.world_size)]
        end = time.monotonic() + OTHERS_WAIT
        while missing := [name for name in names if not name.exists()]:
            if time.monotonic() > end:
                raise OSError(f"{missing[0].stem} of another rank did not appear: is the folder on a shared disk?")
            time.sleep(0.02)
        parts = [json.loads(name.read_text()) for name in names]
        for name in names:
            name.unlink()
        return parts

    def _remove_old(self) -> None:
        for old in checkpoints(self.folder.parent)[: -self.keep]:
            if not (old / MARK).exists():
                _remove(old)

    def _remove_leftovers(self) -> None:
        """What earlier starts of the run did not finish."""
        for leftover in self.folder.glob("*.tmp"):
            if f".{self.attempt}." not in leftover.name:
                shutil.rmtree(leftover, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint that may be there; without its facts it is none, whatever happens to the rest."""
    (checkpoint / FACTS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run / FOLDER).glob(f"step-*/{FACTS}") if not path.parent.suffix)


def is_of_run(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint lies in a run's folder."""
    return checkpoint.resolve().parent == (run / FOLDER).resolve()


def remove_from(run: Path, step: int) -> None:
    """Remove the checkpoints of a run that begins anew at `step`: they would be taken for its own.

    Raises:
        CheckpointError: one of them is marked to stay; nothing is removed then.
    """
    later = [path for path in checkpoints(run) if read_facts(path).step > step]
    if kept := [path for path in later if (path / MARK).exists()]:
        raise CheckpointError(
            f"{kept[0]} is later than step {step}, where the run is to begin, and marked {MARK}: move it out of the "
            "run's folder, or choose another folder"
        )
    for path in later:
        _remove(path)


def read_facts(path: Path) -> Facts:
    """What a checkpoint says of itself; raises CheckpointError."""
    try:
        raw = json.loads((path / FACTS).read_text())
        if raw.get("schema") != SCHEMA:
            raise CheckpointError(f"{path} has schema {raw.get('schema')!r}, this version reads {SCHEMA!r}")
        return Facts(**raw)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint ({FACTS} is missing)") from None
    except (OSError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / FACTS} is damaged ({error}): {WAY_OUT}") from None


def read_tensors(path: Path, facts: Facts) -> dict[str, Tensor]:
    """All tensors of a checkpoint, checked against its digests; raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    for part in facts.parts:
        file = path / Path(part["file"]).name
        try:
            encoded = file.read_bytes()
            if hashlib.sha256(encoded).hexdigest() != part["sha256"]:
                raise CheckpointError(f"{file} is damaged (sha256): {WAY_OUT}")
            tensors |= load_tensors(encoded)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): {WAY_OUT}") from None
    return tensors


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of named tensors on the CPU, in the order of their names."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()
