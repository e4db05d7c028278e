"""Loader processes that are killed, and shared memory that is full: one line, and never a wait without end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import ENVIRONMENT, ROOT

from sptnet.build import build_data
from sptnet.config_file import load_config
from sptnet.data.blocks import ShardSource, blocks
from sptnet.data.loader import eval_batches, train_batches
from sptnet.data.manifest import UnreachableError


def readers(digits):
    config = load_config(ROOT / "configs" / "quickstart_simgcd.yaml", [f"data.root={digits}"])
    store, order = build_data(config)
    options = {"augment": "affine", "image_size": 24, "workers": 1}
    source = ShardSource(store, ["unlabelled"])
    return {
        "train": lambda: train_batches(store, order, seed=0, steps=range(10**6), rank=1, world_size=2, **options),
        "eval": lambda: eval_batches(store, "unlabelled", batch_size=1, **options),
        "blocks": lambda: blocks(source, range(len(source)), lambda part: True, block_size=1, **options),
    }


@pytest.mark.parametrize("kind", ["train", "eval", "blocks"])
def test_a_worker_that_is_killed_is_one_line(digits, kind):
    before = set(psutil.Process().children())
    reading = readers(digits)[kind]()
    next(reading)
    (worker,) = set(psutil.Process().children()) - before
    assert os.getpgid(worker.pid) == worker.pid  # a signal to the group of the rank is not for it
    worker.send_signal(signal.SIGKILL)
    with pytest.raises(UnreachableError) as told:
        for _ in reading:
            pass
    assert "a loader worker was killed, perhaps for want of memory: have fewer of them" in str(told.value)
    assert str(told.value).startswith("rank 1: ") == (kind == "train")
    assert "\n" not in str(told.value)


FULL = """
import json, sys
from pathlib import Path
from sptnet.cli import main
codes = [main(command) for command in json.loads(sys.argv[1])]
Path(sys.argv[2]).write_text(json.dumps(codes))
"""
IN_LITTLE = ["unshare", "--map-root-user", "--mount", "bash", "-c",
             'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "bash"]  # fmt: skip
CAN_MOUNT = sys.platform == "linux" and subprocess.run([*IN_LITTLE, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace")
def test_shared_memory_that_is_full_is_one_line_and_no_wait(digits, untrained, tmp_path):
    train = ["train", "configs/quickstart_simgcd.yaml", f"run={tmp_path / 'r'}", f"data.root={digits}"]
    features = ["features", str(digits), "--run", str(untrained), "--out", str(tmp_path / "f"), "--workers", "1"]
    out = tmp_path / "codes.json"
    commands = json.dumps([[*train, "data.workers=2"], features])
    command = [*IN_LITTLE, sys.executable, "-c", FULL, commands, str(out)]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=200)
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 2, ran.stderr[-3000:]
    for line in errors:
        assert "the shared memory of this machine (/dev/shm), through which" in line
        assert "is full: enlarge it, or load without workers (data.workers=0, --workers 0)" in line
    assert "Traceback" not in ran.stderr
    assert json.loads(Path(out).read_text()) == [1, 1]
