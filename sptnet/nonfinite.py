"""What a run does about a loss or gradient that is not finite: stop, or leave the step out and go on."""

import logging

from torch import Tensor

from sptnet.collectives import gather_with_local_graph, rank
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
            FloatingPointError: the run is to stop; the message, the same on every rank, names phase, step, the ranks
                whose outputs were not finite, and their images (all images, if it was the loss or the gradient).
        """
        try:
            return learner.step(batch.step, views, targets, labelled)
        except NonFiniteStep as met:
            # a launcher ends the others as soon as one rank has ended: whichever is left to tell must know all
            uids = gather_with_local_graph(batch.uids.to(views.device))[met.ranks or slice(None)]
            where = f"the outputs of rank {', '.join(map(str, met.ranks))}" if met.ranks else "the loss or its gradient"
            told = (
                f"a value is not finite in {where}, {met.phase} phase, step {met.step}; the images are uid "
                f"{', '.join(map(str, uids.flatten().tolist()))}; nothing was changed by this step"
            )
            if not self.skip:
                raise FloatingPointError(f"{told}: lower the learning rate, or set on_nonfinite: skip") from None
            self.skipped += 1
            if self.skipped > self.limit:
                raise FloatingPointError(
                    f"{told}; {self.skipped} steps were skipped, skip_limit is {self.limit}"
                ) from None
            if rank() == 0:
                log.warning("%s; skipped", told)
            return None
