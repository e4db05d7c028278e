"""What DeepSpeed's engine adds to ranks that share nothing but the loss: its engine does not run on fake tensors.

By what deepspeed 0.19.8 does with float32 parameters and buckets as large as what is trained (strategy/zero.py).
Of T trained and F frozen bytes on R ranks:

    stage        1             2             3
    weights      T + F         T + F         (T + F) / R
    optimizer    float32 copy and momentum of a shard: (1 + states) T / R
    gradients    T             T             T + T / R          as left by the step before
    temporaries  T             T             -                  a bucket, in the backward pass
    gathered     -             -             T + F: what was gathered stays, DeepSpeed's limits being 1e9 elements;
                                             nothing on one rank, whose shards are whole
"""

from collections import Counter

from torch import nn

from sptnet.plan.trial import Counted, Kind
from sptnet.plan.work import Collective, Work
from sptnet.strategy.base import parameter_groups

FLOAT = 4  # bytes of what is trained, in every precision


def with_zero(
    counted: Counted, phase: str, stage: int, ranks: int, model: nn.Module, states: int
) -> Counted:  # fmt: skip
    """A step under ZeRO, by what it is on a rank that has everything.

    Args:
        counted: of a rank that is not wrapped.
        model: whole.
        states: tensors that the optimizer keeps of each parameter: 1 SGD's momentum, 2 AdamW's.
    """
    sizes = {p: FLOAT * p.numel() for p in model.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    frozen, shard = sum(sizes.values()) - trained, trained // ranks
    kinds: dict[Kind, int] = dict(counted.bytes)
    prompts = kinds["weights"] - trained - frozen
    kinds["optimizer"] += (1 + states) * shard - states * trained
    # what a step leaves stays until the next; its own gradients go into a bucket as they come
    left = shard + trained if stage == 3 else trained
    kinds["gradients"] = left if phase == "model" else kinds["gradients"] + left - trained
    if stage == 3:
        kinds["weights"] = prompts + (trained + frozen) // ranks
        kinds["gathered"] = trained + frozen if ranks > 1 else 0
    elif phase == "model":
        kinds["temporaries"] += trained
    work = Work()
    assert counted.work is not None
    work.kernels.update(counted.work.kernels)
    work.collectives.update(counted.work.collectives)
    if phase == "model":
        work.collectives += _sent_by_model_step(stage, ranks, model, sizes, trained)
    return Counted(kinds, work)


def _sent_by_model_step(
    stage: int, ranks: int, model: nn.Module, sizes: dict[nn.Parameter, int], trained: int
) -> Counter[Collective]:  # fmt: skip
    """Beside what the objective sends. Other phases find weights as the model step before left them, gathered."""
    sent: Counter[Collective] = Counter()
    sent[Collective("allreduce", FLOAT, ranks)] += 1  # whether the step is left out
    if stage == 3:
        for size in sizes.values():
            sent[Collective("allgather", size, ranks)] += 1
        sent[Collective("allreduce", 8, ranks)] += 2  # DeepSpeed's norm of the gradients
        sent[Collective("reducescatter", trained, ranks)] += 1
        return sent
    sent[Collective("allreduce", trained, ranks)] += 1  # stage 2 drops what is not its own afterwards
    for group in parameter_groups(model, 0.0):
        if group["params"]:
            sent[Collective("allgather", sum(sizes[p] for p in group["params"]), ranks)] += 1
    return sent
