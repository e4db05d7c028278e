"""What a run tolerates, counted and limited: steps that are not finite are left out, damaged samples are replaced."""

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from sptnet.config import Config
from sptnet.data.batches import Batch
from sptnet.data.manifest import DatasetError
from sptnet.errors import SptnetError
from sptnet.method.losses import GCDTerms
from sptnet.steps import Learner, NonFiniteStep
from sptnet.strategy.collectives import gather_with_local_graph, rank

log = logging.getLogger(__name__)


class NonFiniteError(SptnetError, FloatingPointError):
    """A loss or gradient that is not finite, which ends the run."""

    on_all_ranks = True


class NonFiniteGuard:
    """Takes steps, and stops at one that is not finite or leaves it out and counts it.

    Attributes:
        skipped: steps left out since the run began, by a loss scaler too.
    """

    def __init__(self, config: Config):
        self.skip, self.limit, self.skipped = config.on_nonfinite == "skip", config.skip_limit, 0

    def told(self) -> dict[str, object]:
        """What metrics.jsonl tells of it: `skipped_steps`, once there are any."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    def step(self, learner: Learner, batch: Batch, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms | None:
        """The step's terms, or None if it was left out, on all ranks alike.

        Raises:
            NonFiniteError: the run is to stop; the message, the same on every rank, names phase, step, the ranks
                whose outputs were not finite, and their images (all images, if it was the loss or the gradient).
        """
        left_out = learner.strategy.left_out
        try:
            terms = learner.step(batch.step, views, targets, labelled)
            self.skipped += learner.strategy.left_out - left_out
            return terms
        except NonFiniteStep as met:
            # a launcher ends the others as soon as one rank has ended: whichever is left to tell must know all
            uids = gather_with_local_graph(batch.uids.to(views.device))[met.ranks or slice(None)]
            where = f"the outputs of rank {', '.join(map(str, met.ranks))}" if met.ranks else "the loss or its gradient"
            told = (
                f"a value is not finite in {where}, {met.phase} phase, step {met.step}; the images are uid "
                f"{', '.join(map(str, uids.flatten().tolist()))}; nothing was changed by this step"
            )
            if not self.skip:
                raise NonFiniteError(f"{told}: lower the learning rate, or set on_nonfinite: skip") from None
            self.skipped += 1
            if self.skipped > self.limit:
                raise NonFiniteError(f"{told}; {self.skipped} steps were skipped, skip_limit is {self.limit}") from None
            if rank() == 0:
                log.warning("%s; skipped", told)
            return None


class ReplacedSamples:
    """Damaged samples that a run replaced: told where they were met, counted over all ranks, limited.

    With a limit of 0 nothing is ever replaced, and no collective is spent on it.

    Args:
        limit: `data.tolerate_bad_samples`.
    """

    def __init__(self, limit: int):
        self.limit, self.total = limit, 0

    def in_step(self, batch: Batch) -> dict[str, object]:
        """What metrics.jsonl tells of a step: `bad_samples`, replaced so far on all ranks together.

        Raises:
            DatasetError: more than the limit; every rank raises it at the same step.
        """
        if self.limit == 0:
            return {}
        for reason in batch.replaced:
            log.warning("rank %d, step %d: replaced a sample: %s", rank(), batch.step, reason)
        count = torch.tensor(len(batch.replaced))
        if dist.is_initialized():
            count = count.cuda() if dist.get_backend() == "nccl" else count
            dist.all_reduce(count)
        self.total += int(count)
        if self.total > self.limit:
            raise DatasetError(
                f"rank {rank()}: {self.total} damaged samples by step {batch.step}, more than "
                f"data.tolerate_bad_samples = {self.limit}: verify the shards"
            )
        return {"bad_samples": self.total}
