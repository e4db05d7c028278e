"""A rank's share of the objective: its own rows against the columns of all ranks, and what they tell each other.

Two collectives a step, whatever the number of ranks R:

    gather          normalised projections, targets, me-max's [K] vector, and what each rank says of itself
    reduce-scatter  the gradient of every rank's projections as columns; the terms and a count of faults ride along

Logits are not gathered. Time and memory of a share fall with R: 2B / R rows instead of 2B. With `loss.scope: local` a
rank's columns are its own, and the two carry only what is told.
"""

from collections.abc import Sequence
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
    to_float32,
)
from sptnet.strategy.collectives import gather_packed, rank, sum_scattered, summed, world_size

LARGEST_BLOCK = 2**24  # entries of a similarity matrix that are computed at a time: 64 MiB in float32
LABELLED_STRIDE = 2  # the data order deals labelled and unlabelled slots in turn, a labelled one first


class RankStatus(NamedTuple):
    """What a rank tells the others with a step: whether it was asked to stop, and how many samples it replaced."""

    stop: bool = False
    replaced: int = 0


NO_STATUS = RankStatus()


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
    said: RankStatus = NO_STATUS,
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
    place = rank() * images if labelled is None else 0  # where this slice begins in the order of slots
    with torch.autocast(logits.device.type, enabled=False), torch.enable_grad():
        leaves = [to_float32(outputs.detach()).requires_grad_() for outputs in (projections, logits)]
        unit, own = F.normalize(leaves[0], dim=1), leaves[1]
        known = _known(targets, labelled, place)
        log_sum = log_sum_of_predictions(own, loss.student_temperature)
        (used, finite, asked), of_batch = _told_by_all(leaves, [unit, known, log_sum], said, whole)
        # every other row is labelled where all slices are laid end to end in the order of slots, or begin alike
        in_turn = labelled is None and (whole or images % LABELLED_STRIDE == 0)
        batch = _batch_of(of_batch, images, LABELLED_STRIDE if in_turn else 1, whole)
        log_sums = _with_own(of_batch[2], log_sum, whole)
        value, mine = _by_own_rows(loss, own, known, log_sums, batch, teacher_temperature)
        of_unit, terms, fault = _by_contrast(loss, unit, mine, batch, ranks, whole)
        gradients = torch.autograd.grad([unit, value], leaves, [of_unit, torch.ones_like(value)])
    of_projections, of_logits = (gradient if whole else gradient / ranks for gradient in gradients)
    return Share(
        GCDTerms(loss.weighted(*terms), *terms), (of_projections, of_logits), fault + (~finite).sum(), ~finite,
        asked.sum(0), used.any(0),
    )  # fmt: skip


class _Batch(NamedTuple):
    """The whole batch, as this rank sees it, or its own slice where objectives are local.

    Attributes:
        columns: projections and targets.
        first: where this rank's rows begin.
        parts: how many slices it consists of.
        outputs: 2B, of the batch. labels: how many rows are labelled, a scalar on the device.
    """

    columns: Columns
    first: int
    parts: int
    outputs: float
    labels: Tensor


def _told_by_all(
    leaves: Sequence[Tensor], mine: list[Tensor], said: RankStatus, whole: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The first collective: what every rank says of itself, and its part of the batch, [R, ...] each.

    Args:
        leaves: projections and logits.
        mine: [2b, P] normalised projections, [b] known targets, me-max's [K]; they travel where the batch is whole.
    """
    own = leaves[1]
    finite = torch.isfinite(leaves[0]).all() & torch.isfinite(own).all()
    used = torch.zeros(own.shape[1], dtype=torch.bool, device=own.device)
    used = used.index_fill_(0, own.detach().argmax(1), True)
    asked = torch.stack([own.new_full((), float(said.stop)), own.new_full((), float(said.replaced))]).detach()
    gathered = gather_packed([used, finite, asked, *(mine if whole else [])])
    return gathered[:3], gathered[3:] if whole else [tensor.detach()[None] for tensor in mine]


def _batch_of(of_batch: Sequence[Tensor], images: int, stride: int, whole: bool) -> _Batch:
    first, parts = (rank() * images, world_size()) if whole else (0, 1)
    # [R, 2b, D] -> [R, 2, b, D] -> [2, R, b, D] -> [2B, D]
    projected = of_batch[0].unflatten(1, (2, images)).transpose(0, 1).flatten(0, 2).detach()
    columns = Columns(projected, of_batch[1].flatten(), stride)
    return _Batch(columns, first, parts, 2.0 * images * parts, columns.labelled_rows())


def _with_own(log_sums: Tensor, own: Tensor, whole: bool) -> Tensor:
    """[R, K] with this rank's own row as the graph has it."""
    if not whole:
        return own[None]
    return torch.cat([log_sums[: rank()], own[None], log_sums[rank() + 1 :]])


def _by_own_rows(
    loss: GCDLoss, own: Tensor, known: Tensor, log_sums: Tensor, batch: _Batch, teacher_temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """What needs logits only: its weighted sum, with a graph, and the terms cls, distill, me_max of this rank."""
    me_max = entropy_gap(log_sums, int(batch.outputs))
    cls = classification(own, known, batch.first, batch.columns.stride, loss.student_temperature) / batch.labels
    distill = self_distillation(own, loss.student_temperature, teacher_temperature) / batch.outputs
    nothing = torch.zeros_like(cls)
    return loss.weighted(cls, distill, me_max, nothing, nothing), [cls, distill, me_max / batch.parts]


def _by_contrast(
    loss: GCDLoss, unit: Tensor, terms: Sequence[Tensor], batch: _Batch, ranks: int, whole: bool
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    """The contrastive terms, and the second collective.

    Returns:
        The gradient of `unit`, what other ranks' rows have of it among it; all five terms of the batch; and how many
        ranks have a term that is not finite.
    """
    nce, sup, of_rows, of_columns = _contrasts(
        loss, unit.detach().unflatten(0, (2, -1)), batch.first, batch.columns, batch.outputs, batch.labels
    )
    mine = torch.stack([*terms, nce, sup]).detach()
    fault = (~torch.isfinite(mine).all()).to(mine.dtype)[None]
    if whole:
        # [2B, D] -> [2, R, b, D] -> [R, 2b * D], and behind each rank's row what all are told alike
        by_rank = of_columns.unflatten(0, (2, ranks, -1)).transpose(0, 1).flatten(1)
        summed_up = sum_scattered(torch.cat([by_rank, torch.cat([mine, fault]).expand(ranks, -1)], dim=1))
        of_columns, mine, fault = summed_up.split([by_rank.shape[1], len(mine), 1])
    else:
        mine, fault = summed([mine / ranks, fault])
    return of_rows.flatten(0, 1) + of_columns.view_as(unit), mine.unbind(), fault[0]


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
