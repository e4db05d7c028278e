"""The few collectives of the objective and of the evaluation, and the end of a process that took part in them."""

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_with_local_graph(local: Tensor) -> Tensor:
    """[n, ...] on every rank -> [R, n, ...]; gradients flow into this rank's own part only.

    Each rank computes the same loss of the whole batch, so the gradient that it gets for its own part is already the
    whole one: nothing needs to travel in the backward pass.
    """
    if world_size() == 1:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    parts[rank()] = local
    return torch.stack(parts)


def gather_views(outputs: Tensor, views: int = 2) -> Tensor:
    """[V * b, ...] view-major on every rank -> [V * B, ...] in the order of the global batch, B = R * b."""
    # [R, V * b, ...] -> [R, V, b, ...] -> [V, R, b, ...] -> [V * R * b, ...]
    by_rank = gather_with_local_graph(outputs)
    return by_rank.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 2)


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
