"""Which steps count against the limit of those that may be left out."""

import pytest
import torch

from sptnet.config_file import load_config
from sptnet.run.tolerance import NonFiniteError, NonFiniteGuard
from sptnet.steps import Flags, Taken

UIDS = torch.arange(4)


def step(faults):
    taken = Taken(7, "model", None, None, torch.tensor([faults > 0]), None)
    return Flags(faults, 1, 0, 0), taken, UIDS


def test_a_loss_scale_that_is_never_found_ends_the_run():
    guard = NonFiniteGuard(load_config("quickstart", []), scaled=True)
    taken = step(faults=0)
    sound = Flags(0, 0, 0, 0), *taken[1:]
    for _ in range(3):
        for _ in range(50):
            guard.judge(*taken)
        guard.judge(*sound)
    for _ in range(50):
        guard.judge(*taken)
    with pytest.raises(NonFiniteError, match="no loss scale of fp16 was found: 51 model steps in a row"):
        guard.judge(*taken)


def test_the_search_for_a_loss_scale_uses_nothing_up():
    guard = NonFiniteGuard(load_config("quickstart", ["on_nonfinite=skip", "skip_limit=2"]), scaled=True)
    for _ in range(10):
        guard.judge(*step(faults=0))
    guard.judge(*step(faults=1))
    guard.judge(*step(faults=1))
    assert guard.told() == {"skipped_steps": 12}
    with pytest.raises(NonFiniteError, match="3 steps were skipped, skip_limit is 2"):
        guard.judge(*step(faults=1))
