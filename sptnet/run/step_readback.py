"""What the host learns of a step while the next one is under way."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sptnet.data.batches import Batch
from sptnet.method.losses import GCDTerms
from sptnet.run.metrics_log import MetricsLog
from sptnet.run.tolerance import NonFiniteGuard, ReplacedSamples
from sptnet.steps import Flags, Taken
from sptnet.strategy.readback import Readback

Used = NDArray[np.bool_]


class _Pending(NamedTuple):
    batch: Batch
    taken: Taken
    facts: dict[str, Any]
    told: Readback  # flags, terms and which classes were predicted, one behind the other
    launched: float


class StepReadback:
    """Reads what a step found when the next one has been launched, and tells guard, counts and log of it.

    The flags are the same on every rank, so that all ranks raise, or stop, at the same step.

    Args:
        note: is told of every step when it is over, with the second at which it had been launched, and the classes [K]
            that it predicted.

    Attributes:
        stop: whether any rank was asked to stop, as far as steps have been followed.
    """

    def __init__(
        self, guard: NonFiniteGuard, replaced: ReplacedSamples, note: Callable[[Taken, float, Used], None],
        log: MetricsLog,
    ):  # fmt: skip
        self._guard, self._replaced, self._note, self._log = guard, replaced, note, log
        self.stop = False
        self._pending: _Pending | None = None

    def follow(self, batch: Batch, taken: Taken, facts: dict[str, Any]) -> None:
        """A step was launched: learn of the one before.

        Args:
            facts: what metrics.jsonl is to tell of the step launched.

        Raises:
            NonFiniteError, DatasetError: of the step before, on all ranks.
        """
        told = torch.cat([taken.flags, torch.stack(list(taken.terms)), taken.used.to(taken.flags.dtype)])
        before, self._pending = self._pending, _Pending(batch, taken, facts, Readback(told), perf_counter())
        if before is not None:
            self._learn(before)

    def catch_up(self) -> None:
        """Learn of the step launched last, waiting for it; raises as `follow`."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            self._learn(before)

    def _learn(self, step: _Pending) -> None:
        told, behind = step.told.read(), len(Flags._fields) + len(GCDTerms._fields)
        flags, terms = Flags(*told[: len(Flags._fields)].tolist()), told[len(Flags._fields) : behind].tolist()
        self._guard.judge(flags, step.taken, step.batch.uids)
        self._replaced.add(int(flags.replaced), step.taken.step)
        self.stop = self.stop or flags.stop > 0
        # here, not when it was launched: a write tells of the steps in it
        self._note(step.taken, step.launched, told[behind:] > 0)
        self._log.step(step.facts | self._replaced.told() | self._guard.told(), terms)
