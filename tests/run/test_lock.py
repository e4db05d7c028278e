"""One process at a time trains in a run's folder, also where the filesystem has no locks."""

import errno
import fcntl
import json
import multiprocessing
import time

import pytest

from sptnet.data.format import temporary
from sptnet.run import lock
from sptnet.run.folder import OccupiedError
from sptnet.run.lock import LEASE, RunLock


@pytest.fixture(autouse=True)
def _on_a_disk_of_this_node(monkeypatch):
    monkeypatch.setattr(lock, "network_file_system", lambda folder: None)


def test_a_second_lock_is_refused_until_the_first_is_released(tmp_path):
    first = RunLock(tmp_path / "run")
    with pytest.raises(OccupiedError, match="is being trained by another process"):
        RunLock(tmp_path / "run")
    first.release()
    RunLock(tmp_path / "run").release()


def test_what_was_forked_meanwhile_keeps_nothing(tmp_path):
    """Loader workers outlive their rank by seconds; neither do they let others in while it lives."""
    first = RunLock(tmp_path / "run")
    forks = multiprocessing.get_context("fork")
    child = forks.Process(target=first.release)
    child.start()
    child.join()
    assert child.exitcode == 0
    with pytest.raises(OccupiedError):
        RunLock(tmp_path / "run")
    begun = forks.Barrier(2)
    other = forks.Process(target=lambda: (begun.wait(), time.sleep(60)))
    other.start()
    begun.wait(60)
    first.forget()  # as a process that is killed does
    RunLock(tmp_path / "run").release()
    other.kill()
    other.join()


@pytest.fixture
def no_flock(monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.6)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_a_lease_that_is_renewed_is_respected(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 60)  # it is seen to be renewed long before
    first = RunLock(tmp_path)
    with pytest.raises(OccupiedError, match=r"trained by process \d+ on "):
        RunLock(tmp_path)
    first.release()
    assert not (tmp_path / LEASE).exists()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("left", [json.dumps({"job": "7", "host": "gone", "beat": 3}), "", "[]", "{"])
def test_a_lease_that_a_killed_job_left_is_taken_over(tmp_path, no_flock, left):
    (tmp_path / LEASE).write_text(left)
    RunLock(tmp_path).release()


def test_a_requeued_job_need_not_wait_for_its_own_lease(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 60)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / LEASE).write_text(json.dumps({"job": "7", "restart": "0", "host": "gone", "beat": 3}))
    begin = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - begin < 10


def test_twice_in_one_start_of_a_job_is_twice(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 60)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = RunLock(tmp_path)
    with pytest.raises(OccupiedError):
        RunLock(tmp_path)
    first.release()


def test_a_lock_that_holds_on_one_node_only_is_not_trusted(tmp_path, no_flock, monkeypatch):
    """As on BeeGFS: every node's `flock` succeeds, and two trained in one folder."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    first = RunLock(tmp_path / "local")
    RunLock(tmp_path / "local").release()
    first.release()
    monkeypatch.setattr(lock, "network_file_system", lambda folder: "beegfs")
    monkeypatch.setattr(lock, "PATIENCE", 60)
    first = RunLock(tmp_path / "shared")
    with pytest.raises(OccupiedError, match=r"trained by process \d+ on "):
        RunLock(tmp_path / "shared")
    first.release()
    assert not (tmp_path / "shared" / LEASE).exists()
    RunLock(tmp_path / "shared").release()


def test_what_was_forked_leaves_the_lease(tmp_path, no_flock):
    first = RunLock(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=first.release)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (tmp_path / LEASE).exists()
    first.release()


def test_the_lease_of_a_process_of_this_machine_that_ended_is_taken_over_at_once(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 60)
    ended = multiprocessing.get_context("fork").Process(target=lambda: None)
    ended.start()
    ended.join()
    left = {"host": "here", "machine": temporary.machine(), "process": ended.pid, "token": "x", "beat": 3}
    (tmp_path / LEASE).write_text(json.dumps(left))
    begin = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - begin < 10


def test_of_two_that_take_over_a_stale_lease_one_has_it(tmp_path, no_flock, monkeypatch):
    """The slower one had removed the fresh lease of the faster one, and both trained until its next beat."""
    (tmp_path / LEASE).write_text(json.dumps({"process": 1, "host": "gone", "token": "old", "beat": 7}))
    monkeypatch.setattr(lock, "BEAT", 60)
    faster, remove = [], RunLock._remove

    def after_another(self, seen):
        monkeypatch.setattr(RunLock, "_remove", remove)
        faster.append(RunLock(tmp_path))
        remove(self, seen)

    monkeypatch.setattr(RunLock, "_remove", after_another)
    with pytest.raises(OccupiedError):
        RunLock(tmp_path)
    assert json.loads((tmp_path / LEASE).read_text())["token"] == faster[0]._mine["token"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(LEASE)] == [LEASE]
    faster[0].release()


def test_who_finds_its_lease_taken_over_writes_nothing_more(tmp_path, no_flock):
    forks = multiprocessing.get_context("fork")
    begun = forks.Event()

    def train():
        held = RunLock(tmp_path)
        begun.set()
        time.sleep(60)
        held.release()

    trained = forks.Process(target=train)
    trained.start()
    assert begun.wait(60)
    (tmp_path / LEASE).write_text(json.dumps({"token": "another", "host": "elsewhere", "beat": 0}))
    trained.join(30)
    assert trained.exitcode == 1
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "another"
