"""Shared by all tests: the reference numbers, and a small dataset of real images made by the real tool."""

from pathlib import Path

import numpy as np
import pytest
from sptnet_shards.make_shards import main as make_shards

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def reference():
    """`reference(name)`: the path of a reference file; of an .npz, its arrays."""

    def read(name: str):
        path = REFERENCE / name
        return np.load(path) if path.suffix == ".npz" else path

    return read


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The handwritten digits as shards."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    assert make_shards(["digits", str(out)]) == 0
    return out
