"""Where tokens lie, how much of them, and what leaves for others."""

import errno
import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import pytest
from cached import arguments
from forked import ran
from launching import ENVIRONMENT, ROOT, losses

from sptnet.cli import main
from sptnet.data.cache_room import InUse, make_room
from sptnet.data.format.temporary import temporary_of
from sptnet.data.tokens import FINGERPRINT, PartWriter
from sptnet.run.parts import PartsError, begin_parts


def test_a_cache_that_nobody_chose_and_cannot_be_written_says_how_to_choose(digits, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise PartsError("tokens cannot be written: Disk quota exceeded").with_outcome("final")

    monkeypatch.setattr("sptnet.preparing.make", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (outcomes := tmp_path / "outcome").mkdir()
    monkeypatch.setenv("SPTNET_OUTCOME", str(outcomes))
    advice = "; or set trunk_cache to a folder on another disk, or to off"
    for cache in ("auto", str(tmp_path / "cache")):
        assert main(arguments(tmp_path / "run", digits, cache)) == 1
        assert (advice in capsys.readouterr().err) == (cache == "auto")
        assert (outcomes / "rank-0").read_text().startswith("final")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_a_full_disk_that_nobody_chose_is_left_and_the_run_goes_on(digits, tmp_path, monkeypatch, number):
    """By name `auto` it filled a home that has a quota, which no look at the disk's free room tells of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shorter = ("schedule.epochs=3", "evaluate.every=3")
    assert main(arguments(tmp_path / "without", digits, "off", *shorter)) == 0
    written, add = [], PartWriter.add

    def full(writer, *rows):
        if len(written) > 200:
            raise OSError(number, os.strerror(number), str(writer.path))
        written.append(writer.path)
        add(writer, *rows)

    monkeypatch.setattr(PartWriter, "add", full)
    assert main(arguments(tmp_path / "run", digits, "auto", *shorter)) == 0
    told = " ".join((tmp_path / "run" / "log.txt").read_text().replace("│", " ").split())
    assert f"cannot be written: {os.strerror(number)}" in told
    assert not [path for path in (tmp_path / "cache/sptnet/tokens").iterdir() if path.is_dir()]
    first, second = ((tmp_path / run / "metrics.json").read_text() for run in ("without", "run"))
    assert first == second


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for bytes and for a few files only: its free bytes tell of nothing, as under a quota."""
    (disk := tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1g,nr_inodes=60", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_all_ranks_leave_a_disk_that_one_finds_full(digits, tmp_path, small_disk):
    settings = ("schedule.epochs=3", "evaluate.every=3")
    command = ["-m", "sptnet", *arguments(tmp_path / "run", digits, "auto", *settings)]
    world = ran(command, "ddp", 2, XDG_CACHE_HOME=str(small_disk))
    assert world.returncode == 0, world.stderr[-3000:]
    told = (tmp_path / "run" / "log.txt").read_text()
    assert "strategy: ddp (DistributedDataParallel), 2 x cpu" in told
    assert "none: " in told
    assert "No space left on device; what was made is removed" in told or "the disk of another rank is full" in told
    assert not [path for path in (small_disk / "sptnet/tokens").iterdir() if path.is_dir()]
    assert len(losses(tmp_path / "run", 33)) == 33


def test_a_folder_that_another_process_is_beginning_is_no_other_one_s(tmp_path):
    """Where a disk has no locks, ranks that began together ended each other."""
    (tmp_path / "tokens").mkdir()
    temporary_of(tmp_path / "tokens" / FINGERPRINT).write_text("{")
    begin_parts(tmp_path / "tokens" / FINGERPRINT, {"of": "these"})
    begin_parts(tmp_path / "tokens" / FINGERPRINT, {"of": "these"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(PartsError, match="is not empty and lacks"):
        begin_parts(tmp_path / "other" / FINGERPRINT, {"of": "these"})


def test_a_disk_or_limit_that_is_too_small_is_said(digits, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", digits, tmp_path / "cache", "trunk_cache_gb=0.001")) == 2
    assert re.search(r"the tokens need 0\.\d GB, and trunk_cache_gb is 0.001", capsys.readouterr().err)
    limited = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from sptnet.cli import main
sys.exit(main({arguments(tmp_path / "run", digits, tmp_path / "cache")!r}))
"""
    ran = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert ran.returncode == 1
    assert "cannot be written: File too large; what was finished stays" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list((tmp_path / "cache").glob("*/*.tmp"))


OLD, USED, NEW = (digit * 16 for digit in "0af")  # as folders of tokens are named


def test_the_least_recently_used_tokens_that_nobody_uses_leave_first(tmp_path):
    folders = [tmp_path / name for name in (OLD, USED, NEW, "mine", "photos")]
    for age, folder in enumerate(folders):
        folder.mkdir()
        if folder.name != "photos":  # of somebody else, with files of these names
            (folder / FINGERPRINT).touch()
        (folder / "rows").write_bytes(bytes(1000))
        (folder / InUse.FILE).touch()
        os.utime(folder / InUse.FILE, (age, age))
    held = InUse(folders[1])
    os.utime(folders[1] / InUse.FILE, (0, 0))  # the oldest, and in use
    assert make_room(folders[3], 500, 3600) == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [USED, NEW, "mine", "photos"]
    assert make_room(folders[3], 900, 3000) == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [USED, "mine", "photos"]
    assert "trunk_cache_gb" in make_room(folders[3], 1500, 3000)
    del held


def test_what_leaves_is_not_held_open_meanwhile(tmp_path, monkeypatch):
    """NFS keeps an open file under another name, and its folder: all folders lost their files, and none left."""
    for name in (OLD, NEW, "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / FINGERPRINT).touch()
        (tmp_path / name / "rows").write_bytes(bytes(1000))
        (tmp_path / name / InUse.FILE).touch()
    os.utime(tmp_path / OLD / InUse.FILE, (0, 0))

    def as_nfs(folder):
        open_here = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
        for path in folder.iterdir():
            path.rename(path.with_name(f".nfs{path.name}")) if str(path) in open_here else path.unlink()
        folder.rmdir()

    monkeypatch.setattr("sptnet.data.cache_room.shutil.rmtree", as_nfs)
    assert make_room(tmp_path / "mine", 500, 2600) == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [NEW, "mine"]
    assert (tmp_path / NEW / "rows").exists()


def test_ranks_that_look_for_room_at_once_all_find_it(tmp_path):
    for number in range(40):
        old = tmp_path / f"{number:016x}"
        old.mkdir()
        (old / "rows").write_bytes(bytes(1000))
        (old / InUse.FILE).touch()
        (old / FINGERPRINT).touch()
    (tmp_path / "mine").mkdir()
    with multiprocessing.get_context("fork").Pool(4) as ranks:
        told = ranks.starmap(make_room, [(tmp_path / "mine", 2000, 4000)] * 4, chunksize=1)
    assert told == [""] * 4


@pytest.mark.parametrize("home", ["/dev/null", ""])
def test_a_home_that_cannot_be_used_is_a_reason_to_keep_nothing(digits, tmp_path, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pathlib.Path.expanduser", nowhere) if not home else None
    assert main(arguments(tmp_path / "run", digits, "auto", "schedule.epochs=1")) == 0
    told = " ".join((tmp_path / "run" / "log.txt").read_text().replace("│", " ").split())
    assert ("none: trunk_cache auto: Could not determine" if not home else "none: /dev/null/.cache/sptnet/") in told


def nowhere(path):
    """As for a user without a home and a name."""
    if "~" in str(path):
        raise RuntimeError("Could not determine home directory.")
    return path
