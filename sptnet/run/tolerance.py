"""What a run tolerates, counted and limited: steps that are not finite are left out, damaged samples are replaced."""

import logging

from torch import Tensor

from sptnet.config import Config
from sptnet.data.batches import Batch
from sptnet.data.format.faults import DatasetError
from sptnet.errors import SptnetError
from sptnet.steps import Flags, Taken
from sptnet.strategy.collectives import gather_packed, rank

LONGEST_SEARCH = 50  # steps: from 2^16 a scale has come to nothing long before
log = logging.getLogger(__name__)


class NonFiniteError(SptnetError, FloatingPointError):
    """A loss or gradient that is not finite, which ends the run."""

    on_all_ranks = True


class NonFiniteGuard:
    """Looks at what steps did, and ends the run at one that was not finite, or counts it.

    Args:
        scaled: whether a loss scaler may leave out steps, which is how it finds its scale: those are only counted.

    Attributes:
        skipped: steps left out since the run began.
        faulty: those of them that were no search of fp16 for its loss scale.
        in_a_row: the model steps of that search since the last one that was taken.
    """

    def __init__(self, config: Config, scaled: bool = False):
        self.skip, self.limit, self.scaled = config.on_nonfinite == "skip", config.skip_limit, scaled
        self.skipped = self.faulty = self.in_a_row = 0

    def told(self) -> dict[str, object]:
        """What metrics.jsonl tells of it: `skipped_steps`, once there are any."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    def judge(self, flags: Flags, taken: Taken, uids: Tensor) -> None:
        """Look at a step whose flags are known; all ranks call it.

        Args:
            uids: of this rank's images.

        Raises:
            NonFiniteError: the run is to stop; the message, the same on every rank, names phase, step, the ranks
                whose outputs were not finite, and their images (all images, if it was the loss or the gradient).
        """
        if not flags.left_out:
            self.in_a_row = 0 if taken.phase == "model" else self.in_a_row
            return
        self.skipped += 1
        if self.scaled and taken.phase == "model" and not flags.faults:
            self.in_a_row += 1
            if self.in_a_row > LONGEST_SEARCH:
                raise NonFiniteError(
                    f"no loss scale of fp16 was found: {self.in_a_row} model steps in a row were left out, the last is "
                    f"step {taken.step}; lower the learning rate, or use bf16"
                )
            return
        self.faulty += 1
        # a launcher ends the others as soon as one rank has ended: whichever is left to tell must know all
        (of_ranks,) = gather_packed([uids.to(taken.faulty.device)])
        ranks = taken.faulty.nonzero().flatten().tolist()
        images = of_ranks[ranks or slice(None)].flatten().tolist()
        where = f"the outputs of rank {', '.join(map(str, ranks))}" if ranks else "the loss or its gradient"
        told = (
            f"a value is not finite in {where}, {taken.phase} phase, step {taken.step}; the images are uid "
            f"{', '.join(map(str, images))}; nothing was changed by this step"
        )
        if not self.skip:
            raise NonFiniteError(f"{told}: lower the learning rate, or set on_nonfinite: skip")
        if self.faulty > self.limit:
            raise NonFiniteError(f"{told}; {self.faulty} steps were skipped, skip_limit is {self.limit}")
        if rank() == 0:
            log.warning("%s; skipped", told)


class ReplacedSamples:
    """Damaged samples that a run replaced: told where they were met, counted over all ranks, limited.

    Args:
        limit: `data.tolerate_bad_samples`.
    """

    def __init__(self, limit: int):
        self.limit, self.total = limit, 0

    def told(self) -> dict[str, object]:
        """What metrics.jsonl tells of it: `bad_samples`, replaced so far on all ranks together."""
        return {"bad_samples": self.total} if self.limit else {}

    def told_where_met(self, batch: Batch) -> int:
        """Tell of those that this rank replaced in a batch; their number."""
        for reason in batch.replaced:
            log.warning("rank %d, step %d: replaced a sample: %s", rank(), batch.step, reason)
        return len(batch.replaced)

    def add(self, count: int, step: int) -> None:
        """Count what all ranks together replaced in a step.

        Raises:
            DatasetError: more than the limit.
        """
        self.total += count
        if self.total > self.limit:
            raise DatasetError(
                f"rank {rank()}: {self.total} damaged samples by step {step}, more than "
                f"data.tolerate_bad_samples = {self.limit}: verify the shards"
            )
