"""One process of a node looks whether all shards are there."""

import shutil

import pytest

from sptnet.build import build_store
from sptnet.config_file import load_config
from sptnet.data.format.faults import DatasetError


def test_the_first_process_of_a_node_looks_for_the_files(digits, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(digits, root)
    next(root.glob("test-*.tar")).unlink()
    config = load_config("configs/quickstart_simgcd.yaml", [f"data.root={root}", f"run={tmp_path}/run"])
    for rank in (None, "0"):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(DatasetError, match="is missing"):
            build_store(config)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert build_store(config).manifest.samples("test") == 359
