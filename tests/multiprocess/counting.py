"""What a step costs that can be counted: collectives, and the times that the host asks the device."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sptnet.plan.work import Work

ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "aten.equal", "unique", "lift_fresh")
UNSEEN = ("tolist", "cpu", "numpy")


class Counting(TorchDispatchMode):
    """Counts what is dispatched: `collectives` by name, and `reads`.

    Reads are what makes the host wait where the tensors are on a GPU: a value or a shape that depends on values,
    indexing by booleans, and a tensor made from Python's numbers (`torch.tensor`), which is copied there.
    """

    def __init__(self):
        super().__init__()
        self.work, self.reads = Work(), Counter()

    @property
    def collectives(self):
        return self.work.calls

    def __enter__(self):
        # those that torch does without dispatching on a CPU, where they wait for nothing
        self._before = {name: getattr(torch.Tensor, name) for name in UNSEEN}
        for name, does in self._before.items():
            setattr(torch.Tensor, name, self._counted(name, does))
        return super().__enter__()

    def __exit__(self, *error):
        for name, does in self._before.items():
            setattr(torch.Tensor, name, does)
        return super().__exit__(*error)

    def _counted(self, name, does):
        def counted(tensor, *args, **kwargs):
            self.reads[name] += 1
            return does(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ASKING) or self._by_booleans(name, args):
            self.reads[name] += 1
        out = function(*args, **(kwargs or {}))
        self.work.note(function, args, kwargs or {}, out)
        return out

    @staticmethod
    def _by_booleans(name, args):
        indices = args[1] if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        return any(getattr(index, "dtype", None) == torch.bool for index in indices)
