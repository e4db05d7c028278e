"""Counts what a step computes, moves and sends: operations by dtype, bytes, collectives."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATEN = torch.ops.aten
# what moves nothing: memory is taken
FREE = {ATEN.empty, ATEN.new_empty, ATEN.empty_strided, ATEN.empty_like, ATEN.new_empty_strided}
# questions, most of them that for a fake tensor's device, and marks of the profiler
SILENT = ("prim", "profiler")
SENT = ("allreduce", "allgather", "reduce_scatter", "broadcast", "all_reduce", "all_gather", "alltoall")


class Kernel(NamedTuple):
    """One operation: floating-point operations and of which dtype, and bytes read and written."""

    dtype: torch.dtype
    flops: int
    bytes: int


class Collective(NamedTuple):
    """One collective.

    Attributes:
        bytes: the whole of what is reduced or gathered.
        ranks: how many take part.
        apart: how far each is from the next, 1 where they follow on one another: a copy of HSDP's has a node to itself.
    """

    name: str
    bytes: int
    ranks: int
    apart: int = 1


class Work:
    """What was noted of a step; of views nothing.

    Attributes:
        kernels: how often each was launched.
        collectives: how often each was called.
    """

    def __init__(self) -> None:
        self.kernels: Counter[Kernel] = Counter()
        self.collectives: Counter[Collective] = Counter()

    @property
    def flops(self) -> int:
        return sum(kernel.flops * count for kernel, count in self.kernels.items())

    @property
    def calls(self) -> Counter[str]:
        """How often a collective of each name was called."""
        calls: Counter[str] = Counter()
        for call, count in self.collectives.items():
            calls[call.name] += count
        return calls

    @property
    def sent(self) -> int:
        """Bytes of all collectives."""
        return sum(call.bytes * count for call, count in self.collectives.items())

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Count an operation that was dispatched, and what it gave."""
        space, _, name = str(function).partition(".")
        if space in ("c10d", "_c10d_functional", "c10d_functional"):
            if any(word in name for word in SENT):
                self.collectives[_collective(name, args, out)] += 1
        elif space not in SILENT and not function.is_view and function.overloadpacket not in FREE:
            ins, outs = _tensors((args, kwargs)), _tensors(out)
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*ins, *outs))
            floating = [tensor.dtype for tensor in (*ins, *outs) if tensor.is_floating_point()]
            dtype = floating[0] if floating else torch.float32
            self.kernels[Kernel(dtype, _flops(function, args, kwargs, out), moved)] += 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _flops(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = function.overloadpacket
    if packet in ATTENTION:
        return ATTENTION[packet](*args)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# torch counts those of GPUs only
ATTENTION: dict[Any, Callable[..., int]] = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _collective(name: str, args: Sequence[Any], out: Any) -> Collective:
    word = next(word for word in SENT if word in name).replace("_", "")
    largest = sum(t.numel() * t.element_size() for t in _tensors(args[0]))
    for part in args[1:]:
        largest = max(largest, sum(t.numel() * t.element_size() for t in _tensors(part)))
    return Collective(word, largest, *_group(args))


def _group(args: Sequence[Any]) -> tuple[int, int]:
    """How many take part, and how far apart, as the process group among the arguments says."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return _shape(dist.ProcessGroup.unbox(argument))
            except (RuntimeError, TypeError):
                continue  # the operation of the reduction, which is such an object too
        if isinstance(argument, str) and argument.isdigit():  # functional collectives name their group
            group: Any = getattr(dist.distributed_c10d, "_resolve_process_group")(argument)  # noqa: B009
            return _shape(group)
    return dist.get_world_size(), 1


def _shape(group: Any) -> tuple[int, int]:
    ranks = dist.get_process_group_ranks(group)
    return len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1
