"""Checkpoints are written in the background, whole or not at all; what training waits for is gathering the state."""

import hashlib
import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from sptnet.config import Config
from sptnet.data.format.files import sync_folder, write_through
from sptnet.errors import outcome_of_writing
from sptnet.run.checkpoint import FACTS, FOLDER, MARK, CheckpointError, Facts, Part, checkpoints, remove
from sptnet.run.resume import prompt_state
from sptnet.steps import Learner
from sptnet.strategy.collectives import rank, world_size
from sptnet.strategy.launcher import launcher_store

MOST_WRITERS = 8
HURRIED = 60  # seconds that rank 0 waits for the others' parts where the run was asked to stop: it has 110 in all
TOLD_AFTER = 10  # seconds; then it says for whom it waits
ENDING_WAIT = 20  # seconds that a run which fails waits for its own last one; a launcher kills the others after 30
log = logging.getLogger(__name__)


class Saver:
    """Checkpoints of one run: gathers the state, which training waits for, and hands it to a background writer.

    Args:
        numbers, backbone: what every checkpoint of this run says of itself; see sptnet/run/resume.py.
    """

    def __init__(self, config: Config, learner: Learner, numbers: dict[str, Any], backbone: dict[str, str]):
        self.learner, self.numbers, self.backbone, self.full = learner, numbers, backbone, config.checkpoint.full
        self._stall = 0.0
        token = [secrets.token_hex(4)]
        if dist.is_initialized():
            dist.broadcast_object_list(token)
        store = launcher_store("checkpoints", config.collective_timeout_s)
        writers = writers_of(learner.strategy.sharded, world_size())
        # others help to gather what is sharded, and keep nothing
        self._number = writers.index(rank()) if rank() in writers else None
        self._writers, self._writer = len(writers), None
        if self._number is not None:
            self._writer = Writer(Path(config.run), self._number, writers, config.checkpoint.keep, token[0], store,
                                  config.collective_timeout_s)  # fmt: skip

    def save(self, step: int, counters: dict[str, float], hurried: bool = False) -> None:
        """Begin a checkpoint of the state before `step`; all ranks call it. `hurried`: a kill is to be expected.

        Raises:
            CheckpointError: the one before could not be written.
        """
        start = time.perf_counter()
        if hurried and self._writer is not None:
            self._writer.hurry()
        self.wait()
        strategy = self.learner.strategy

        def mine(number: int) -> bool:
            return number % self._writers == self._number

        tensors = strategy.trained_state(mine)
        if self.full:
            frozen = {n: p for n, p in strategy.module.named_parameters() if not p.requires_grad}
            for i, (name, parameter) in enumerate(frozen.items()):
                whole = strategy.full_parameter(parameter)
                if mine(i):
                    tensors[f"model.{name}"] = whole.to("cpu", copy=True)
        if rank() == 0:
            tensors |= prompt_state(self.learner)
        launch = strategy.launch
        written_by: dict[str, str | int] = {
            "strategy": launch.strategy,
            "world_size": launch.world_size,
            "precision": launch.precision,
        }
        if strategy.scaler is not None:
            scaling = strategy.scaler.state_dict()
            steps = scaling["_growth_tracker"] // strategy.scaled_per_step
            counters = counters | {"loss_scale": scaling["scale"], "steps_at_scale": steps}
        if self._writer is not None:
            facts = Facts(step, self.numbers, self.backbone, written_by, counters)
            self._writer.begin(facts, tensors)
        self._stall += time.perf_counter() - start

    def pop_stall_seconds(self) -> float:
        """Seconds that training waited for checkpoints since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def poll(self) -> None:
        """Raise CheckpointError if a checkpoint could not be written."""
        if self._writer is not None:
            self._writer.poll()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises CheckpointError if it could not be written."""
        if self._writer is not None:
            self._writer.wait()

    def finish(self) -> None:
        """Wait for what is being written however the run ends: a thread that the process takes along would lose it, and
        can abort the process where it is in C++ at that moment. Does nothing after `wait`, and raises nothing.
        """
        if self._writer is not None:
            self._writer.finish()


