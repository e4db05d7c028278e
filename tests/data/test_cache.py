"""The node's cache: many fetches at a time, by threads and processes, stay within its limit."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from forked import FORKS

from sptnet.data.format.faults import DatasetError
from sptnet.data.storage.cache import NodeCache, _used, in_user_cache

SIZE, LIMIT = 40_000, 100_000
CONTENTS = {hashlib.sha256(content).hexdigest(): content for content in (bytes([i]) * SIZE for i in range(24))}


def fetch(sha256):
    """Writes the content in ten pieces, as a slow network brings it."""

    def write(check, path):
        with open(path, "wb") as file:
            for begin in range(0, SIZE, SIZE // 10):
                file.write(CONTENTS[sha256][begin : begin + SIZE // 10])
                file.flush()
                time.sleep(0.002)
        check(path)

    return write


def read_all(folder):
    cache = NodeCache(folder, LIMIT)

    def read(sha256):
        with os.fdopen(cache.open(sha256, SIZE, fetch(sha256)), "rb") as file:
            return file.read() == CONTENTS[sha256]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, CONTENTS))


def bytes_in(folder):
    """While nothing is begun or leaves."""
    (folder / "locks").mkdir(exist_ok=True)
    total = 0
    with FileLock(folder / "locks" / "room.lock"):
        for path in folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(FileNotFoundError):  # a fetch that failed meanwhile
                total += path.stat().st_size
    return total


def test_many_fetches_at_a_time_stay_within_the_limit(tmp_path):
    processes = [FORKS.Process(target=read_all, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, bytes_in(tmp_path))
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0]
    assert SIZE < most <= LIMIT


@pytest.mark.parametrize("left", [next(iter(CONTENTS)), list(CONTENTS)[2][:2] + "f" * 62], ids=["other", "same"])
def test_what_a_killed_fetch_left_gives_its_room_back(tmp_path, left):
    """Also where it lies in the folder, whose lock is held, of the file that needs its room."""
    cache, (_, second, third, *_) = NodeCache(tmp_path, LIMIT), CONTENTS

    def killed(check, path):
        os._exit(9)

    begun = multiprocessing.get_context("fork").Process(target=cache.open, args=(left, SIZE, killed))
    begun.start()
    begun.join()
    assert [path.name for path in tmp_path.glob("*/*.part")] == [f"{left}.{SIZE}.part"]
    for sha256 in (second, third):
        os.close(cache.open(sha256, SIZE, fetch(sha256)))
    assert not list(tmp_path.glob("*/*.part"))
    assert bytes_in(tmp_path) == 2 * SIZE


def test_a_fetch_that_fails_leaves_nothing_and_may_be_tried_again(tmp_path):
    cache, sha256 = NodeCache(tmp_path, LIMIT), next(iter(CONTENTS))

    def failing(check, path):
        path.write_bytes(b"half")
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        cache.open(sha256, SIZE, failing)
    assert bytes_in(tmp_path) == 0
    os.close(cache.open(sha256, SIZE, fetch(sha256)))
    assert bytes_in(tmp_path) == SIZE


def test_a_disk_that_others_fill_makes_files_leave_before_the_limit_does(tmp_path, monkeypatch):
    cache, (first, second, third, *_) = NodeCache(tmp_path, LIMIT), CONTENTS
    os.close(cache.open(first, SIZE, fetch(first)))
    free = [SIZE]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("sptnet.data.storage.cache.shutil.disk_usage", lambda _: usage._replace(free=free[0]))
    os.close(cache.open(second, SIZE, fetch(second)))
    assert bytes_in(tmp_path) == 2 * SIZE
    free[0] = SIZE // 2
    os.close(cache.open(third, SIZE, fetch(third)))
    assert not cache.has(first)
    assert bytes_in(tmp_path) == 2 * SIZE
    for sha256 in (second, third):
        (tmp_path / sha256[:2] / sha256).unlink()
    with pytest.raises(DatasetError, match=r"its disk has 0\.00 GB free.*set data\.remote\.cache"):
        cache.open(first, SIZE, fetch(first))


def test_a_file_that_is_there_waits_for_no_other_fetch(tmp_path):
    """Files share a lock by the beginning of their names; a slow fetch held up those that were there."""
    cache, sha256 = NodeCache(tmp_path, LIMIT), next(iter(CONTENTS))
    os.close(cache.open(sha256, SIZE, fetch(sha256)))
    with FileLock(tmp_path / "locks" / f"{sha256[:2]}.lock"), ThreadPoolExecutor(1) as pool:
        os.close(pool.submit(cache.open, sha256, SIZE, None).result(timeout=30))


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(DatasetError, match=r"its disk has no locks: set data\.remote\.cache"):
        NodeCache(tmp_path, LIMIT).open(next(iter(CONTENTS)), SIZE, fetch)


def test_caches_are_where_a_site_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    for told, expected in ((None, "/home/u/.cache"), ("", "/home/u/.cache"), ("scratch", "/home/u/.cache"),
                           ("/scratch/u", "/scratch/u")):  # fmt: skip
        monkeypatch.setenv("XDG_CACHE_HOME", told) if told is not None else monkeypatch.delenv("XDG_CACHE_HOME", False)
        assert in_user_cache(Path("~/.cache/sptnet/tokens")) == Path(expected, "sptnet", "tokens")
        assert in_user_cache(Path("~/kept")) == Path("/home/u/kept")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert NodeCache(Path("~/.cache/sptnet"), LIMIT).folder == tmp_path / "sptnet"


def test_a_file_that_is_used_again_is_not_the_first_to_leave(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for age, path in enumerate((first, second)):
        path.write_bytes(b"x")
        os.utime(path, (age, age))
    os.close(_used(first))
    assert first.stat().st_mtime > second.stat().st_mtime
    assert _used(tmp_path / "gone") is None
