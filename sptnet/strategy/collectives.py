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


def gather_rows(rows: Tensor, block: int = 4096) -> Tensor | None:
    """[n, C] int64 with non-negative first column, another n on every rank -> all rows [sum n, C] on rank 0, else None.

    Sent in blocks of fixed size, padded with -1, so that no rank needs to know the others' counts per block.
    """
    if world_size() == 1:
        return rows
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    gathered = []
    for begin in range(0, int(longest), block):
        part = rows[begin : begin + block]
        padded = rows.new_full((block, rows.shape[1]), -1)
        padded[: len(part)] = part
        everyone = [torch.empty_like(padded) for _ in range(world_size())] if rank() == 0 else None
        dist.gather(padded, everyone)
        if everyone is not None:
            received = torch.cat(everyone)
            gathered.append(received[received[:, 0] >= 0].cpu())
    if rank() != 0:
        return None
    return torch.cat(gathered) if gathered else rows.cpu()


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
