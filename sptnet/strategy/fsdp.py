"""FSDP2: the weights that are trained sharded over the ranks, frozen blocks too where they are large; or, hybrid, over
the ranks of one node.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sptnet.config_sections import FrozenBlocks
from sptnet.method.model import PromptedViT
from sptnet.strategy.base import DTYPES, TorchStrategy, make_momentum
from sptnet.strategy.connect import limit_waiting
from sptnet.strategy.frozen import Frozen, frozen_bytes, least_memory, matrices, place_frozen
from sptnet.strategy.launcher import LaunchSettings


class FSDPStrategy(TorchStrategy):
    """Order of wrapping: activation checkpointing is inside the model's forward already; then `fully_shard` for every
    block that is trained, or whose frozen weights are sharded, then for the rest; the optimizer comes last, over the
    sharded parameters.

    What is trained is gathered, and its gradients are reduced, in float32. Matrices of frozen blocks are gathered in
    the dtype of the computation, to which autocast would round them anyway: the numbers are the same, the bytes half.
    What else is frozen is whole on every rank: it is small, and FSDP2 would pad what has one row to one for every rank.

    `fully_shard` is called directly, not by accelerate's `prepare`: on machines without GPUs accelerate turns FSDP into
    DDP without a word.
    """

    sharded = True
    frozen: Frozen

    def __init__(
        self,
        accelerator: Accelerator,
        launch: LaunchSettings,
        model: PromptedViT,
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
        frozen_blocks: FrozenBlocks = "auto",
    ):
        super().__init__(accelerator, launch)
        model.to(self.device)
        self.frozen = place_frozen(frozen_blocks, frozen_bytes(model), least_memory(self.device))
        self._mesh = _mesh(self.device.type, launch)
        self._gathered = self._shard(model, self._mesh)
        self.module = self._wrapped = model
        self._optimizer = optimizer_of(model)
        # the optimizer sees this rank's shards as plain tensors: fused kernels know no DTensor of SGD, and of AdamW
        # only by a loop over parameters
        self._shards: dict[nn.Parameter, Tensor] = {p: _local(p.detach()) for p in model.parameters()}
        for group in self._optimizer.param_groups:
            group["params"] = [self._shards[p].requires_grad_() for p in group["params"]]
        make_momentum(self._optimizer, (self._shards[p] for _, p in super().trained()))

    def _shard(self, model: PromptedViT, mesh: DeviceMesh) -> list[FSDPModule]:
        """Shard a model in place; the frozen blocks that are gathered for every pass."""
        blocks, begin = list(model.backbone.blocks), model.train_from_block
        gathered = [] if self.frozen.whole else blocks[:begin]
        whole = {p for p in model.parameters() if not p.requires_grad}
        whole -= set().union(*(matrices(block) for block in gathered))
        rounded = MixedPrecisionPolicy(DTYPES.get(self.launch.precision), cast_forward_inputs=False)
        for block in gathered:
            fully_shard(block, mesh=mesh, mp_policy=rounded, ignored_params=whole)
        for block in blocks[begin:]:
            # the last block's backward pass follows its forward pass at once: its weights are gathered once
            fully_shard(block, mesh=mesh, reshard_after_forward=block is not blocks[-1])
        fully_shard(model, mesh=mesh, ignored_params=whole)
        return cast(list[FSDPModule], gathered)

    @contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def backward_model(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        for parameter in self._shards:  # the module's own parameters are whole between forward and backward
            parameter.grad = None
        # the first trained block would gather the one before it ahead, which this phase goes not back through
        for block in self._gathered:
            block.set_unshard_in_backward(False)
        super().backward_model(losses)
        for block in self._gathered:
            block.set_unshard_in_backward(True)
        for parameter, shard in self._shards.items():
            shard.grad = None if parameter.grad is None else _local(parameter.grad)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        self._reshard()
        return super().trained()

    def full_state(self) -> dict[str, Tensor]:
        self._reshard()
        return super().full_state()

    def settle(self) -> None:
        limit_waiting(self._mesh.get_group(dimension) for dimension in range(self._mesh.ndim))

    def _reshard(self) -> None:
        """Put the shards back: a forward pass without a backward one, as in an evaluation, leaves whole weights."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        return _full(parameter.detach())

    @torch.no_grad()
    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(_like(value.to(self.device), parameter))

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        # gathering is a collective: in the same order on all ranks, whatever order a checkpoint was read in
        state = sorted(self._optimizer.state[self._shards[parameter]].items())
        return {key: value if value.ndim == 0 else _full(_shard_of(value, parameter)) for key, value in state}

    def set_optimizer_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        self._optimizer.state[self._shards[parameter]] = {
            key: value.to(self.device, copy=True)
            if value.ndim == 0
            else _local(_like(value.to(self.device), parameter))
            for key, value in state.items()
        }


def _mesh(device: str, launch: LaunchSettings) -> DeviceMesh:
    copies = launch.world_size // launch.shard_size
    with unset_fake_temporarily():  # the ranks of a mesh are read, also where the model is planned, without numbers
        if launch.strategy == "fsdp2":
            return init_device_mesh(device, (launch.world_size,))
        return init_device_mesh(device, (copies, launch.shard_size), mesh_dim_names=("replicate", "shard"))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value, sharded as the parameter is; every rank has the whole, so nothing needs to travel."""
    if not isinstance(parameter, DTensor):
        return value.clone()
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_of(local: Tensor, parameter: Tensor) -> Tensor:
    """A rank's shard of a tensor that is spread as a parameter is."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
