"""What DeepSpeed's engine adds to ranks that share nothing but the loss: its engine does not run on fake tensors.

By what deepspeed 0.19.8 does with float32 parameters and buckets as large as what is trained (strategy/zero.py).
Of T trained and F frozen bytes on R ranks:

    stage        1             2             3
    weights      T + F         T + F         (T + F) / R
    optimizer    float32 copy and momentum of a shard: (1 + states) T / R
    gradients    the shard that was reduced last: T / R
    temporaries  in the backward pass a bucket of T; the gradients that go into it are counted as ranks have them
    gathered     -             -             T + F: what was gathered stays, DeepSpeed's limits being 1e9 elements
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
    kinds["gradients"] += shard - trained
    if stage == 3:
        kinds["weights"] = prompts + (trained + frozen) // ranks
        kinds["gathered"] = trained + frozen
    if phase == "model":
        kinds["temporaries"] += trained
    work = Work()
    assert counted.work is not None
    work.kernels.update(counted.work.kernels)
    work.collectives.update(counted.work.collectives)
    if stage == 3:
        work.collectives[Collective("allgather", trained + frozen, ranks)] += 1
    if phase == "model":
        if stage == 1:
            work.collectives[Collective("allreduce", trained, ranks)] += 1
        else:
            work.collectives[Collective("reducescatter", trained, ranks)] += 1
        if stage < 3:
            work.collectives[Collective("allgather", trained, ranks)] += 1
    return Counted(kinds, work)
