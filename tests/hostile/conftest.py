import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(untrained, tmp_path):
    """The folder of a trained run, to be harmed."""
    return Path(shutil.copytree(untrained, tmp_path / "run"))
