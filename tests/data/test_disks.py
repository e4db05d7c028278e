"""One process looks whether the files of a dataset are there: of a disk, not of a node."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from forked import Forked
from torch.distributed import TCPStore

CODE = """
import sys
from sptnet.build import build_store
from sptnet.config_file import load_config
build_store(load_config(sys.argv[1], sys.argv[2:]))
"""
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("shared", [True, False])
def test_a_node_looks_at_a_disk_of_its_own_only(digits, tmp_path, shared):
    """Two nodes of one process each; a file is missing on the shared disk, or on the second one's."""
    roots = [Path(shutil.copytree(digits, tmp_path / str(node) / "data")) for node in range(2)]
    next(roots[0 if shared else 1].glob("test-*.tar")).unlink()
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    code = tmp_path / "look.py"
    code.write_text(CODE)
    processes = []
    for node in (1, 0):
        environment = {
            "RANK": str(node), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        arguments = [code, CONFIG, "data.root=data", f"run={tmp_path / 'run'}"]
        processes.append(Forked(arguments, cwd=roots[0 if shared else node].parent, **environment))
    for process in processes:
        process.wait(timeout=120)
    looked = ["is missing" in process.stderr for process in processes]
    assert [process.returncode != 0 for process in processes] == looked
    assert looked == [not shared, shared]
