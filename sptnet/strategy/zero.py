"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and weights (3) sharded over the ranks."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from sptnet.method.model import Outputs, PromptedViT
from sptnet.strategy.base import FP16_SCALE, Strategy, left_out_where, make_momentum, not_finite
from sptnet.strategy.connect import limit_waiting
from sptnet.strategy.launcher import LaunchSettings


class ZeroStrategy(Strategy):
    """Order of wrapping: activation checkpointing is inside the model's forward already; then DeepSpeed's engine, by
    accelerate's `prepare`, takes model and optimizer.

    One engine with one optimizer: two under one engine are silently wrong. The prompt phase calls `engine.module`; the
    engine's own forward would break it (IndexError under ZeRO-1 and 2, wrong gradients under ZeRO-3).
    """

    sharded = True

    def __init__(
        self,
        accelerator: Accelerator,
        launch: LaunchSettings,
        model: PromptedViT,
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
        images_per_rank: int,
    ):
        super().__init__(accelerator, launch)
        plugin = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config.update(_settings(launch, images_per_rank))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plugin.deepspeed_config["zero_optimization"].update(_zero_settings(launch, trained))
        self._engine, self._optimizer = accelerator.prepare(model, optimizer_of(model))
        self._wrapped = self._engine
        self.module = cast(PromptedViT, self._engine.module)
        if self.scaler is not None:
            state = self.scaler.state_dict()
            interval = state["growth_interval"] * self.scaled_per_step
            self.scaler.load_state_dict({**state, "scale": FP16_SCALE, "growth_interval": interval})
        optimizer = self._engine.optimizer
        of_stage = (
            optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        make_momentum(self._torch_optimizer, of_stage)

    def settle(self) -> None:
        from deepspeed.utils.groups import _clone_world_group

        limit_waiting([_clone_world_group()])  # in which DeepSpeed gathers and reduces

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return cast("torch.amp.GradScaler | None", self._engine.optimizer.torch_autocast_gradscaler)

    @property
    def scaled_per_step(self) -> int:
        # DeepSpeed steps, and updates the scaler, for every group of parameters (deepspeed 0.19.8, `_optimizer_step`)
        optimizer = self._engine.optimizer
        return len(optimizer.fp16_groups if self.stage == 3 else optimizer.bit16_groups)

    @property
    def stage(self) -> int:
        """The ZeRO stage that the engine runs."""
        return int(self._engine.zero_optimization_stage())

    @property
    def parts_trunk(self) -> bool:
        # stage 3 traces the order of modules, to gather ahead; passes of different parts would have it trace anew in
        # every step: 10 broadcasts and 79 looks of the host at the device (deepspeed 0.19.8, a model of two blocks)
        return self.stage < 3

    def forward_model_phase(self, images: Tensor, prompt: Tensor | None, with_clean: bool) -> Outputs:
        return cast(Outputs, self._engine(images, prompt, with_clean))  # the engine has its own autocast

    def backward_model(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        for i, loss in enumerate(losses):
            self._engine.set_gradient_accumulation_boundary(i == len(losses) - 1)
            self._engine.backward(loss() * self.launch.world_size)

    @torch.no_grad()
    def _step_unless(self, faults: Tensor) -> Tensor:
        gradients = [
            gradient
            for shard in self._engine.optimizer.averaged_gradients.values()
            for gradient in shard or ()
            if gradient is not None
        ]
        found = torch.maximum(not_finite(gradients), faults) if gradients else faults.clone()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if self.scaler is not None:
            # DeepSpeed lets every rank's loss scaler look at its own shard: what one has met, all are to meet
            if gradients:
                torch._foreach_add_(gradients, torch.where(found > 0, torch.inf, 0.0).to(gradients[0].dtype))
            self._engine.step()
            if found > 0:  # for which DeepSpeed has had the host wait already
                self._lower_scale_once()
            return found
        with left_out_where(found, self._torch_optimizer):
            self._engine.step()
        return found

    def _lower_scale_once(self) -> None:
        """Behind a step that overflowed: the scale as every other strategy has it then.

        Stages 1 and 2 tell the scaler so for every group of parameters. Stage 3 leaves the step before it tells it
        (deepspeed 0.19.8, `stage3.py`, `step`): the scale would stay where it is, and every step be left out.
        """
        assert self.scaler is not None
        state, told = self.scaler.state_dict(), 0 if self.stage == 3 else self.scaled_per_step
        scale = state["scale"] * state["backoff_factor"] ** (1 - told)
        self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": 0})

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return cast(Tensor, safe_get_full_fp32_param(parameter)).detach().clone()
        with GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().clone()

    @torch.no_grad()
    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value.to(self.device))
        # the weights that the forward reads, which stage 1 and 2 keep beside the optimizer's copy
        with GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.copy_(value)

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        shards = list(self._torch_optimizer.state.values())
        if not shards:
            return {}
        # what torch remembers of a flat shard of many parameters: tensors like them, and AdamW's step count
        counts = {key: value.detach().clone() for key, value in shards[0].items() if _is_count(value)}
        keys = sorted(key for key, value in shards[0].items() if isinstance(value, Tensor) and value.ndim > 0)
        whole = {key: cast(Tensor, safe_get_full_optimizer_state(parameter, key)).detach().clone() for key in keys}
        return whole | counts

    def set_optimizer_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for key, value in state.items():
            if value.ndim > 0:
                safe_set_full_optimizer_state(parameter, value.to(self.device), key)
                continue
            for shard in self._torch_optimizer.state.values():
                shard[key] = value.to(self.device, copy=True)  # the fused kernels want it beside the weights

    def trained_state(self, keep: Callable[[int], bool]) -> dict[str, Tensor]:
        self._link_optimizer_state()
        return super().trained_state(keep)

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        if any(key.startswith("optimizer.") for key in state):
            self._make_optimizer_state()
        super().load_trained_state(state)

    def _make_optimizer_state(self) -> None:
        """A step of no length: DeepSpeed has no optimizer state to write to before its first step."""
        size = self.module.image_size
        outputs = self._engine(torch.zeros(1, 3, size, size, device=self.device))
        nothing = 0.0 * (outputs.projections.sum() + outputs.logits.sum())
        self.backward_model([lambda: nothing])
        self.step_model(0.0, nothing.detach())
        self._link_optimizer_state()

    def _link_optimizer_state(self) -> None:
        """Let DeepSpeed find the optimizer's state of every parameter.

        Stages 1 and 2 link it once, after the first step of the *first* parameter group: the others have none then
        (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, `_optimizer_step`).
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage < 3 and self._torch_optimizer.state:
            optimizer = self._engine.optimizer
            for group, shard in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, shard, self._torch_optimizer.state)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self._engine.optimizer.optimizer)


def _is_count(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _settings(launch: LaunchSettings, images_per_rank: int) -> dict[str, Any]:
    """DeepSpeed's configuration beside what the accelerate configuration says, all of it explicit."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(launch.precision)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": images_per_rank,
        "train_batch_size": images_per_rank * launch.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,  # SGD, and AdamW as torch has it
        # its throughput timer waits for the whole device in every forward and step (deepspeed 0.19.8, utils/timer.py)
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype is not None:
        # no module whose gradients may travel in half precision: sums over ranks are in float32, as under DDP
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return settings


def _zero_settings(launch: LaunchSettings, trained: int) -> dict[str, Any]:
    """What is explicit of DeepSpeed's `zero_optimization`.

    Args:
        trained: elements of what is trained. DeepSpeed's own buckets have 5e8: two buffers of 2 GB in every backward.
    """
    settings: dict[str, Any] = {"reduce_bucket_size": max(trained, 1)}
    if launch.strategy == "zero3":
        # DeepSpeed's own linear function keeps every input, also where the weight is frozen (deepspeed 0.19.8,
        # runtime/zero/linear.py): a quarter more memory in a prompt step. Torch's keeps what a gradient needs
        settings["memory_efficient_linear"] = False
    else:
        # stages 1 and 2 want it even (deepspeed 0.19.8, `nccl_start_alignment_factor`)
        settings["allgather_bucket_size"] = max(trained + trained % 2, 2)
        # nothing is clipped; the norm would be one more collective, and the host would wait for it
        settings["compute_grad_norm"] = False
    return settings
