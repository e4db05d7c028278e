"""Counts the bytes of tensors that are alive, storage by storage, of real tensors and of fake ones alike."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sptnet.plan.work import Work

DEVICE = torch.ops.prim.device.default
BLOCK = 512  # bytes to which torch's allocator on GPUs rounds


@dataclass(eq=False)
class Held:
    """Bytes that were held for a while; times are counts of what was taken and given back.

    Attributes:
        died: None while they are held.
        refilled: of a storage that was empty and got its bytes back, as FSDP2 does with gathered weights.
    """

    bytes: int
    born: int
    refilled: bool
    died: int | None = None

    def alive(self, time: int) -> bool:
        return self.born <= time and (self.died is None or time < self.died)


class LiveBytes(TorchDispatchMode):
    """While it is entered, notes every storage that an operation makes, until it is freed or emptied.

    What an operation takes inside and gives back before it returns (cuBLAS's workspaces) is not seen, nor what a
    library holds outside of torch. A storage that is emptied and refilled by `resize_`, without an operation, is.

    Attributes:
        now: bytes that are held.
        peak: the most that were held since `restart`, and when.
        work: where operations are noted too; one mode for both, since every mode makes every operation slower.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of: Any = WeakIdKeyDictionary()
        self._held: list[Held] = []
        self.time = self.now = 0
        self.peak = (0, 0)
        self.work: Work | None = None

    def restart(self) -> None:
        """Look for a new peak from here on."""
        self._held = [held for held in self._held if held.died is None]
        self.peak = (self.now, self.time)

    def note(self, tensor: Tensor) -> None:
        """Count a tensor that was made elsewhere."""
        self._add(_local(tensor).untyped_storage())

    def at_peak(self) -> Sequence[Held]:
        """What was held at the peak."""
        return [held for held in self._held if held.alive(self.peak[1])]

    def of(self, tensor: Tensor) -> Held | None:
        """What is held for a tensor."""
        found: Held | None = self._of.get(_local(tensor).untyped_storage())
        return found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes as long as the count

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # four of five calls: autograd asks every fake tensor again and again
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to the tensors inside comes here again
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if self.work is not None:
            self.work.note(function, args, kwargs, out)
        if isinstance(out, Tensor):
            self._add(out.untyped_storage())
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._add(leaf.untyped_storage())
        return out

    def __enter__(self) -> "LiveBytes":
        self._resize: Callable[..., Any] = UntypedStorage.resize_
        before, mode = self._resize, self

        def resized(storage: UntypedStorage, size: int) -> Any:
            done = before(storage, size)
            mode._resized(storage)
            return done

        UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def _add(self, storage: UntypedStorage, refilled: bool = False) -> None:
        if storage in self._of:
            return
        held = Held(-(-storage.nbytes() // BLOCK) * BLOCK, self.time + 1, refilled)
        self._of[storage] = held
        self._held.append(held)
        self.time += 1
        self.now += held.bytes
        if self.now > self.peak[0]:
            self.peak = (self.now, self.time)
        weakref.finalize(storage, self._freed, held)

    def _freed(self, held: Held) -> None:
        if held.died is None:
            self.time += 1
            self.now -= held.bytes
            held.died = self.time

    def _resized(self, storage: UntypedStorage) -> None:
        if (held := self._of.pop(storage, None)) is not None:
            self._freed(held)
        self._add(storage, refilled=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
