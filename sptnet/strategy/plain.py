"""One process, or replicas of the whole model kept equal by DDP."""

from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from sptnet.model import Outputs, PromptedViT
from sptnet.strategy.connect import StrategyError

NAMES = {DistributedType.NO: "single", DistributedType.MULTI_GPU: "ddp", DistributedType.MULTI_CPU: "ddp"}


class PlainStrategy:
    """What the training loop needs of a strategy, for a single process and for DDP.

    Order of wrapping: the model is moved to the device, then wrapped by DDP (accelerate's `prepare`).
    The prompts stay outside: they are replicated, and only their gradients are reduced in the prompt phase.
    """

    def __init__(self, accelerator: Accelerator, model: PromptedViT, optimizer: torch.optim.Optimizer):
        if accelerator.distributed_type not in NAMES:
            raise StrategyError(
                f"strategy {accelerator.distributed_type.value} is not supported yet:"
                " use launch/single.yaml or launch/ddp.yaml"
            )
        self.name = NAMES[accelerator.distributed_type]
        self.accelerator = accelerator
        self._wrapped, self._optimizer = accelerator.prepare(model, optimizer)
        self.module = cast(PromptedViT, accelerator.unwrap_model(self._wrapped))

    @property
    def wrapper(self) -> str:
        """Class name of what the model phase calls."""
        return type(self._wrapped).__name__

    def forward_prompt_phase(self, images: Tensor, prompt: Tensor) -> Outputs:
        """Outputs of prompted images, with a graph that leads to the prompt.

        On the unwrapped module: DDP's own forward would wait for weight gradients that this phase never computes.
        """
        with self.accelerator.autocast():
            return cast(Outputs, self.module(images, prompt))

    def forward_model_phase(self, images: Tensor, prompt: Tensor | None, with_clean: bool) -> Outputs:
        """Outputs with a graph that leads to the trained weights."""
        with self.accelerator.autocast():
            return cast(Outputs, self._wrapped(images, prompt, with_clean))

    @torch.no_grad()
    def forward_evaluation(self, images: Tensor, prompt: Tensor | None) -> Outputs:
        """Outputs without a graph."""
        with self.accelerator.autocast():
            return cast(Outputs, self.module(images, prompt))

    def step_model(self, loss: Tensor, lr: float) -> None:
        """Backward, average over the ranks, and step at learning rate `lr`.

        `loss` is that of the global batch, with a graph through this rank's part only: the gradients of the ranks
        must be added up, and DDP averages, so the loss is scaled by the world size.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad()
        self.accelerator.backward(loss * self.accelerator.num_processes)
        self._optimizer.step()

    def sum_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Add up small tensors over the ranks, in one collective."""
        if self.accelerator.num_processes == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def trained_parameters(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups of what requires a gradient; biases and one-dimensional parameters are not decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(".bias")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