def writers_of(sharded: bool, world_size: int) -> list[int]:
    """The ranks that write a checkpoint: all its files are opened again when a run continues.

    Rank 0 where every rank has the whole state; else at most `MOST_WRITERS`, spread over the nodes.
    """
    count = min(MOST_WRITERS, world_size) if sharded else 1
    return [number * world_size // count for number in range(count)]


class Writer:
    """Writes a run's checkpoints, one at a time, in a thread; some of the ranks have one.

    Args:
        run: the run's folder.
        number, ranks: which of the writers this is, and on which ranks all of them are.
        keep: how many of the newest stay; marked ones stay too.
        attempt: the same on every rank and another in every start of the run, so that what a killed one left unfinished
            is not taken for a part of this one's.
        patience: seconds that the others' parts may take longer than this rank's.
        store: by which writers announce their parts: an NFS client may deny for half a minute that a file is there.
    """

    def __init__(
        self, run: Path, number: int, ranks: Sequence[int], keep: int, attempt: str, store: Store | None = None,
        patience: float = HURRIED,
    ):  # fmt: skip
        self.folder, self.number, self.ranks, self.keep = run / FOLDER, number, ranks, keep
        self.attempt, self._store = attempt, store or HashStore()
        self._patience = patience
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def begin(self, facts: Facts, tensors: dict[str, Tensor]) -> None:
        """Start to write this rank's tensors, which are on the CPU and nobody else's.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(facts, tensors), name="checkpoint", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """From here on wait for the others' parts no longer than a run may that was asked to stop."""
        self._patience = HURRIED

    def poll(self) -> None:
        """Raise the error of a write that failed, if one did."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for what is being written; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def finish(self) -> None:
        """Wait for what is being written, but not for ever; for a run that ends by another error than of a write."""
        if self._thread is not None:
            self._thread.join(ENDING_WAIT)

    def _write(self, facts: Facts, tensors: dict[str, Tensor]) -> None:
        final = self.folder / f"step-{facts.step:09d}"
        partial = final.with_name(f"{final.name}.{self.attempt}.tmp")
        try:
            if self.number == 0:
                self._remove_leftovers()
            partial.mkdir(parents=True, exist_ok=True)
            self._write_part(partial, facts.step, tensors)
            if self.number == 0:
                parts = self._parts_of_all(facts.step)
                whole = replace(facts, parts=parts)
                write_through(partial / FACTS, json.dumps(asdict(whole), indent=1).encode())
                remove(final)
                partial.rename(final)
                sync_folder(self.folder)
                self._remove_old()
        except Exception as error:  # whatever ends this thread must end the run
            stays = self._before()
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            with suppress(Exception):  # the store is gone where rank 0 is
                self._announce(facts.step, {"failed": str(why)})
            self._error = CheckpointError(
                f"{final} cannot be written on rank {self.ranks[self.number]}: {why}; {stays}"
            )
            if isinstance(error, OSError):
                self._error.outcome = outcome_of_writing(error)
            shutil.rmtree(partial, ignore_errors=True)

    def _announce(self, step: int, told: dict[str, Any]) -> None:
        self._store.set(f"{self.attempt}/{step}/{self.number}", json.dumps(told))

    def _write_part(self, partial: Path, step: int, tensors: dict[str, Tensor]) -> None:
        encoded = save_tensors(tensors)
        part = partial / f"part-{self.number:05d}.safetensors"
        write_through(part, encoded)
        told = {"file": part.name, "bytes": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest()}
        self._announce(step, told)  # now that it is on disk

    def _parts_of_all(self, step: int) -> list[Part]:
        parts: list[Part] = []
        begin, told = time.monotonic(), False
        for number, other in enumerate(self.ranks):
            key = f"{self.attempt}/{step}/{number}"
            while not self._store.check([key]):  # not `wait`: it would hold this process's connection to the store
                waited = time.monotonic() - begin
                if waited > self._patience:
                    raise OSError(f"rank {other} did not write its part within {self._patience:g} s")
                if waited > TOLD_AFTER and not told:
                    told = True
                    log.warning("checkpoint of step %d: waiting for the part of rank %d", step, other)
                time.sleep(0.02)
            parts.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
            if "failed" in parts[-1]:
                raise OSError(f"rank {other} could not write its part")
        return parts

    def _before(self) -> str:
        try:
            previous = checkpoints(self.folder.parent)
        except CheckpointError:
            return "those before it stay"
        return f"{previous[-1]} is intact" if previous else "there is none before it"

    def _remove_old(self) -> None:
        with suppress(CheckpointError):  # a disk that fails for a moment; they are removed when the next is written
            for old in checkpoints(self.folder.parent)[: -self.keep]:
                if not (old / MARK).exists():
                    remove(old)

    def _remove_leftovers(self) -> None:
        """What earlier starts of the run did not finish."""
        for leftover in self.folder.glob("*.tmp"):
            if f".{self.attempt}." not in leftover.name:
                shutil.rmtree(leftover, ignore_errors=True)
