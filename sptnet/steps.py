"""The two steps that SPTNet alternates (ICLR 2024, section 3.3, algorithm 1), and SimGCD's single one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sptnet.collectives import gather_views, world_size
from sptnet.losses import GCDLoss, GCDTerms
from sptnet.model import Outputs
from sptnet.prompts import Prompt
from sptnet.schedule import Schedule
from sptnet.strategy.plain import PlainStrategy


@dataclass
class Learner:
    """Everything a step changes or reads; the batch comes from outside.

    Attributes:
        prompt, prompt_optimizer: None for SimGCD.
        global_loss: over the whole batch; False computes every rank's own and averages them, as SimGCD does.
    """

    strategy: PlainStrategy
    loss: GCDLoss
    schedule: Schedule
    prompt: Prompt | None = None
    prompt_optimizer: torch.optim.Optimizer | None = None
    global_loss: bool = True

    def views_at(self, step: int) -> int:
        """How many augmented views a step looks at: the model phase pairs the first with its own prompted copy."""
        return 1 if self.prompt is not None and self.schedule.phase(step) == "model" else 2

    def step(self, step: int, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms:
        """Take global step `step`.

        Args:
            views: float [V, b, 3, H, W], normalised, this rank's slice of the global batch.
            targets, labelled: [b].

        Returns:
            The terms of the global batch, detached, the same on every rank.
        """
        if self.schedule.phase(step) == "prompt":
            return self._prompt_step(step, views, targets, labelled)
        return self._model_step(step, views, targets, labelled)

    def _prompt_step(self, step: int, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms:
        assert self.prompt is not None
        assert self.prompt_optimizer is not None
        parameters = list(self.prompt.parameters())
        outputs = self.strategy.forward_prompt_phase(views.flatten(0, 1), self.prompt())
        terms = self._objective(step, outputs, targets, labelled)
        gradients = torch.autograd.grad(terms.total, parameters)
        for parameter, gradient in zip(parameters, self.strategy.sum_over_ranks(list(gradients)), strict=True):
            parameter.grad = gradient
        for group in self.prompt_optimizer.param_groups:
            group["lr"] = self.schedule.prompt_lr_at(step)
        self.prompt_optimizer.step()
        return self._reported(terms)

    def _model_step(self, step: int, views: Tensor, targets: Tensor, labelled: Tensor) -> GCDTerms:
        if self.prompt is None:
            outputs = self.strategy.forward_model_phase(views.flatten(0, 1), None, with_clean=False)
        else:
            outputs = self.strategy.forward_model_phase(views[0], self.prompt().detach(), with_clean=True)
        terms = self._objective(step, outputs, targets, labelled)
        self.strategy.step_model(terms.total, self.schedule.model_lr_at(step))
        return self._reported(terms)

    def _objective(self, step: int, outputs: Outputs, targets: Tensor, labelled: Tensor) -> GCDTerms:
        """The objective, scaled such that the *sum* of the ranks' gradients is the gradient of the whole."""
        projections, logits = outputs.projections, outputs.logits
        if self.global_loss:
            projections, logits = gather_views(projections), gather_views(logits)
            targets, labelled = gather_views(targets, views=1), gather_views(labelled, views=1)
        terms = self.loss(projections, logits, targets, labelled, self.schedule.teacher_temperature_at(step))
        return terms if self.global_loss else GCDTerms(*(term / world_size() for term in terms))

    def _reported(self, terms: GCDTerms) -> GCDTerms:
        detached = [term.detach() for term in terms]
        return GCDTerms(*(detached if self.global_loss else self.strategy.sum_over_ranks(detached)))
