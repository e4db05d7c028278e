"""Small runs of an earlier version, which tests evaluate, continue and damage."""

import tarfile
from pathlib import Path

import pytest
import yaml

ARCHIVE = Path(__file__).parent / "before" / "before-the-wings.tar.xz"


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A folder with `data`, two finished runs `simgcd` and `sptnet`, and `interrupted`; it is the current one."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def again(before):
    """A configuration that trains, or continues, `interrupted`."""
    config = yaml.safe_load((before / "interrupted" / "config.yaml").read_text())
    (before / "again.yaml").write_text(yaml.safe_dump(config | {"run": "interrupted"}))
    return before / "again.yaml"
