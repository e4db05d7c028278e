"""What the training loop needs of a strategy, and what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sptnet.method.model import Outputs, PromptedViT
from sptnet.strategy.connect import LaunchSettings

FP16_SCALE = 1024.0  # torch begins at 65,536, and leaves out steps until it has come down
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy(ABC):
    """How the model is spread over ranks. The prompts stay outside: they are replicated everywhere.

    Attributes:
        module: the model whose parameters are trained; what the prompt phase and the evaluation call.
        launch: strategy, world size and precision, as checked.
        _wrapped: what the model phase calls; it holds `module`, or is it.
        left_out: steps that a loss scaler left out, since this process began.
        _optimizer: whose parameter groups hold the learning rate.
    """

    module: PromptedViT
    _wrapped: nn.Module
    _optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator, launch: LaunchSettings):
        self.accelerator, self.launch = accelerator, launch
        self.device = accelerator.device
        self.left_out = 0

    @property
    def wrapper(self) -> str:
        """Class name of what the model phase calls."""
        return type(self._wrapped).__name__

    @abstractmethod
    def backward_model(self, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Backward through losses that are computed one after the other; their gradients are added up.

        Each is of the global batch, with a graph through this rank's part only: the gradients of the ranks must be
        added up too. Every strategy averages them, so the loss is scaled by the world size.

        Returns:
            The gradients, or this rank's shards of them, to be looked at; none where a loss scaler looks at them.
        """

    @abstractmethod
    def forget_gradients(self) -> None:
        """Drop what `backward_model` left, without a step."""

    def step_model(self, lr: float) -> None:
        """Step at learning rate `lr` with what `backward_model` left."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._apply_gradients()

    @abstractmethod
    def _apply_gradients(self) -> None:
        """The optimizer's step."""

    @abstractmethod
    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a parameter, float32; all ranks call it."""

    @abstractmethod
    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite a parameter; every rank gives the whole value."""

    @abstractmethod
    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The whole of what the optimizer remembers of a trained parameter; empty before its first step."""

    @abstractmethod
    def set_optimizer_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Overwrite what the optimizer remembers of a trained parameter; every rank gives whole tensors."""

    @property
    @abstractmethod
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16; None in every other precision."""

    @contextmanager
    def _counting_left_out(self) -> Iterator[None]:
        """A loss scaler that lowers its scale has left a step out."""
        before = None if self.scaler is None else self.scaler.get_scale()
        yield
        if before is not None and self.scaler is not None and self.scaler.get_scale() < before:
            self.left_out += 1

    @property
    def prompt_loss_scale(self) -> float:
        """Factor on the loss of the prompt phase: fp16 would lose small gradients on their way to the pixels."""
        return FP16_SCALE if self.launch.precision == "fp16" else 1.0

    def autocast(self) -> torch.autocast:
        """Computation in the asked precision; parameters are float32 in every one."""
        dtype = DTYPES.get(self.launch.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def forward_model_phase(self, images: Tensor, prompt: Tensor | None, with_clean: bool) -> Outputs:
        """Outputs with a graph that leads to the trained weights."""
        with self.autocast():
            return cast(Outputs, self._wrapped(images, prompt, with_clean))

    def forward_prompt_phase(self, images: Tensor, prompt: Tensor) -> Outputs:
        """Outputs of prompted images, with a graph that leads to the prompt.

        On the unwrapped module: a wrapper's own forward would wait for weight gradients that this phase never
        computes.
        """
        with self.autocast():
            return cast(Outputs, self.module(images, prompt))

    @torch.no_grad()
    def forward_evaluation(self, images: Tensor, prompt: Tensor | None) -> Outputs:
        """Outputs without a graph. Where weights are sharded, every rank must call it equally often."""
        with self.autocast():
            return cast(Outputs, self.module(images, prompt))

    def sum_over_ranks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Add up small tensors over the ranks, in one collective."""
        if self.launch.world_size == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of what the model phase trains."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def trained_state(self, keep: Callable[[int], bool]) -> dict[str, Tensor]:
        """What the model phase changes, on the CPU: `model.NAME` and `optimizer.NAME.KEY`; all ranks call it.

        Args:
            keep: whether this rank keeps the tensors of the i-th trained parameter; the others it only helps to gather.
        """
        state: dict[str, Tensor] = {}
        for i, (name, parameter) in enumerate(self.trained()):
            whole = {f"model.{name}": self.full_parameter(parameter)}
            whole |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer_state(parameter).items()}
            if keep(i):
                state |= {key: value.detach().to("cpu", copy=True) for key, value in whole.items()}
        return state

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `trained_state`, on every rank with all tensors."""
        for name, parameter in self.trained():
            prefix = f"optimizer.{name}."
            remembered = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
            if remembered:
                self.set_optimizer_state(parameter, remembered)
            self.set_full_parameter(parameter, state[f"model.{name}"])

    def full_state(self) -> dict[str, Tensor]:
        """The whole model on the CPU, by the names of its state dict; all ranks call it."""
        parameters = dict(self.module.named_parameters())
        return {
            name: (self.full_parameter(parameters[name]) if name in parameters else value).detach().cpu()
            for name, value in self.module.state_dict().items()
        }


class TorchStrategy(Strategy):
    """What strategies share whose optimizer is torch's own, in this process."""

    def __init__(self, accelerator: Accelerator, launch: LaunchSettings):
        super().__init__(accelerator, launch)
        self._scaler = torch.amp.GradScaler(self.device.type, init_scale=FP16_SCALE, enabled=launch.precision == "fp16")

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return self._scaler if self._scaler.is_enabled() else None

    def backward_model(self, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        self._optimizer.zero_grad()
        for loss in losses:
            self._scaler.scale(loss() * self.launch.world_size).backward()
        if self._scaler.is_enabled():
            return []
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]

    def forget_gradients(self) -> None:
        self._optimizer.zero_grad()

    def _apply_gradients(self) -> None:
        with self._counting_left_out():
            self._scaler.step(self._optimizer)
            self._scaler.update()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of what requires a gradient; biases and one-dimensional parameters are not decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(".bias")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
