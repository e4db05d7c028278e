"""The GCD objective of SimGCD (ICCV 2023, section 4), which SPTNet optimises in both of its phases.

    total = (1 - w) (distill + xi me_max) + w cls + (1 - w) info_nce + w sup_con

It is a function of the *global* batch, written by rows: the terms of some of its images are sums that need, beside
their own outputs, the projections of all images (`Columns`), and one [K] vector per part of the batch for me-max. The
sums of all parts, divided by counts of the whole, are the objective; `GCDLoss.__call__` has one part, and
sptnet/objective.py one per rank. Everything is computed in float32 (in float64 where the inputs are), whatever autocast
says.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

UNLABELLED = -1  # the target of an image that no supervised term looks at


class GCDTerms(NamedTuple):
    """The objective and its five terms, scalars; only `total` carries the weights."""

    total: Tensor
    cls: Tensor
    distill: Tensor
    me_max: Tensor
    info_nce: Tensor
    sup_con: Tensor


class Columns(NamedTuple):
    """What every row is compared with.

    Attributes:
        projections: [2B, D], unit length, the first views of the global batch, then the second ones.
        targets: [B] int64, UNLABELLED where an image has no label.
        stride: labelled are none but images 0, stride, 2 stride, ... of the global batch: a slice instead of a mask.
    """

    projections: Tensor
    targets: Tensor
    stride: int

    def labelled_rows(self) -> Tensor:
        """How many outputs of the batch are of labelled images, a scalar, 1 where there are none."""
        return (2 * (self.targets >= 0).sum()).clamp(min=1)


def to_float32(outputs: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def self_distillation(logits: Tensor, student_temperature: float, teacher_temperature: float) -> Tensor:
    """Cross-entropy of each view against the sharpened, detached prediction of the other, summed. logits: [2n, K]."""
    student = F.log_softmax(logits / student_temperature, dim=1).chunk(2)
    teacher = F.softmax(logits.detach() / teacher_temperature, dim=1).chunk(2)
    crossed = [-(teacher[1 - view] * student[view]).sum() for view in (0, 1)]
    return crossed[0] + crossed[1]


def log_sum_of_predictions(logits: Tensor, student_temperature: float) -> Tensor:
    """Log of the sum of the predictions, [K]: all that me-max needs of logits [n, K]."""
    return torch.logsumexp(F.log_softmax(logits / student_temperature, dim=1), dim=0)


def entropy_gap(log_sums: Tensor, count: int) -> Tensor:
    """Give log K minus the entropy of the mean prediction, >= 0 and 0 where all classes are used alike.

    In log space: the textbook sum of p log p has infinite gradients where a class's mean prediction underflows.

    Args:
        log_sums: [parts, K], see `log_sum_of_predictions`.
        count: predictions of all parts together.
    """
    log_mean = torch.logsumexp(log_sums, dim=0) - math.log(count)
    return (log_mean.exp() * log_mean).sum() + math.log(log_sums.shape[1])


def mean_entropy_gap(logits: Tensor, student_temperature: float) -> Tensor:
    """`entropy_gap` of logits [N, K] that are all there."""
    return entropy_gap(log_sum_of_predictions(logits, student_temperature)[None], len(logits))


def classification(logits: Tensor, targets: Tensor, first: int, stride: int, student_temperature: float) -> Tensor:
    """Cross-entropy of the labelled, summed.

    Args:
        logits: [2n, K] of images first, first + 1, ... of the global batch.
        targets: [n], UNLABELLED where there is no label.
        first, stride: labelled are none but the multiples of `stride` of the global batch.
    """
    mine = slice(-first % stride, None, stride)
    told = logits.unflatten(0, (2, -1))[:, mine].flatten(0, 1) / student_temperature
    return F.cross_entropy(told, targets[mine].repeat(2), ignore_index=UNLABELLED, reduction="sum")


def contrast(
    rows: Tensor, first: int, columns: Columns, info_nce_temperature: float, sup_con_temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE and SupCon (Khosla et al. 2020, L_out) of some images against all, summed over their rows.

    InfoNCE contrasts every view with all others of the batch, its other view being the positive. SupCon is of labelled
    images only; positives are all views of all samples of the same class.

    Args:
        rows: [2, n, D], both views of images first, first + 1, ... of the global batch, unit length.
    """
    count, batch = rows.shape[1], len(columns.targets)
    similarity = rows.flatten(0, 1) @ columns.projections.T
    image = torch.arange(first, first + count, device=rows.device)
    itself = torch.cat([image, image + batch])
    apart = similarity.scatter(1, itself[:, None], -torch.inf)
    nce = F.cross_entropy(apart / info_nce_temperature, (itself + batch) % (2 * batch), reduction="sum")

    mine, every = slice(-first % columns.stride, None, columns.stride), slice(None, None, columns.stride)
    ours, theirs = columns.targets[first : first + count][mine], columns.targets[every]
    # [2n, 2B] -> [2, n, 2, B] -> the labelled slots -> [2n', 2B']
    similarity, apart = (
        part.view(2, count, 2, batch)[:, mine, :, every].flatten(2, 3).flatten(0, 1) / sup_con_temperature
        for part in (similarity, apart)
    )
    known = ours >= 0
    same = ((ours[:, None] == theirs[None, :]) & known[:, None]).repeat(2, 2)
    positive = same & (apart > -torch.inf)  # not itself
    log_sum = torch.logsumexp(apart.masked_fill(~(theirs >= 0).repeat(2), -torch.inf), dim=1)
    mean = (similarity * positive).sum(1) / positive.sum(1).clamp(min=1)
    sup = torch.where(known.repeat(2), log_sum - mean, 0.0).sum()
    return nce, sup


