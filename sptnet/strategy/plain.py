"""One process, or replicas of the whole model kept equal by DDP."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sptnet.method.model import PromptedViT
from sptnet.strategy.base import TorchStrategy, make_momentum
from sptnet.strategy.launcher import LaunchSettings

TWO = 2  # images: of one, a parameter that is expanded to all has a gradient that lies otherwise


class PlainStrategy(TorchStrategy):
    """Order of wrapping: the model is moved to the device, then wrapped by DDP.

    Not by accelerate's `prepare`: on a GPU it leaves a process that is the only one unwrapped, and takes LOCAL_RANK for
    the number of the card, which is another where each process sees one card only.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        launch: LaunchSettings,
        model: PromptedViT,
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    ):
        super().__init__(accelerator, launch)
        self.module = model.to(accelerator.device)
        self._wrapped: nn.Module = self.module
        if launch.strategy == "ddp":
            self._wrapped = DistributedDataParallel(self.module, **accelerator.ddp_handler.to_kwargs())
        self._optimizer = optimizer_of(self.module)
        make_momentum(self._optimizer, (p for _, p in self.trained()))

    def settle(self) -> None:
        """Let DDP see the order in which gradients come, by a pass of no consequence.

        It makes its buckets anew behind the first backward pass of a process, and a ring of three or more adds up the
        ranks in an order that depends on the place in a bucket: the first step behind an interruption would be rounded
        otherwise than the same step of a run that was not interrupted (torch/nn/parallel/distributed.py, `Reducer`).
        """
        if not isinstance(self._wrapped, DistributedDataParallel):
            return
        size = self.module.image_size
        with torch.compiler.set_stance("force_eager"):
            outputs = self.forward_model_phase(torch.zeros(TWO, 3, size, size, device=self.device), None, False)
            (0.0 * (outputs.projections.sum() + outputs.logits.sum())).backward()
        self._optimizer.zero_grad()

    @contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            yield
            return
        with self._wrapped.no_sync():
            yield

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    @torch.no_grad()
    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value)

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {key: value for key, value in self._optimizer.state[parameter].items() if value is not None}

    def set_optimizer_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        # the step count of AdamW too: a fused step counts on the device
        self._optimizer.state[parameter] = {key: value.to(self.device, copy=True) for key, value in state.items()}
