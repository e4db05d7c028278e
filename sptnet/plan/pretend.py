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
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from sptnet.build import assemble
from sptnet.config import Config
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Schedule
from sptnet.plan.live import LiveBytes
from sptnet.plan.trial import Counted, Phase, Trial
from sptnet.strategy.base import Strategy
from sptnet.strategy.connect import DDP, LaunchSettings

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pretended(
    config: Config, model: PromptedViT, prompt: Prompt | None, schedule: Schedule, launch: LaunchSettings,
    tokens: bool = False, wrapped: bool = True,
) -> dict[Phase, Counted]:  # fmt: skip
    """What a rank of `launch` holds and does in a step of each phase of a run.

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
        FakeTensorMode(allow_non_fake_inputs=True),
        LiveBytes() as live,
    ):
        for module in (shadow, pixels):
            if module is not None:
                _empty(module)
        shape = tuple(shadow.trunk(torch.zeros(1, 3, model.image_size, model.image_size)).shape[1:])
        launch = launch if wrapped else launch._replace(strategy="single")
        learner = assemble(config, accelerator, launch, shadow, pixels, schedule)
        _let_reduce(learner.strategy)
        views = shape if tokens else (3, model.image_size, model.image_size)
        return Trial(learner, views, images, config.evaluate.batch_size, live, before=1).run()


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


class _BucketsStay:
    """DDP's reducer, which would arrange its buckets anew by numbers that are not there; as many bytes either way."""

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _let_reduce(strategy: Strategy) -> None:
    """DDP's own reduction waits for a future, which the fake process group does not have."""
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
        wrapped.reducer = _BucketsStay(wrapped.reducer)  # type: ignore[assignment]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of torch's that are of steps that nobody takes."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where accelerate imports it, says what it chose
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
