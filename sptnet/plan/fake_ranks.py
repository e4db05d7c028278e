"""The real strategy, model and steps on pretended ranks: torch's fake process group, tensors without numbers.

A fake tensor has shape and dtype and no memory; everything else is the code that trains. What a trial of 512 ranks
costs is a second or two. Tensors are said to be on the CPU: backward passes of fake CUDA tensors want a GPU.
"""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from sptnet.build import assemble
from sptnet.config import Config
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Schedule
from sptnet.plan.live import LiveBytes
from sptnet.plan.trial import Counted, Phase, Trial
from sptnet.strategy.base import Strategy
from sptnet.strategy.connect import DDP
from sptnet.strategy.launcher import LaunchSettings

FUSED = {
    overload
    for operation in (torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adamw_)
    for overload in (operation.default, operation.tensor_lr)
}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def pretending(
    config: Config, model: PromptedViT, prompt: Prompt | None, schedule: Schedule, launch: LaunchSettings,
    tokens: bool = False, wrapped: bool = True,
) -> Iterator[Trial]:  # fmt: skip
    """A trial on a rank of `launch`, while it is entered: what it holds and does in a step of each phase of a run.

    Args:
        model, prompt: are left as they are; on the meta device, else their numbers would be copied.
        tokens: steps look at a trunk's tokens instead of images.
        wrapped: False leaves out what the strategy wraps the model in, as if the ranks shared nothing but the loss.
    """
    images = config.data.batch_size // launch.world_size
    shadow, pixels = copy.deepcopy(model), copy.deepcopy(prompt)
    with (
        _quiet(),
        _ranks(launch, wrapped) as accelerator,
        _Fakes(),
        LiveBytes() as live,
    ):
        for module in (shadow, pixels):
            if module is not None:
                _empty(module)
        shape = tuple(shadow.trunk(torch.zeros(1, 3, model.image_size, model.image_size)).shape[1:])
        launch = launch if wrapped else launch._replace(strategy="single")
        with _own_chunks():
            learner = assemble(config, accelerator, launch, shadow, pixels, schedule)
        of_ddp = _let_reduce(learner.strategy)
        views = shape if tokens else (3, model.image_size, model.image_size)
        yield Trial(learner, views, images, config.evaluate.batch_size, live, before=(2 if of_ddp else 1, 0))


def on_fake_ranks(*arguments: Any, **options: Any) -> dict[Phase, Counted]:
    """What a trial counts; arguments as of `pretending`."""
    with pretending(*arguments, **options) as trial:
        return trial.run()


class _Fakes(FakeTensorMode):
    """Fake tensors on a CPU, where no driver of a GPU need be asked with every operation.

    What torch has no shapes for it would compute with real zeros as large as the weights: fused optimizers.
    """

    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FUSED:
            return None  # in place, and nothing new
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Numberless(TorchFunctionMode):
    """While it is entered, weights take no memory and are not drawn: for a model that is only looked at."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            return function(*args, **kwargs | {"device": "meta"})
        if getattr(function, "__name__", "") in ("uniform_", "normal_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _empty(module: nn.Module) -> None:
    """Give a module fake tensors; to be called in fake mode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    # it is where it should be, and torch cannot swap fake parameters
    module.to = lambda *args, **kwargs: module  # type: ignore[method-assign]


@contextmanager
def _ranks(launch: LaunchSettings, wrapped: bool) -> Iterator[Accelerator]:
    """Be rank 0 of so many, none of whom is there; raises RuntimeError where this process is a real one's rank."""
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a real run")
    before = {name: os.environ.get(name) for name in LAUNCHER}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        for name in LAUNCHER:
            os.environ.pop(name, None)
        ranks = launch.world_size
        if ranks > 1 or launch.strategy != "single":
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            if wrapped:
                os.environ.update(zip(LAUNCHER, ("0", "0", str(ranks), "127.0.0.1", "1"), strict=True))
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        accelerator.ddp_handler = _NothingToSend()
        yield accelerator
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass
class _NothingToSend(DistributedDataParallelKwargs):  # type: ignore[misc]
    """DDP compares its ranks' weights when it is made, by numbers that are not there."""

    init_sync: bool = True

    def to_kwargs(self) -> dict[str, Any]:
        return {"init_sync": False, **DDP}


class _RealBuckets:
    """DDP's reducer, which arranges its buckets anew in the second step, by numbers that it reads.

    They must be real for that. The buckets are real too, in memory that nobody touches, and fake where they are used.
    """

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        with _disable_current_modes():
            return bool(self._reducer._rebuild_buckets())


def _let_reduce(strategy: Strategy) -> bool:
    """DDP's own reduction waits for a future, which the fake process group does not have. Whether it is DDP."""
    wrapped: Any = strategy._wrapped
    if isinstance(wrapped, DistributedDataParallel):

        def reduce(
            state: object,
            bucket: dist.GradBucket,  # type: ignore[name-defined]
        ) -> torch.futures.Future[torch.Tensor]:  # DDP wants these types
            dist.all_reduce(bucket.buffer())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, reduce)
        wrapped.reducer = _RealBuckets(wrapped.reducer)  # type: ignore[assignment]
        return True
    return False


@contextmanager
def _own_chunks() -> Iterator[None]:
    """Let FSDP2 cut no more of a parameter than the rank's own part, rank 0's: of 512 ranks it cuts all 512."""
    module: Any = _fsdp_param
    before = getattr(module, "_chunk_with_empty", None)

    def first(tensor: torch.Tensor, num_chunks: int, dim: int) -> list[torch.Tensor]:
        return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // num_chunks))]

    if before is None:  # of a torch that does it otherwise
        yield
        return
    module._chunk_with_empty = first
    try:
        yield
    finally:
        module._chunk_with_empty = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of torch's that are of steps that nobody takes."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where accelerate imports it, says what it chose
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
