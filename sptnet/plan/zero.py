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

from sptnet.plan.trial import Counted, Kind
from sptnet.plan.work import Collective, Work


def with_zero(
    counted: Counted, phase: str, stage: int, ranks: int, trained: int, frozen: int, states: int
) -> Counted:  # fmt: skip
    """A step under ZeRO, by what it is on a rank that has everything.

    Args:
        counted: of a rank that is not wrapped.
        trained, frozen: bytes.
        states: tensors that the optimizer keeps of each parameter: 1 SGD's momentum, 2 AdamW's.
    """
    shard = trained // ranks
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
    if stage == 3:
        work.collectives[Collective("allgather", trained + frozen, ranks)] += 1
    if phase == "model":
        reduced = "allreduce" if stage < 3 else "reducescatter"  # stage 2 drops what is not its own afterwards
        work.collectives[Collective(reduced, trained, ranks)] += 1
        if stage < 3:
            work.collectives[Collective("allgather", trained, ranks)] += 1
    return Counted(kinds, work)
