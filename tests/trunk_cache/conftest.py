"""Runs that all tests of a trunk's tokens compare with."""

import pytest
from cached import STEPS, arguments
from launching import losses

from sptnet.cli import main


@pytest.fixture(scope="session")
def uncached(digits, tmp_path_factory):
    """`uncached(type)`: the losses of a run through the trunk."""
    found = {}

    def of(kind):
        if kind not in found:
            run = tmp_path_factory.mktemp("uncached") / "run"
            assert main(arguments(run, digits, "off", f"data.tokens={kind}")) == 0
            found[kind] = losses(run, STEPS)
        return found[kind]

    return of


@pytest.fixture(scope="session")
def made(digits, tmp_path_factory):
    """The folder of a cache, made by a run on one process, and the run."""
    folder = tmp_path_factory.mktemp("made")
    assert main(arguments(folder / "run", digits, folder / "cache", "data.tokens=float32")) == 0
    return folder
