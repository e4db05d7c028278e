"""Several tasks write one dataset: the same bytes as one, whoever is killed, comes twice or late, or asks otherwise."""

import argparse
import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from launching import contents
from PIL import Image
from sptnet_shards import commands
from sptnet_shards.conversion import convert, finish, record, scan
from sptnet_shards.items import Item, Items
from sptnet_shards.make_shards import main
from sptnet_shards.share import Share, share
from sptnet_shards.source import SourceError
from test_same_bytes import png

from sptnet.data.format.files import write_once
from sptnet.data.format.temporary import remove_leftovers, temporary_of, writer_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("ant", "bee", "cat", "dog")):
        (root / name).mkdir()
        for i in range(40):
            (root / name / f"{i}.png").write_bytes(png(number * 40 + i))
    return root


def run(photos, out, *extra):
    return ["imagefolder", str(photos), str(out), "--old", "2", "--workers", "1", *extra]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(run(photos, out)) == 0
    return contents(out)


def test_tasks_in_any_order_give_the_bytes_of_one(photos, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    scans = []
    monkeypatch.setattr(convert, "write_items", lambda *of: scans.append(of) or scan.write_items(*of))
    for task in (2, 0, 2):
        assert main(run(photos, out, "--task", f"{task}/3")) == 0
    assert "21 of 32 shards are there; the last task, or --finish, writes the manifest" in capsys.readouterr().out
    assert main(["show", str(out)]) == 0
    told = capsys.readouterr().out
    assert "is being written (imagefolder)" in told
    assert "writing: nobody" in told
    monkeypatch.setattr(commands, "LATE", 0.0)
    assert main(run(photos, out, "--finish")) == 1
    assert "lacks 11 of 32 shards, train-labelled-000001.tar, " in capsys.readouterr().err
    assert main(run(photos, out, "--task", "1/3")) == 0
    assert "40 labelled, 120 unlabelled" in capsys.readouterr().out
    assert contents(out) == whole
    assert len(scans) == 1
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for late in (["--task", "1/3"], ["--finish"], [], ["--task", "0/999"]):  # a requeued twin, and others
        assert main(run(photos, out, *late)) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_finishing_reads_records_and_no_shard(photos, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for task in ("0/2", "1/2"):
        monkeypatch.setattr(convert, "finish", lambda *of: finish.Unfinished(["x"], 1))
        assert main(run(photos, out, "--task", task)) == 0
    monkeypatch.undo()
    opened, listening = [], True
    sys.addaudithook(lambda event, told: listening and event == "open" and opened.append(str(told[0])))
    elsewhere = photos.rename(photos.with_name("away"))  # nor is the source needed
    assert main(run(photos, out, "--finish")) == 0
    listening = False  # a hook stays for as long as the process
    assert len([path for path in opened if path.endswith(".tar.json")]) == 32
    assert not [path for path in opened if path.endswith((".tar", ".npy", ".jsonl"))]
    elsewhere.rename(photos)
    assert (out / "manifest.json").read_bytes() == whole["manifest.json"]


def converting(argv):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os._exit(main(argv))


def begun(argv):
    process = multiprocessing.get_context("fork").Process(target=converting, args=(argv,))
    process.start()
    return process


def test_twins_at_the_same_time_one_of_them_killed(photos, whole, tmp_path):
    out = tmp_path / "out"
    twins = [begun(run(photos, out)) for _ in range(3)]
    while len(list(out.glob("*.tar"))) < 4:
        time.sleep(0.002)
    twins[1].kill()
    for twin in twins:
        twin.join(120)
    assert [twin.exitcode for twin in twins] == [0, -signal.SIGKILL, 0]
    assert main(run(photos, out)) == 0  # what the killed one left goes
    assert contents(out) == whole


def test_two_seeds_into_one_folder_are_not_mixed(photos, tmp_path, capfd):
    out = tmp_path / "out"
    tasks = [begun(run(photos, out, "--task", f"{seed}/2", "--seed", str(seed))) for seed in (0, 1)]
    for task in tasks:
        task.join(120)
    assert sorted(task.exitcode for task in tasks) == [0, 1]
    (told,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "is a conversion with other settings: --seed" in told
    seed = [task.exitcode for task in tasks].index(0)
    assert main(run(photos, out, "--seed", str(seed))) == 0
    assert main(run(photos, tmp_path / "alone", "--seed", str(seed))) == 0
    assert contents(out) == contents(tmp_path / "alone")


def test_a_disk_that_shows_new_files_late_delays_the_manifest_and_loses_nothing(photos, whole, tmp_path, monkeypatch):
    out, real, hidden = tmp_path / "out", record.read_record, {}

    def late(folder, file):
        hidden.setdefault(file, time.monotonic() + 0.5)
        return real(folder, file) if time.monotonic() > hidden[file] else None

    for task in ("0/2", "1/2"):
        monkeypatch.setattr(finish.record, "read_record", lambda *_: None)
        assert main(run(photos, out, "--task", task)) == 0
        assert not (out / "manifest.json").exists()
    monkeypatch.setattr(finish.record, "read_record", late)
    monkeypatch.setattr(finish, "LOOK", 0.1)
    assert main(run(photos, out, "--finish")) == 0
    assert contents(out) == whole
    # and where the records are gone already, but not yet the manifest to be seen
    assert main(run(photos, out, "--finish")) == 0


def test_who_comes_while_another_scans_waits_and_who_is_silent_is_given_up(
    photos, whole, tmp_path, capsys, monkeypatch
):
    out, place = tmp_path / "out", tmp_path / "out" / "conversion" / "scanning"
    place.parent.mkdir(parents=True)
    place.write_text("x.elsewhere.0123abcd.7.0123abcd.tmp")  # on another machine, where nobody can look
    monkeypatch.setattr(scan, "SILENT", 1.0)
    monkeypatch.setattr(scan, "LOOK", 0.05)
    assert main(run(photos, out)) == 0
    assert "waiting for elsewhere, which scans the source" in capsys.readouterr().err
    assert contents(out) == whole
    shutil.rmtree(out)
    monkeypatch.setattr(scan, "SILENT", 1e9)
    dead = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    dead.start()
    dead.join()
    place.parent.mkdir(parents=True)
    name = temporary_of(place).name.split(".")
    place.write_text(".".join([*name[:-3], str(dead.pid), *name[-2:]]))  # ended, on this machine
    assert main(run(photos, out)) == 0
    assert contents(out) == whole


def test_another_source_or_other_codecs_are_refused(photos, tmp_path, capsys, monkeypatch):
    moved, changed = (shutil.copytree(photos, tmp_path / name / photos.name) for name in ("moved", "changed"))
    (changed / "ant" / "7.png").write_bytes(png(7) + b" ")
    for extra in ([], ["--resize", "4", "--format", "png"]):
        out = tmp_path / f"out{len(extra)}"
        assert main(run(photos, out, "--task", "0/3", *extra)) == 0
        assert main(run(moved, out, "--task", "1/3", *extra)) == 0  # mounted elsewhere
        assert main(run(changed, out, "--task", "2/3", *extra)) == 1
        assert "is a conversion of other images" in capsys.readouterr().err
        next((out / "conversion").glob("*-items.bin")).unlink()  # found again, and the same
        monkeypatch.setattr(record.PIL, "__version__", "1.0")
        assert main(run(photos, out, "--task", "2/3", *extra)) == (1 if extra else 0)
        told = capsys.readouterr().err
        assert ("images encoded by other versions: pillow" in told) == bool(extra)
        monkeypatch.undo()


def test_shares():
    work = list(range(10))
    assert sorted(piece for task in range(3) for piece in Share(task, 3).of(work)) == work

    def array(task, first, last, count):
        names = dict(zip(("ID", "MIN", "MAX", "COUNT"), (task, first, last, count), strict=True))
        return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}

    assert share("0/1") == Share(0, 1)
    assert share("15/16") == Share(15, 16)
    assert share("auto", array(3, 0, 15, 16)) == Share(3, 16)
    for environment in ({}, array(3, 3, 7, 2), array(1, 1, 4, 4), array(2, 0, 4, 3), array("x", 0, 4, 5)):
        with pytest.raises(argparse.ArgumentTypeError, match="auto"):
            share("auto", environment)
    for wrong in ("", "1", "2/2", "-1/2", "1/0", "a/b", "1/2/3", "²/3", "1/9999999"):
        with pytest.raises(argparse.ArgumentTypeError):
            share(wrong)


def test_columns_give_back_what_was_put_in():
    made = [Item("ä", "x/ü.png", 3), Item("", "y\udcff", 2**40), Item("ä", "", 0), Item("b", "x/ü.png", 9)]
    items = Items.of(made)
    assert list(items) == [items[i] for i in range(4)] == made
    assert (items[-1], items[1:3]) == (made[-1], made[1:3])
    assert items.counts() == {"ä": 2, "": 1, "b": 1}
    assert items.twice() == [0, 3]
    assert items.not_utf8() == 1
    assert items.of_classes(["b", "none"]).tolist() == [3]
    with pytest.raises(IndexError):
        items[4]
    assert Items.of([]).twice() == list(Items.of([])) == []


def test_temporary_files(tmp_path):
    path = tmp_path / ("x" * 200)
    ours, other = temporary_of(path), temporary_of(path)
    assert ours != other
    assert len(ours.name.encode()) <= 255
    writer = writer_of(ours.name)
    assert (writer.file, writer.process) == (path.name, os.getpid())
    assert not writer.is_dead()
    for name in (
        ours.name,
        "somebodys.tmp",
        "train.tar.elsewhere.0123abcd.7.0123abcd.tmp",
        "old.h.0123abcd.7.0123abcd.tmp",
    ):
        (tmp_path / name).touch()
    os.utime(tmp_path / "old.h.0123abcd.7.0123abcd.tmp", (1, 1))
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 3
    assert write_once(tmp_path / "once", b"first")
    assert not write_once(tmp_path / "once", b"second")
    assert (tmp_path / "once").read_bytes() == b"first"
    assert len(os.listdir(tmp_path)) == 4


def test_a_second_task_that_scanned_and_found_other_images_harms_nothing(photos, whole, tmp_path, monkeypatch, capsys):
    """Two scan at once where a network disk shows late who is about to; meanwhile an image is added."""
    source, out = shutil.copytree(photos, tmp_path / photos.name), tmp_path / "out"
    claim = record.claim

    def after_another(*of):
        monkeypatch.setattr(record, "claim", claim)
        assert main(run(source, out, "--task", "0/2")) == 0
        return claim(*of)

    shutil.copy(source / "ant" / "0.png", source / "ant" / "more.png")
    built = convert._built

    def then_removed(job):
        found = built(job)
        (source / "ant" / "more.png").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(convert, "_built", then_removed)
    monkeypatch.setattr(convert, "turn_to_scan", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(record, "claim", after_another)
    assert main(run(source, out, "--task", "1/2")) == 1
    assert "is a conversion of other images" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(convert, "_built", lambda job: pytest.fail("the source is listed again"))
    assert main(run(source, out, "--task", "1/2")) == 0
    found = contents(out)
    assert {**found, "conversion.json": b""} == {**whole, "conversion.json": b""}  # which names the folder


def test_what_one_task_finds_wrong_with_the_source_the_waiting_ones_are_told(tmp_path):
    told = []

    def take_turn(fails_with=""):
        try:
            with scan.turn_to_scan(tmp_path, lambda: False, alone=False):
                told.append("scans")
                if fails_with:
                    time.sleep(6 * scan.LOOK)
                    raise SourceError(fails_with)
        except SourceError as error:
            told.append(str(error))

    tasks = [threading.Thread(target=take_turn, args=("x.png has 2 GB",)) for _ in range(3)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(60)
    assert told == ["scans", *["x.png has 2 GB"] * 3]
    take_turn()  # a later try looks for itself
    assert told[-1] == "scans"
    assert not (tmp_path / "conversion" / "scanning").exists()


def test_a_scan_that_ends_otherwise_is_begun_by_another_task(photos, whole, tmp_path, monkeypatch):
    built, out, failed = convert._built, tmp_path / "out", []

    def once_it_fails(job):
        if not failed:
            failed.append(True)
            time.sleep(3 * scan.LOOK)
            raise OSError(errno.EIO, os.strerror(errno.EIO), "photos")
        return built(job)

    monkeypatch.setattr(convert, "_built", once_it_fails)
    codes = []
    tasks = [
        threading.Thread(target=lambda n=n: codes.append(main(run(photos, out, "--task", f"{n}/2")))) for n in (0, 1)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(60)
    assert sorted(codes) == [0, 1]
    assert main(run(photos, out)) == 0
    assert contents(out) == whole


def test_a_url_is_no_folder_to_write_to(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in (run(photos, "s3://bucket/photos"), run("s3://bucket/photos", "out"), ["verify", "s3://bucket/photos"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        assert "s3://bucket/photos is a URL: name a folder on a disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_more_shards_than_a_manifest_holds_are_refused_before_the_first(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sptnet_shards.conversion.plan.MOST_SHARDS", 20)
    assert main(run(photos, tmp_path / "out")) == 1
    assert "32 shards are more than the 20 of a dataset: say --shard-mb 4" in capsys.readouterr().err


def test_images_that_are_kept_as_png_have_the_versions_of_their_encoder(photos, tmp_path, monkeypatch, capsys):
    source, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "out"
    Image.open(source / "ant" / "0.png").save(source / "ant" / "0.bmp")
    assert main(run(source, out, "--task", "0/2")) == 0
    monkeypatch.setattr(record.PIL, "__version__", "1.0")
    assert main(run(source, out, "--task", "1/2")) == 1
    assert "images encoded by other versions: pillow" in capsys.readouterr().err
