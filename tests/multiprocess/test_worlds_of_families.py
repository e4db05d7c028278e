"""Backbones of every family have the same losses in both phases under every strategy, on real processes over gloo."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from families_worker import FAMILIES, losses_of
from forked import ran

from sptnet.strategy.connect import connect

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def told(digits, tmp_path_factory):
    """`told(strategy, processes, families)`: what a world told; every world runs once."""

    @cache
    def run(strategy: str, processes: int, families: tuple[str, ...]) -> dict:
        if processes == 1:
            return {family: losses_of(family, str(digits), strategy, *connect(300)) for family in families}
        out = tmp_path_factory.mktemp("told") / "told.json"
        arguments = [HERE / "families_worker.py", out, digits, strategy, processes, *families]
        world = ran(arguments, strategy, processes, timeout=600)
        assert world.returncode == 0, world.stderr[-3000:]
        return json.loads(out.read_text())

    return run


def compare(one: dict, many: dict) -> None:
    assert one["phases"] == many["phases"]
    assert set(one["phases"]) == {"prompt", "model"}
    losses = [np.array(run["losses"]) for run in (one, many)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert np.ptp(losses[0][:, 0]) > 1e-3
    assert one["weights"].keys() == many["weights"].keys()
    names = sorted(one["weights"])
    np.testing.assert_allclose(*([run["weights"][n] for n in names] for run in (many, one)), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_under_ddp(told, family):
    one, many = (told(*world, tuple(FAMILIES))[family] for world in (("single", 1), ("ddp", 2)))
    compare(one, many)
    assert many["reads"] == {"prompt": {}, "model": {}}  # the host waits for nothing


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_two_processes_that_share_what_they_hold(told, strategy, family):
    one, many = (told(*world, tuple(FAMILIES))[family] for world in (("single", 1), (strategy, 2)))
    compare(one, many)
