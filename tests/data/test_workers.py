"""Loader processes that are killed, and shared memory that is full: one line, and never a wait without end."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ENVIRONMENT, ROOT
from torch.utils.data import Dataset

from sptnet.data.format.faults import UnreachableError
from sptnet.data.workers import load


def test_a_worker_that_is_killed_is_one_line(digits, tmp_path):
    """Not of the rank's process group, so that a signal to all of that is not for it, and what comes stops nobody."""
    train = ["train", "configs/quickstart_simgcd.yaml", f"run={tmp_path / 'r'}", f"data.root={digits}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sptnet", *train, "data.workers=1", "checkpoint.every=1"],
        cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def wait_for_a_checkpoint_but(seen):
        while (there := set((tmp_path / "r").glob("checkpoints/step-*[0-9]"))) <= seen:
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.05)
        return there

    there = wait_for_a_checkpoint_but(set())
    (worker,) = psutil.Process(process.pid).children()
    assert os.getpgid(worker.pid) == worker.pid
    for number in (
        signal.SIGINT,
        signal.SIGUSR1,
        signal.SIGHUP,
        signal.SIGTERM,
        signal.SIGTERM,
    ):  # as by `pkill -f sptnet`
        worker.send_signal(number)
    wait_for_a_checkpoint_but(there)
    worker.kill()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in told.splitlines() if line.startswith("error")]
    assert "a loader worker was killed, perhaps for want of memory: have fewer of them" in line
    assert "Traceback" not in told


class Hanging(Dataset):
    """An item that never comes, after one that does."""

    def __getitem__(self, number):
        time.sleep(1000 * number)
        return (b"",)


def test_one_that_hangs_is_ended_a_while_after_it_was_asked(monkeypatch):
    monkeypatch.setattr("sptnet.data.workers.OUTLIVED", 15)
    others = set(multiprocessing.active_children())
    items = load(Hanging(), range(3), 1)
    next(items)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(1)
    assert worker.is_alive()
    with pytest.raises(RuntimeError, match="DataLoader worker was killed, signal: Alarm clock"):
        next(items)


def test_one_that_hangs_is_ended_at_once_by_whoever_ends_the_loader():
    others = set(multiprocessing.active_children())
    items = load(Hanging(), range(3), 1)
    next(items)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL


class Large(Dataset):
    """Items that do not fit into a pipe: a worker that is ahead waits in the middle of one."""

    def __getitem__(self, number):
        return (bytes(300_000),)


@pytest.mark.parametrize("workers", [1, 3])
def test_one_that_is_killed_in_the_middle_of_an_item_is_not_waited_for(workers):
    handler, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    items = load(Large(), range(1000), workers)
    for _ in range(3):
        next(items)
    time.sleep(0.5)
    ours = set(multiprocessing.active_children()) - others
    assert len(ours) == workers
    ours.pop().kill()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader worker was killed, signal: Killed"):
        list(items)
    assert time.monotonic() - begin < 60
    assert signal.getsignal(signal.SIGCHLD) == handler


FULL = """
import json, sys
from pathlib import Path
from sptnet.cli import main
codes = [main(command) for command in json.loads(sys.argv[1])]
Path(sys.argv[2]).write_text(json.dumps(codes))
"""
IN_LITTLE = ["unshare", "--map-root-user", "--mount", "bash", "-c",
             'mount -t tmpfs -o size=80k tmpfs /dev/shm && exec "$@"', "bash"]  # fmt: skip
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
        assert "through the shared memory of this machine (/dev/shm), which is full" in line
        assert "is full: enlarge it, or load without workers (data.workers=0, --workers 0)" in line
    assert "Traceback" not in ran.stderr
    assert json.loads(Path(out).read_text()) == [1, 1]


class Failing(Dataset):
    def __getitem__(self, number):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/nfs/out/listing.bin")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_in_a_worker_is_named(workers):
    with pytest.raises(UnreachableError, match=r"/nfs/out/listing\.bin: Input/output error"):
        next(load(Failing(), [0], workers))


TERMINATED = """
import os, signal, sys, time
from sptnet.data.workers import OUTLIVED, _end_later
signal.signal(signal.SIGTERM, _end_later)
rank = os.getpid()
if os.fork() == 0:
    end = time.monotonic() + 1
    while time.monotonic() < end:
        os.kill(rank, signal.SIGTERM)
    os._exit(0)
os.wait()
print(OUTLIVED - 10 < signal.getitimer(signal.ITIMER_REAL)[0] <= OUTLIVED)
"""


def test_a_worker_that_is_asked_to_end_again_and_again_says_nothing():
    """Its handler was changed by the first request, and of one that came in that moment Python printed a traceback."""
    ran = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True, env=ENVIRONMENT)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "True\n", "")


def test_workers_are_forked_whatever_python_would_do():
    """A server that forks them would stay in the rank's group of processes, and a signal to that would end it."""
    script = """
import multiprocessing, os
multiprocessing.set_start_method("forkserver")
from sptnet.data.workers import load
class Parents:
    def __getitem__(self, number):
        return (os.getppid(),)
assert [one for one, in load(Parents(), [0, 1], 1)] == [os.getpid()] * 2
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, check=True)
