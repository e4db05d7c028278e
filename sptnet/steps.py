"""The two steps that SPTNet alternates (ICLR 2024, section 3.3, algorithm 1), and SimGCD's single one.

A step's loss is that of the global batch. With `micro_batches` the outputs come first, without a graph; the loss gives
their gradient; then every piece is computed again with a graph and takes its share of it: the same gradient, of less
memory and one more forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sptnet.method.losses import GCDLoss, GCDTerms
from sptnet.method.model import Outputs
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Schedule
from sptnet.strategy.base import Strategy
from sptnet.strategy.collectives import gather_views, gather_with_local_graph, world_size

Forward = Callable[[Tensor], Outputs]  # [V, b, 3, H, W] -> outputs of 2b images, view-major
PROJECTIONS, LOGITS = 1, 2  # fields of Outputs
HALVES = 2  # of a batch's outputs: two views, or an image and its prompted copy


class NonFiniteStep(ArithmeticError):
    """A loss or gradient that is not finite; raised on all ranks before it touches anything.

    Attributes:
        ranks: where outputs were not finite already; empty if it was the loss or the gradient only.
    """

    def __init__(self, phase: str, step: int, ranks: list[int]):
        super().__init__(f"not finite in the {phase} phase at step {step}")
        self.phase, self.step, self.ranks = phase, step, ranks


@dataclass
class Learner:
    """Everything a step changes or reads; the batch comes from outside.

    Attributes:
        prompt, prompt_optimizer: None for SimGCD.
        global_loss: over the whole batch; False computes every rank's own and averages them, as SimGCD does.
        micro_batches: pieces in which a rank computes its slice.
    """

    strategy: Strategy
    loss: GCDLoss
    schedule: Schedule
    prompt: Prompt | None = None
    prompt_optimizer: torch.optim.Optimizer | None = None
    global_loss: bool = True
    micro_batches: int = 1
    _used: Tensor | None = field(default=None, init=False)

    def views_at(self, step: int) -> int:
        """How many augmented views a step looks at: the model phase pairs the first with its own prompted copy."""
        return 1 if self.prompt is not None and self.schedule.phase(step) == "model" else 2

    def classes_used(self) -> int:
        """How many classes were predicted since the last call, of the images that this rank's loss looked at."""
        used, self._used = self._used, None
        return 0 if used is None else int(used.sum())

    def step(self, step: int, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms:
        """Take global step `step`.

        Args:
            views: float [V, b, 3, H, W], normalised, this rank's slice of the global batch.
            targets, labelled: [b].

        Returns:
            The terms of the global batch, detached, the same on every rank.

        Raises:
            NonFiniteStep: on all ranks, with weights, prompts and momentum as they were.
        """
        if self.schedule.phase(step) == "prompt":
            return self._prompt_step(step, views, targets, labelled)
        return self._model_step(step, views, targets, labelled)

    def _prompt_step(self, step: int, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms:
        assert self.prompt is not None
        assert self.prompt_optimizer is not None
        prompt, parameters = self.prompt, list(self.prompt.parameters())

        def forward(piece: Tensor) -> Outputs:
            return self.strategy.forward_prompt_phase(piece.flatten(0, 1), prompt())

        terms, outputs, losses = self._losses(step, forward, views, targets, labelled)
        scale = self.strategy.prompt_loss_scale
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for loss in losses:
            for total, part in zip(gradients, torch.autograd.grad(loss() * scale, parameters), strict=True):
                total += part / scale
        gradients = self.strategy.sum_over_ranks(gradients)
        self._check(step, [terms.total, *gradients], outputs)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self.prompt_optimizer.param_groups:
            group["lr"] = self.schedule.prompt_lr_at(step)
        self.prompt_optimizer.step()
        return self._reported(terms)

    def _model_step(self, step: int, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms:
        prompt = None if self.prompt is None else self.prompt().detach()

        def forward(piece: Tensor) -> Outputs:
            if prompt is None:
                return self.strategy.forward_model_phase(piece.flatten(0, 1), None, with_clean=False)
            return self.strategy.forward_model_phase(piece[0], prompt, with_clean=True)

        terms, outputs, losses = self._losses(step, forward, views, targets, labelled)
        self._check(step, [terms.total], outputs)
        gradients = self.strategy.backward_model(losses)
        try:
            self._check(step, gradients, outputs)
        except NonFiniteStep:
            self.strategy.forget_gradients()
            raise
        self.strategy.step_model(self.schedule.model_lr_at(step))
        return self._reported(terms)

    def _losses(
        self, step: int, forward: Forward, views: Tensor, targets: Tensor, labelled: Tensor
    ) -> tuple[GCDTerms, Outputs, Sequence[Callable[[], Tensor]]]:
        """The terms, the outputs, and functions whose results, one after the other, carry the graph of the loss."""
        if self.micro_batches == 1:
            outputs = forward(views)
            terms = self._objective(step, outputs.projections, outputs.logits, targets, labelled)
            return terms, outputs, [lambda: terms.total]
        pieces = views.chunk(self.micro_batches, dim=1)
        with torch.no_grad():
            parts = [forward(piece) for piece in pieces]
        projections, logits = (
            _side_by_side([part[i] for part in parts]).requires_grad_() for i in (PROJECTIONS, LOGITS)
        )
        terms = self._objective(step, projections, logits, targets, labelled)
        sizes = [piece.shape[1] for piece in pieces]
        gradients = torch.autograd.grad(terms.total, [projections, logits])
        # [2 * b, ...] view-major -> pieces [2, p, ...] -> [2 * p, ...] view-major
        split = [g.unflatten(0, (HALVES, -1)).split(sizes, 1) for g in gradients]
        shares = [[part.flatten(0, 1) for part in share] for share in zip(*split, strict=True)]
        outputs = Outputs(_side_by_side([part.features for part in parts]), projections, logits)

        def surrogate(piece: Tensor, share: Sequence[Tensor]) -> Tensor:
            again = forward(piece)
            return (again.projections * share[0]).sum() + (again.logits * share[1]).sum()

        return terms, outputs, [lambda p=p, s=s: surrogate(p, s) for p, s in zip(pieces, shares, strict=True)]

    def _objective(self, step: int, projections: Tensor, logits: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms:
        """The objective, scaled such that the *sum* of the ranks' gradients is the gradient of the whole."""
        if self.global_loss:
            projections, logits = gather_views(projections), gather_views(logits)
            targets, labelled = gather_views(targets, views=1), gather_views(labelled, views=1)
        if self._used is None:
            self._used = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        self._used.index_fill_(0, logits.detach().argmax(1), True)
        terms = self.loss(projections, logits, targets, labelled, self.schedule.teacher_temperature_at(step))
        return terms if self.global_loss else GCDTerms(*(term / world_size() for term in terms))

    @torch.no_grad()
    def _check(self, step: int, tensors: Sequence[Tensor], outputs: Outputs) -> None:
        if not tensors:
            return  # a loss scaler looks at the gradients
        bad = [~torch.isfinite(tensor).all() for tensor in tensors]
        if not gather_with_local_graph(torch.stack(bad).any()[None]).any():
            return
        local = ~(torch.isfinite(outputs.projections).all() & torch.isfinite(outputs.logits).all())
        ranks = gather_with_local_graph(local[None]).flatten().nonzero().flatten().tolist()
        raise NonFiniteStep(self.schedule.phase(step), step, ranks)

    def _reported(self, terms: GCDTerms) -> GCDTerms:
        detached = [term.detach() for term in terms]
        return GCDTerms(*(detached if self.global_loss else self.strategy.sum_over_ranks(detached)))


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Outputs of pieces, [2 * p, ...] view-major each -> of all of them, [2 * b, ...] view-major."""
    return torch.cat([part.unflatten(0, (HALVES, -1)) for part in parts], 1).flatten(0, 1)
