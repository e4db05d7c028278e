"""The two steps that SPTNet alternates (ICLR 2024, section 3.3, algorithm 1), and SimGCD's single one.

A step's loss is that of the global batch: the outputs come first, the objective gives their gradient, and that goes
back through the network (sptnet/objective.py). With `micro_batches` the outputs come without a graph, and every piece
is computed again with one: the same gradient, of less memory and one more forward pass. In the model phase that is one
more of the trained blocks: the tokens that the frozen ones make of every piece are kept for both passes.

The host waits for nothing. Whether a step is finite is found on the device, which leaves everything as it was where it
is not; the host is told with `Taken.flags`, a step later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sptnet.method.losses import GCDLoss, GCDTerms
from sptnet.method.model import Outputs
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Phase, Schedule
from sptnet.names import PromptedPair
from sptnet.objective import NO_STATUS, RankStatus, Share, share_of
from sptnet.strategy.base import Strategy, left_out_where, not_finite
from sptnet.strategy.collectives import summed

Forward = Callable[[Tensor], Outputs]  # [V, b, 3, H, W] -> outputs of 2b images, view-major
PROJECTIONS, LOGITS = 1, 2  # fields of Outputs
HALVES = 2  # of a batch's outputs: two views, or an image and its prompted copy
VIEWS_NDIM = 5  # of views, [V, b, 3, H, W]; tokens have one fewer


class Flags(NamedTuple):
    """What the device found of a step; numbers, not 0 where it is so.

    faults: outputs or a term are not finite. left_out: nothing was changed, for a gradient that is not finite too.
    stop: ranks that were asked to stop. replaced: damaged samples that ranks replaced.
    """

    faults: float
    left_out: float
    stop: float
    replaced: float


class Taken(NamedTuple):
    """A step that is on its way; tensors are on the device, and reading them waits for it.

    Attributes:
        terms: of the global batch, detached; nan where the step was left out.
        flags: the fields of `Flags`, the same on every rank.
        faulty: [R] bool, the ranks whose outputs are not finite.
        used: [K] bool, the classes that were predicted.
    """

    step: int
    phase: Phase
    terms: GCDTerms
    flags: Tensor
    faulty: Tensor
    used: Tensor


@dataclass(frozen=True)
class ViewsAt:
    """How many augmented views a step looks at: two, or one where the model phase pairs it with its own prompted copy.

    Small, since every loader worker gets a copy by pickle.
    """

    schedule: Schedule
    copies: bool

    def __call__(self, step: int) -> int:
        return 1 if self.copies and self.schedule.phase(step) == "model" else 2


@dataclass
class Learner:
    """Everything a step changes or reads; the batch comes from outside.

    Attributes:
        prompt, prompt_optimizer: None for SimGCD.
        global_loss: over the whole batch; False computes every rank's own and averages them, as SimGCD does.
        micro_batches: pieces in which a rank computes its slice.
        pair: what the model phase pairs with a prompted one: the same view, as published, or the other view.
    """

    strategy: Strategy
    loss: GCDLoss
    schedule: Schedule
    prompt: Prompt | None = None
    prompt_optimizer: torch.optim.Optimizer | None = None
    global_loss: bool = True
    micro_batches: int = 1
    pair: PromptedPair = "copy"

    @property
    def views_at(self) -> ViewsAt:
        """How many augmented views a step looks at."""
        return ViewsAt(self.schedule, self.prompt is not None and self.pair == "copy")

    def step(
        self, step: int, views: Tensor, targets: Tensor, labelled: Tensor | None, said: RankStatus = NO_STATUS
    ) -> Taken:
        """Take global step `step`, or, where it is not finite, leave weights, prompts and momentum as they were.

        Args:
            views: float [V, b, 3, H, W], normalised, or [V, b, T, D], tokens: this rank's slice of the global batch.
            targets: [b].
            labelled: [b] bool; None: every other image of the global batch, as the data order deals them.
            said: what the other ranks are to know.
        """
        pieces = views.chunk(self.micro_batches, dim=1)
        if self.schedule.phase(step) == "prompt":
            share, left_out = self._prompt_step(step, pieces, targets, labelled, said)
        else:
            share, left_out = self._model_step(step, pieces, targets, labelled, said)
        terms = torch.where(left_out > 0, torch.nan, torch.stack(list(share.terms)))
        flags = torch.cat([torch.stack([share.faults, left_out]), share.asked]).float()
        return Taken(step, self.schedule.phase(step), GCDTerms(*terms.unbind()), flags, share.faulty, share.used)

    def _prompt_step(
        self, step: int, pieces: Sequence[Tensor], targets: Tensor, labelled: Tensor | None, said: RankStatus
    ) -> tuple[Share, Tensor]:
        assert self.prompt is not None
        assert self.prompt_optimizer is not None
        prompt, parameters = self.prompt, list(self.prompt.parameters())

        def forward(piece: Tensor) -> Outputs:
            return self.strategy.forward_prompt_phase(piece.flatten(0, 1), prompt())

        share, losses = self._losses(step, forward, pieces, targets, labelled, said)
        scale = self.strategy.prompt_loss_scale
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for loss in losses:
            for total, part in zip(gradients, torch.autograd.grad(loss() * scale, parameters), strict=True):
                total += part / scale
        gradients = summed(gradients)
        left_out = torch.maximum(not_finite(gradients), share.faults)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self.prompt_optimizer.param_groups:
            group["lr"] = self.schedule.prompt_lr_at(step)
        with left_out_where(left_out, self.prompt_optimizer):
            self.prompt_optimizer.step()
        return share, left_out

    def _model_step(
        self, step: int, pieces: Sequence[Tensor], targets: Tensor, labelled: Tensor | None, said: RankStatus
    ) -> tuple[Share, Tensor]:
        prompt = None if self.prompt is None else self.prompt().detach()
        if prompt is not None and self.pair == "copy":
            pieces = [piece[:1] for piece in pieces]
        frozen = self.strategy.module.train_from_block > 0 and pieces[0].ndim == VIEWS_NDIM
        if len(pieces) > 1 and frozen and self.strategy.parts_trunk:
            # [2 * p, T, D] view-major -> [2, p, T, D]
            kept = [self.strategy.forward_trunk(*_looked_at(piece, prompt)) for piece in pieces]
            pieces, prompt = [tokens.unflatten(0, (HALVES, -1)) for tokens in kept], None

        def forward(piece: Tensor) -> Outputs:
            return self.strategy.forward_model_phase(*_looked_at(piece, prompt))

        share, losses = self._losses(step, forward, pieces, targets, labelled, said)
        self.strategy.backward_model(losses)
        return share, self.strategy.step_model(self.schedule.model_lr_at(step), share.faults)

    def _losses(
        self,
        step: int,
        forward: Forward,
        pieces: Sequence[Tensor],
        targets: Tensor,
        labelled: Tensor | None,
        said: RankStatus,
    ) -> tuple[Share, Sequence[Callable[[], Tensor]]]:
        """This rank's share, and functions whose results, one after the other, lead its gradient into the network."""
        whole = len(pieces) == 1
        with torch.set_grad_enabled(whole):
            parts = [forward(piece) for piece in pieces]
        projections, logits = (_side_by_side([part[i] for part in parts]) for i in (PROJECTIONS, LOGITS))
        share = share_of(
            self.loss, projections, logits, targets, labelled, self.schedule.teacher_temperature_at(step), said,
            self.global_loss,
        )  # fmt: skip
        if whole:
            return share, [partial(_vjp_loss, parts[0], share.gradients)]
        sizes = [piece.shape[1] for piece in pieces]
        # [2 * b, ...] view-major -> pieces [2, p, ...] -> [2 * p, ...] view-major
        split = [g.unflatten(0, (HALVES, -1)).split(sizes, 1) for g in share.gradients]
        shares = [[part.flatten(0, 1) for part in of_piece] for of_piece in zip(*split, strict=True)]
        return share, [lambda p=p, s=s: _vjp_loss(forward(p), s) for p, s in zip(pieces, shares, strict=True)]


def _looked_at(piece: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """What the model phase gives the model: images, a prompt or None, whether the images are wanted without it too.

    Args:
        piece: [2, p, ...], of which the second view is prompted where there is a prompt, or [1, p, 3, H, W], of which
            the prompt makes a second.
    """
    if prompt is None:
        return piece.flatten(0, 1), None, False
    if len(piece) == HALVES:  # on the pixels, since the patch embedding adds one prompt to all images or to none
        return torch.cat([piece[0], piece[1] + prompt]), None, False
    return piece[0], prompt, True


def _vjp_loss(outputs: Outputs, gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient by the outputs is `gradients`."""
    return (outputs.projections * gradients[0]).sum() + (outputs.logits * gradients[1]).sum()


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Outputs of pieces, [2 * p, ...] view-major each -> of all of them, [2 * b, ...] view-major."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (HALVES, -1)) for part in parts], 1).flatten(0, 1)
