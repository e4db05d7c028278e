"""What the training loop needs of a strategy, and what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from sptnet.method.model import Outputs, PromptedViT
from sptnet.strategy.frozen import Frozen
from sptnet.strategy.launcher import LaunchSettings

FP16_SCALE = 1024.0  # torch begins at 65,536, and leaves out steps until it has come down
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy(ABC):
    """How the model is spread over ranks. The prompts stay outside: they are replicated everywhere.

    Attributes:
        module: the model whose parameters are trained; what the prompt phase and the evaluation call.
        sharded: whether a rank holds a part only of what is trained, or of its optimizer's state.
        launch: strategy, world size and precision, as checked.
        compiled: whether blocks were given to torch.compile.
        frozen: where the frozen blocks lie, and why; None where the strategy has no choice.
        _wrapped: what the model phase calls; it holds `module`, or is it.
        _optimizer: whose parameter groups hold the learning rate.
    """

    sharded = False
    compiled = False
    frozen: Frozen | None = None
    module: PromptedViT
    _wrapped: nn.Module
    _optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator, launch: LaunchSettings):
        self.accelerator, self.launch = accelerator, launch
        self.device = accelerator.device

    @property
    def wrapper(self) -> str:
        """Class name of what the model phase calls."""
        return type(self._wrapped).__name__

    @property
    def world(self) -> str:
        """What the model is wrapped in and on how many processes, as commands say it."""
        size = self.launch.world_size
        return f"{self.wrapper} on {size} process{'es' * (size > 1)}"

    @abstractmethod
    def backward_model(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Backward through losses that are computed one after the other; their gradients are added up.

        Each is of the global batch, with a graph through this rank's part only: the gradients of the ranks must be
        added up too. Every strategy averages them, so the loss is scaled by the world size.
        """

    def step_model(self, lr: float, faults: Tensor) -> Tensor:
        """Step at learning rate `lr` with what `backward_model` left, unless something of it is not finite.

        Decided on the device: a step that is left out leaves weights, momentum and decay as they were.

        Args:
            faults: a scalar, not 0 where the step is to be left out, the same on every rank.

        Returns:
            Not 0 where it was left out, for a gradient that is not finite too; the same on every rank.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        return self._step_unless(faults)

    @abstractmethod
    def _step_unless(self, faults: Tensor) -> Tensor:
        """The optimizer's step; as `step_model`."""

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

    @property
    def scaled_per_step(self) -> int:
        """How often the loss scaler counts a step."""
        return 1

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

    @property
    def parts_trunk(self) -> bool:
        """Whether passes through the trunk alone, and from its tokens on, cost no more than what they compute."""
        return True

    @torch.no_grad()
    def forward_trunk(self, images: Tensor, prompt: Tensor | None, with_clean: bool) -> Tensor:
        """The tokens [N, T, D] that enter the first trained block, without a graph; `forward_model_phase` goes on from
        them. Where weights are sharded, every rank must call it equally often.
        """
        with self.autocast():
            return cast(Tensor, self.module(images, prompt, with_clean, only_trunk=True))

    @torch.no_grad()
    def forward_evaluation(self, images: Tensor, prompt: Tensor | None) -> Outputs:
        """Outputs without a graph. Where weights are sharded, every rank must call it equally often.

        Never by compiled blocks: `sptnet eval` has the same numbers, and for an odd last batch nothing is compiled.
        """
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with self.autocast(), eager:
            return cast(Outputs, self.module(images, prompt))

    def settle(self) -> None:  # noqa: B027  (most have nothing to do)
        """Before the first step of a process: be as one is that has taken some; all ranks call it."""

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

    def backward_model(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        self._optimizer.zero_grad()
        for i, loss in enumerate(losses):
            with self._reducing(i == len(losses) - 1):
                self._scaler.scale(loss() * self.launch.world_size).backward()

    @contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one of several losses: gradients are reduced over the ranks with the last."""
        yield

    def _gradients(self) -> list[Tensor]:
        """What the optimizer reads: reduced, this rank's shards of it."""
        return [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _step_unless(self, faults: Tensor) -> Tensor:
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
            # what `step` and `update` will look at; torch's ShardedGradScaler writes to it likewise
            (found,) = self._scaler._found_inf_per_device(self._optimizer).values()
        else:
            found = not_finite(self._gradients())
        found.copy_(torch.maximum(found, faults).clamp(max=1.0))  # the kernels compare it with 1
        if self.sharded:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            with left_out_where(found, self._optimizer):
                self._optimizer.step()
        return found.squeeze()


@torch.no_grad()
def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """1 where one of the tensors holds a value that is not finite, else 0; a float scalar."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:  # of more ranks than a weight has rows, the last have no part of it
        return tensors[0].new_zeros(())
    if filled[0].is_cuda:
        told = torch.stack(torch._foreach_norm(filled, torch.inf))
    else:  # where that kernel takes seven times as long, a twentieth of a step from kept tokens
        told = torch.stack([torch.stack(torch.aminmax(tensor)) for tensor in filled])
    return (~torch.isfinite(told).all()).float()


@contextmanager
def left_out_where(found: Tensor, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the optimizer's step change nothing where `found`, a scalar, is not 0; without a look at it.

    By the contract of torch's fused optimizers with its loss scaler: the kernel itself reads `found_inf`.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), "only fused optimizers read found_inf"
    optimizer.found_inf, optimizer.grad_scale = found.clamp(max=1.0).reshape(()), None  # type: ignore[attr-defined]
    yield
    del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]


def make_momentum(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Give SGD its momentum, of zeros, before the first step.

    Otherwise that step makes it, and where it is left out the kernel leaves in it what was in memory before.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of what requires a gradient; biases and one-dimensional parameters are not decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(".bias")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
