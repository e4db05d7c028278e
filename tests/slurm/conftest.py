"""The cluster that all tests here share."""

import shutil
import tempfile
from pathlib import Path

import pytest
from slurm_lab import Lab


@pytest.fixture(scope="session")
def lab():
    folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))  # not pytest's own: munge wants folders that all can enter
    folder.chmod(0o755)
    lab = Lab(folder / "lab")
    try:
        lab.cluster("up", "3")
        yield lab
    finally:
        lab.cluster("down")
        shutil.rmtree(folder)