class GCDLoss:
    """The five-term objective over a global batch of two views.

    Args:
        sup_weight: w, the share of the supervised terms.
        memax_weight: xi, the weight of the mean-entropy regulariser.
        student_temperature, info_nce_temperature, sup_con_temperature: as SimGCD's authors ran it; their section 5.1
            prints the last two the other way round.
    """

    def __init__(
        self,
        sup_weight: float = 0.35,
        memax_weight: float = 1.0,
        student_temperature: float = 0.1,
        info_nce_temperature: float = 1.0,
        sup_con_temperature: float = 0.07,
    ):
        self.sup_weight = sup_weight
        self.memax_weight = memax_weight
        self.student_temperature = student_temperature
        self.info_nce_temperature = info_nce_temperature
        self.sup_con_temperature = sup_con_temperature

    def weighted(self, cls: Tensor, distill: Tensor, me_max: Tensor, info_nce: Tensor, sup_con: Tensor) -> Tensor:
        """The objective of its terms; linear, so also a part's share of it."""
        w = self.sup_weight
        return (1 - w) * (distill + self.memax_weight * me_max) + w * cls + (1 - w) * info_nce + w * sup_con

    def contrast(self, rows: Tensor, first: int, columns: Columns) -> tuple[Tensor, Tensor]:
        """`contrast` at this objective's temperatures."""
        return contrast(rows, first, columns, self.info_nce_temperature, self.sup_con_temperature)

    def __call__(
        self, projections: Tensor, logits: Tensor, targets: Tensor, labelled: Tensor, teacher_temperature: float
    ) -> GCDTerms:
        """Compute the objective of a batch that is all here; training computes the same by rows (sptnet/objective.py).

        Args:
            projections: [2B, D], the first views of the batch, then the second ones.
            logits: [2B, K], in the same order.
            targets: [B], class of every image; what it says of unlabelled images is not looked at.
            labelled: [B] bool. Without a labelled image `cls` and `sup_con` are 0.
            teacher_temperature: the sharpening of this epoch.

        Raises:
            ValueError: lengths that do not fit together.
        """
        if not len(projections) == len(logits) == 2 * len(targets) == 2 * len(labelled):
            raise ValueError(
                f"GCDLoss needs two views of every image: {len(projections)} projections and {len(logits)} logits "
                f"for {len(targets)} targets and {len(labelled)} labelled flags"
            )
        # autocast would run the similarity matrices in half precision even on float32 inputs
        with torch.autocast(logits.device.type, enabled=False):
            logits = to_float32(logits)
            unit = F.normalize(to_float32(projections), dim=1)
            columns = Columns(unit, torch.where(labelled, targets, UNLABELLED), stride=1)
            known = columns.labelled_rows()
            cls = classification(logits, columns.targets, 0, 1, self.student_temperature) / known
            distill = self_distillation(logits, self.student_temperature, teacher_temperature) / len(logits)
            me_max = mean_entropy_gap(logits, self.student_temperature)
            nce, sup = self.contrast(unit.unflatten(0, (2, -1)), 0, columns)
            nce, sup = nce / len(logits), sup / known
            total = self.weighted(cls, distill, me_max, nce, sup)
        return GCDTerms(total, cls, distill, me_max, nce, sup)
