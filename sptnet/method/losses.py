"""The GCD objective of SimGCD (ICCV 2023, section 4), which SPTNet optimises in both of its phases.

    total = (1 - w) (distill + xi me_max) + w cls + (1 - w) info_nce + w sup_con

It is a function of the *global* batch: whoever calls it has gathered the outputs of all ranks first. Everything is
computed in float32 whatever the dtype of the inputs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class GCDTerms(NamedTuple):
    """The objective and its five terms, scalars; only `total` carries the weights."""

    total: Tensor
    cls: Tensor
    distill: Tensor
    me_max: Tensor
    info_nce: Tensor
    sup_con: Tensor


def self_distillation(logits: Tensor, student_temperature: float, teacher_temperature: float) -> Tensor:
    """Cross-entropy of each view against the sharpened, detached prediction of the other. logits: [2B, K]."""
    student = F.log_softmax(logits / student_temperature, dim=1).chunk(2)
    teacher = F.softmax(logits.detach() / teacher_temperature, dim=1).chunk(2)
    crossed = [-(teacher[1 - view] * student[view]).sum(1).mean() for view in (0, 1)]
    return (crossed[0] + crossed[1]) / 2


def mean_entropy_gap(logits: Tensor, student_temperature: float) -> Tensor:
    """Give log K minus the entropy of the mean prediction, >= 0 and 0 where all classes are used alike. logits: [N, K].

    In log space: the textbook sum of p log p has infinite gradients where a class's mean prediction underflows.
    """
    log_predictions = F.log_softmax(logits / student_temperature, dim=1)
    log_mean = torch.logsumexp(log_predictions, dim=0) - math.log(len(logits))
    return (log_mean.exp() * log_mean).sum() + math.log(logits.shape[1])


def info_nce(projections: Tensor, temperature: float) -> Tensor:
    """Contrast every view against all others of the batch, its other view being the positive.

    projections: [2B, D], unit length.
    """
    count = len(projections)
    similarity = projections @ projections.T / temperature
    itself = torch.eye(count, dtype=torch.bool, device=projections.device)
    other_view = torch.arange(count, device=projections.device).roll(count // 2)
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), other_view)


def supervised_contrastive(projections: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """SupCon (Khosla et al. 2020, L_out): positives are all views of all samples of the same class.

    projections: [2n, D], unit length; targets: [n]. 0 for n = 0.
    """
    if len(targets) == 0:
        return projections.sum() * 0.0
    targets = targets.repeat(2)
    itself = torch.eye(len(targets), dtype=torch.bool, device=projections.device)
    similarity = projections @ projections.T / temperature
    log_probability = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
    positive = (targets[:, None] == targets[None, :]) & ~itself
    return -((log_probability * positive).sum(1) / positive.sum(1)).mean()


class GCDLoss:
    """The five-term objective over a global batch of two views.

    Args:
        sup_weight: w, the share of the supervised terms.
        memax_weight: xi, the weight of the mean-entropy regulariser.
        student_temperature, info_nce_temperature, sup_con_temperature: as published.
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

    def __call__(
        self, projections: Tensor, logits: Tensor, targets: Tensor, labelled: Tensor, teacher_temperature: float
    ) -> GCDTerms:
        """Compute the objective.

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
            logits = logits.float()
            projections = F.normalize(projections.float(), dim=1)
            both = labelled.repeat(2)
            known = targets[labelled]
            cls = (
                F.cross_entropy(logits[both] / self.student_temperature, known.repeat(2))
                if len(known)
                else logits.sum() * 0.0
            )
            distill = self_distillation(logits, self.student_temperature, teacher_temperature)
            me_max = mean_entropy_gap(logits, self.student_temperature)
            nce = info_nce(projections, self.info_nce_temperature)
            sup = supervised_contrastive(projections[both], known, self.sup_con_temperature)
            w = self.sup_weight
            total = (1 - w) * (distill + self.memax_weight * me_max) + w * cls + (1 - w) * nce + w * sup
        return GCDTerms(total, cls, distill, me_max, nce, sup)
