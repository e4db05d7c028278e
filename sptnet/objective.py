"""A rank's share of the objective: its own rows against the columns of all ranks, and what they tell each other.

Two collectives a step, whatever the number of ranks R:

    gather          normalised projections, targets, me-max's [K] vector, and what each rank says of itself
    reduce-scatter  the gradient of every rank's projections as columns; the terms and a count of faults ride along

Logits are not gathered. Time and memory of a share fall with R: 2B / R rows instead of 2B. With `loss.scope: local` a
rank's columns are its own, and the two carry only what is told.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sptnet.method.losses import (
    UNLABELLED,
    Columns,
    GCDLoss,
    GCDTerms,
    classification,
    entropy_gap,
    log_sum_of_predictions,
    self_distillation,
    widened,
)
from sptnet.strategy.collectives import gather_packed, rank, sum_scattered, summed, world_size

LARGEST_BLOCK = 2**24  # entries of a similarity matrix that are computed at a time: 64 MiB in float32
LABELLED_STRIDE = 2  # the data order deals labelled and unlabelled slots in turn, a labelled one first


class Said(NamedTuple):
    """What a rank tells the others with a step: whether it was asked to stop, and how many samples it replaced."""

    stop: bool = False
    replaced: int = 0


NOTHING = Said()


class Share(NamedTuple):
    """What comes of a step's outputs; all of it stays on the device.

    Attributes:
        terms: of the global batch, without a graph.
        gradients: of this rank's projections and logits, so scaled that the *sum* over the ranks of what they lead to
            is the gradient of the global objective.
        faults: 0 where the outputs and terms of all ranks are finite, a scalar.
        faulty: [R] bool, the ranks whose outputs are not.
        asked: how many ranks were asked to stop, and how many samples all of them replaced, [2].
        used: [K] bool, classes that were predicted for any image of the batch.
    """

    terms: GCDTerms
    gradients: tuple[Tensor, Tensor]
    faults: Tensor
    faulty: Tensor
    asked: Tensor
    used: Tensor


def share_of(
    loss: GCDLoss,
    projections: Tensor,
    logits: Tensor,
    targets: Tensor,
    labelled: Tensor | None,
    teacher_temperature: float,
    said: Said = NOTHING,
    whole: bool = True,
) -> Share:
    """Compute this rank's share; all ranks call it.

    Args:
        projections, logits: [2b, P], [2b, K], the first views of this rank's slice, then the second ones.
        targets: [b]; what it says of unlabelled images is not looked at.
        labelled: [b] bool; None: every other image of the global batch, as the data order deals them.
        whole: over the global batch; False: every rank's own objective, averaged, as SimGCD computes it.
    """
    ranks, images = world_size(), len(targets)
    first, parts = (rank() * images, ranks) if whole else (0, 1)
    place = rank() * images if labelled is None else 0  # where this slice begins in the order of slots
    with torch.autocast(logits.device.type, enabled=False), torch.enable_grad():
        leaves = [widened(outputs.detach()).requires_grad_() for outputs in (projections, logits)]
        unit, own = F.normalize(leaves[0], dim=1), leaves[1]
        known = _known(targets, labelled, place)
        log_sum = log_sum_of_predictions(own, loss.student_temperature)
        finite = torch.isfinite(leaves[0]).all() & torch.isfinite(own).all()
        used = torch.zeros(own.shape[1], dtype=torch.bool, device=own.device).index_fill_(
            0, own.detach().argmax(1), True
        )
        told = torch.stack([own.new_full((), float(said.stop)), own.new_full((), float(said.replaced))]).detach()
        gathered = gather_packed([used, finite, told] + ([unit, known, log_sum] if whole else []))
        (used, finite, told), of_batch = (
            gathered[:3],
            gathered[3:] if whole else [unit.detach()[None], known[None], log_sum[None]],
        )

        # [R, 2b, D] -> [R, 2, b, D] -> [2, R, b, D] -> [2B, D]
        projected = of_batch[0].unflatten(1, (2, images)).transpose(0, 1).flatten(0, 2).detach()
        stride = LABELLED_STRIDE if labelled is None and (whole or images % LABELLED_STRIDE == 0) else 1
        columns = Columns(projected, of_batch[1].flatten(), stride)
        outputs, labels = 2.0 * images * parts, columns.labelled_rows()
        log_sums = (
            torch.cat([of_batch[2][: rank()], log_sum[None], of_batch[2][rank() + 1 :]]) if whole else log_sum[None]
        )
        me_max = entropy_gap(log_sums, 2 * images * parts)
        cls = classification(own, known, first, stride, loss.student_temperature) / labels
        distill = self_distillation(own, loss.student_temperature, teacher_temperature) / outputs
        nothing = torch.zeros_like(cls)
        value = loss.weighted(cls, distill, me_max, nothing, nothing)

        nce, sup, of_rows, of_columns = _contrasts(
            loss, unit.detach().unflatten(0, (2, -1)), first, columns, outputs, labels
        )
        mine = torch.stack([cls, distill, me_max / parts, nce, sup]).detach()
        fault = (~torch.isfinite(mine).all()).to(mine.dtype)[None]
        if whole:
            # [2B, D] -> [2, R, b, D] -> [R, 2b * D], and behind each rank's row what all are told alike
            by_rank = of_columns.unflatten(0, (2, ranks, images)).transpose(0, 1).flatten(1)
            summed_up = sum_scattered(torch.cat([by_rank, torch.cat([mine, fault]).expand(ranks, -1)], dim=1))
            of_columns, mine, fault = summed_up.split([by_rank.shape[1], len(mine), 1])
        else:
            mine, fault = summed([mine / ranks, fault])
        of_unit = of_rows.flatten(0, 1) + of_columns.view_as(unit)
        gradients = torch.autograd.grad([unit, value], leaves, [of_unit, torch.ones_like(value)])
    of_projections, of_logits = (gradient if whole else gradient / ranks for gradient in gradients)
    faults = fault[0] + (~finite).sum()
    terms = GCDTerms(loss.weighted(*mine), *mine)
    return Share(terms, (of_projections, of_logits), faults, ~finite, told.sum(0), used.any(0))


def _known(targets: Tensor, labelled: Tensor | None, place: int) -> Tensor:
    """The targets of labelled images, UNLABELLED for the others."""
    if labelled is not None:
        return torch.where(labelled, targets, UNLABELLED)
    known, theirs = torch.full_like(targets, UNLABELLED), slice(-place % LABELLED_STRIDE, None, LABELLED_STRIDE)
    known[theirs] = targets[theirs]
    return known


def _contrasts(
    loss: GCDLoss, rows: Tensor, first: int, columns: Columns, outputs: float, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE and SupCon of the rows [2, b, D], shares of the mean, and the gradient of both by rows and by columns.

    Block by block: what is in memory does not grow with the square of the batch.
    """
    nce, sup = rows.new_zeros(()), rows.new_zeros(())
    of_rows, of_columns = torch.zeros_like(rows), torch.zeros_like(columns.projections)
    step = max(1, LARGEST_BLOCK // (2 * len(columns.projections)))
    for begin in range(0, rows.shape[1], step):
        block = rows[:, begin : begin + step].detach().requires_grad_()
        theirs = columns.projections.detach().requires_grad_()
        parts = loss.contrast(block, first + begin, columns._replace(projections=theirs))
        parts = parts[0] / outputs, parts[1] / labels
        nothing = torch.zeros_like(nce)
        by_rows, by_columns = torch.autograd.grad(loss.weighted(nothing, nothing, nothing, *parts), [block, theirs])
        of_rows[:, begin : begin + step] = by_rows
        of_columns += by_columns
        nce, sup = nce + parts[0].detach(), sup + parts[1].detach()
    return nce, sup, of_rows, of_columns
