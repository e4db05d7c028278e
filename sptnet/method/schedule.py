"""What happens at a step: phase, learning rates, teacher temperature. Pure functions of the global step."""

import math
from dataclasses import dataclass
from typing import Literal

from sptnet.names import LrShape

Phase = Literal["prompt", "model"]
PhaseSchedule = Literal["alternating", "reference", "model_only"]


@dataclass(frozen=True)
class Schedule:
    """The course of one run.

    Args:
        epochs, steps_per_epoch: the length of the run.
        phase_schedule: `alternating` (k prompt steps, k model steps, over the whole run), `reference` (the authors':
            every epoch starts in the prompt phase, and before step i of an epoch, counted from 0, the phase flips
            where (i + 1) is a multiple of k), `model_only` (SimGCD: no prompts).
        k: steps per phase.
        prompt_lr, prompt_warmup_steps: linear warm-up, then cosine to 0 at the end of the run, both per step.
        model_lr: the model's learning rate at its highest.
        model_lr_shape: `cosine_epoch` (as published: cosine per epoch from model_lr to model_lr * final_factor) or
            `one_cycle` (per step: linear rise over `warmup_fraction` of the run, then cosine to the final factor).
        final_factor: what the model's learning rate is multiplied by at the end.
        warmup_fraction: share of the run that `one_cycle` rises for.
        teacher_temperature, teacher_warmup_temperature, teacher_warmup_epochs: linear from the second to the first
            over the warm-up epochs; a run that is shorter than the warm-up just ends on its way.
    """

    epochs: int
    steps_per_epoch: int
    phase_schedule: PhaseSchedule = "alternating"
    k: int = 20
    prompt_lr: float = 1.0
    prompt_warmup_steps: int = 1000
    model_lr: float = 0.1
    model_lr_shape: LrShape = "cosine_epoch"
    final_factor: float = 0.1
    warmup_fraction: float = 0.3
    teacher_temperature: float = 0.04
    teacher_warmup_temperature: float = 0.07
    teacher_warmup_epochs: int = 10

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def phase(self, step: int) -> Phase:
        if self.phase_schedule == "model_only":
            return "model"
        if self.phase_schedule == "reference":
            step = step % self.steps_per_epoch + 1
        return "model" if step // self.k % 2 else "prompt"

    def prompt_lr_at(self, step: int) -> float:
        if step < self.prompt_warmup_steps:
            return self.prompt_lr * (step + 1) / self.prompt_warmup_steps
        progress = (step - self.prompt_warmup_steps) / max(1, self.total_steps - self.prompt_warmup_steps)
        return self.prompt_lr * (1 + math.cos(math.pi * progress)) / 2

    def model_lr_at(self, step: int) -> float:
        if self.model_lr_shape == "one_cycle":
            rise = self.warmup_fraction * self.total_steps
            if step < rise:
                return self.model_lr * (step + 1) / math.ceil(rise)
            progress = (step - rise) / max(1.0, self.total_steps - rise)
        else:
            progress = self.epoch(step) / self.epochs
        final = self.model_lr * self.final_factor
        return final + (self.model_lr - final) * (1 + math.cos(math.pi * progress)) / 2

    def teacher_temperature_at(self, step: int) -> float:
        if self.epoch(step) >= self.teacher_warmup_epochs:
            return self.teacher_temperature
        progress = self.epoch(step) / max(1, self.teacher_warmup_epochs - 1)
        return self.teacher_warmup_temperature + progress * (self.teacher_temperature - self.teacher_warmup_temperature)

    def warning(self) -> str | None:
        """A sentence where the phases cannot alternate as the user will expect, else None."""
        if self.phase_schedule == "model_only" or self.steps_per_epoch >= 2 * self.k:
            return None
        where = f"an epoch has {self.steps_per_epoch} steps, fewer than the 2k = {2 * self.k} of one alternation"
        if all(self.phase(step) == "prompt" for step in range(min(self.total_steps, 2 * self.k))):
            remedy = "use a smaller schedule.k, or more epochs"
            if self.phase_schedule == "reference":
                remedy = "phase_schedule 'reference' begins every epoch anew; use 'alternating' or a smaller schedule.k"
            return f"{where}: the model is never trained; {remedy}"
        return f"{where}: each epoch sees one phase more than the other"
