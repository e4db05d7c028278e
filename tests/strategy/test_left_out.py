"""A step that is left out on the device leaves parameters, momentum, counts and decay as they were."""

import pytest
import torch

from sptnet.strategy.base import left_out_where, make_momentum, not_finite

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


def made(name):
    parameters = [torch.nn.Parameter(torch.arange(6.0).view(2, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = OPTIMIZERS[name](parameters)
    make_momentum(optimizer, parameters)
    return parameters, optimizer


def step(parameters, optimizer, value):
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    found = not_finite([parameter.grad for parameter in parameters])
    with left_out_where(found, optimizer):
        optimizer.step()
    return bool(found)


def everything(parameters, optimizer):
    states = [optimizer.state[p][key] for p in parameters for key in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in (*parameters, *states)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_and_any_other_step_can_be_left_out(name, bad):
    ours, plain = made(name), made(name)
    assert step(*ours, bad)
    for value in (1.0, 2.0):
        assert not step(*ours, value)
        assert not step(*plain, value)
        before = everything(*ours)
        assert step(*ours, bad)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(*ours), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(everything(*plain), everything(*ours), strict=True))


def test_an_optimizer_that_would_not_look_is_not_taken():
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(AssertionError, match="fused"), left_out_where(torch.ones(()), torch.optim.SGD([parameter])):
        pass


def test_a_rank_that_has_no_part_of_any_weight_has_nothing_that_is_not_finite():
    assert not not_finite([torch.empty(0, 3), torch.empty(0)])
    assert not_finite([torch.empty(0, 3), torch.tensor([float("nan")])])
