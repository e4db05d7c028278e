"""Conversions that are killed, interrupted or fail on the way, and their workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from made import accepted, photos, put, refused
from sptnet_shards import workers
from sptnet_shards.arguments import cores
from sptnet_shards.conversion.record import recorded
from sptnet_shards.make_shards import main
from sptnet_shards.source import SourceError

from sptnet.data.format.manifest import read_manifest


def _converting(argv, told):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a process of its own has it
    with open(told, "w") as sys.stderr:
        code = main(argv)
    os._exit(code)


def begun(root, out, shards=20):
    """A conversion that has finished so many shards; forked, for its imports would take most of a test's time."""
    run = ["imagefolder", str(root), str(out), "--old", "2", "--workers", "1"]
    process = multiprocessing.get_context("fork").Process(target=_converting, args=(run, f"{out}.told"))
    process.start()
    while process.exitcode is None and len(list(out.glob("*.tar"))) < shards:
        time.sleep(0.002)
    return process


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path, capsys):
    root = photos(tmp_path / "photos", each=12)
    whole, out = tmp_path / "whole", tmp_path / "out"
    accepted(capsys, "imagefolder", root, whole, "--old", "2")
    begun(root, out).kill()
    time.sleep(0.2)
    damaged = [*sorted(out.glob("*.tar"))[:3], *sorted(out.glob("*.npy"))[3:5], *sorted(out.glob("*.jsonl"))[5:7]]
    assert len(damaged) == 7
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    accepted(capsys, "imagefolder", root, out, "--old", "2")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_task_that_is_to_fail_keeps_no_shard_from_which_another_left_images_out(tmp_path, capsys):
    root, codes = photos(tmp_path / "photos", each=12), []
    put(root / "cat" / "5.jpg", b"\xff\xd8\xff no image")
    for task in ("0/2", "1/2"):
        out = tmp_path / task.replace("/", "-")
        accepted(capsys, "imagefolder", root, out, "--old", "2", "--on-error", "skip", "--task", task)
        codes.append(main(["imagefolder", str(root), str(out), "--old", "2", "--task", task]))
        assert ("cat/5.jpg" in capsys.readouterr().err) == (codes[-1] == 1)
    assert sorted(codes) == [0, 1]


def test_the_advice_to_skip_goes_on_where_it_stopped(tmp_path, capsys):
    root, out = photos(tmp_path / "photos", each=12), tmp_path / "out"
    put(root / "cat" / "5.jpg", b"\xff\xd8\xff no image")
    assert "--on-error skip leaves such images out" in refused(
        capsys, "imagefolder", root, out, "--old", "2", "--workers", "1"
    )
    # a worker may be ended between a tar and the note that it is whole
    before = {name: (out / name).stat().st_mtime_ns for name in recorded(out)}
    assert before
    accepted(capsys, "imagefolder", root, out, "--old", "2", "--on-error", "skip")
    assert [skipped["file"] for skipped in read_manifest(out).skipped] == ["cat/5.jpg"]
    assert all((out / name).stat().st_mtime_ns == changed for name, changed in before.items())
    accepted(capsys, "verify", out)


def test_ctrl_c_is_one_line(tmp_path):
    root, out = photos(tmp_path / "photos", each=40), tmp_path / "out"
    process = begun(root, out, shards=3)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    told = (tmp_path / "out.told").read_text()
    assert process.exitcode == 130
    assert told.splitlines()[-1].startswith("error: stopped by Ctrl-C")
    assert "Traceback" not in told
    assert not list(out.glob("*.tmp"))


IMPORTING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in all that a script starts in the background

class Slow:
    def find_spec(self, name, *_):
        if name == "torch":
            print("ready", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
from sptnet_shards.make_shards import main
main(["digits", "out"])
"""


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (-signal.SIGINT, "")


def test_workers_are_no_more_than_cores_that_may_be_used_or_shards(monkeypatch):
    assert cores() == len(os.sched_getaffinity(0))
    asked = []

    class Pool(workers.ProcessPoolExecutor):
        def __init__(self, count, *rest):
            asked.append(count)
            super().__init__(count, *rest)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    assert sorted(workers.run_all(pow, (2,), range(3), 40)) == [1, 2, 4]
    assert asked == [3]


def fails_first(number):
    if number == 0:
        raise SourceError("bad")
    time.sleep(60)


def test_nobody_writes_any_more_when_a_conversion_has_failed():
    """Its lock is free then, and what it left is cleaned up."""
    start = time.monotonic()
    with pytest.raises(SourceError, match="bad"):
        list(workers.run_all(fails_first, (), range(3), 3))
    assert not multiprocessing.active_children()
    assert time.monotonic() - start < 20
