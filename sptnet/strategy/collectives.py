"""The few collectives of the objective and of the evaluation, and the end of a process that took part in them."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

# torch 2.14 warns of the older names, and 2.9 has no others
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def on_any_rank(so: bool, device: torch.device) -> bool:
    """Whether it is so on any rank; every rank calls it and gets the same answer."""
    if world_size() == 1:
        return so
    told = torch.tensor(so, dtype=torch.int32, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def gather_packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[...] of the same shapes on every rank -> [R, ...] of each, in one collective whatever their dtypes.

    Into one tensor: a list of R receives every rank's part by a copy of its own.
    """
    if world_size() == 1:
        return [tensor[None] for tensor in tensors]
    # every part begins at a multiple of 8 bytes, so that its bytes can be read as any dtype
    parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    padded = [F.pad(part, (0, -len(part) % 8)) for part in parts]
    mine = torch.cat(padded)
    everyone = mine.new_empty(world_size(), len(mine))
    ALL_GATHER(everyone.flatten(), mine)
    received = everyone.split([len(part) for part in padded], dim=1)
    return [
        part[:, : tensor.nbytes].view(tensor.dtype).unflatten(1, tensor.shape)
        if tensor.ndim
        else part[:, : tensor.nbytes].view(tensor.dtype)[:, 0]
        for part, tensor in zip(received, tensors, strict=True)
    ]


def sum_scattered(parts: Tensor) -> Tensor:
    """[R, n] on every rank, a row for each -> [n]: the sum of all that ranks have for this one."""
    if world_size() == 1:
        return parts[0]
    mine = torch.empty_like(parts[0])
    REDUCE_SCATTER(mine, parts.flatten())
    return mine


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors of one dtype, added up over the ranks in one collective."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def exchange_rows(rows: Sequence[Tensor]) -> Tensor:
    """[n_r, C] for each of the R ranks, another n on every rank -> what all ranks had for this one [sum n, C]."""
    if world_size() == 1:
        return rows[0]
    mine = torch.tensor([len(part) for part in rows], device=rows[0].device)
    theirs = torch.empty_like(mine)
    dist.all_to_all_single(theirs, mine)
    sizes = theirs.tolist()
    received = rows[0].new_empty(sum(sizes), rows[0].shape[1])
    dist.all_to_all_single(received, torch.cat(list(rows)), sizes, mine.tolist())
    return received


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code.

    Where there is a process group the interpreter is not finalised: gloo's threads may then still hold what is being
    torn down, and abort a process whose work is done (pytorch/pytorch#179291, #190489; seen here about once in ten
    runs of four processes on two cores).
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
