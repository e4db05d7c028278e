"""Damaged samples that a run replaced: told where they were met, counted over all ranks, limited."""

import logging

import torch
import torch.distributed as dist

from sptnet.collectives import rank
from sptnet.data.loader import Batch
from sptnet.data.manifest import DatasetError

log = logging.getLogger(__name__)


class Replaced:
    """Counts over a run; with a limit of 0 nothing is ever replaced, and no collective is spent on it.

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
