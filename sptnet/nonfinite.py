"""What a run does about a loss or gradient that is not finite: stop, or leave the step out and go on."""

import logging

from torch import Tensor

from sptnet.collectives import rank
from sptnet.config import Config
from sptnet.data.loader import Batch
from sptnet.losses import GCDTerms
from sptnet.steps import Learner, NonFiniteStep

log = logging.getLogger(__name__)


class NonFiniteGuard:
    """Takes steps, and counts those it left out.

    Attributes:
        skipped: steps left out since the run began.
    """

    def __init__(self, config: Config):
        self.skip, self.limit, self.skipped = config.on_nonfinite == "skip", config.skip_limit, 0

    def told(self) -> dict[str, object]:
        """What metrics.jsonl tells of it: `skipped_steps`, once there are any."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    def step(self, learner: Learner, batch: Batch, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms | None:
        """The step's terms, or None if it was left out, on all ranks alike.

        Raises:
            FloatingPointError: the run is to stop; the message names rank, phase, step and the images of this rank.
        """
        try:
            return learner.step(batch.step, views, targets, labelled)
        except NonFiniteStep as met:
            where = f"on rank {', '.join(map(str, met.ranks))}" if met.ranks else "in the loss or its gradient"
            told = (
                f"rank {rank()}: a value is not finite {where}, {met.phase} phase, step {met.step}; this rank's images "
                f"are uid {', '.join(map(str, batch.uids.tolist()))}; nothing was changed by this step"
            )
            if not self.skip:
                raise FloatingPointError(f"{told}: lower the learning rate, or set on_nonfinite: skip") from None
            self.skipped += 1
            if self.skipped > self.limit:
                raise FloatingPointError(
                    f"{told}; {self.skipped} steps were skipped, skip_limit is {self.limit}"
                ) from None
            log.warning("%s; skipped", told)
            return None
