"""Tars that are there already, indexed by several tasks; img2dataset's, and those behind a URL."""

import json
import os
import re
import shutil

import pytest
from launching import contents
from sptnet_shards import commands
from sptnet_shards.conversion import finish
from sptnet_shards.make_shards import main
from sptnet_shards.tars import index, places
from test_same_bytes import png
from test_tools import write_tar

from sptnet.data.format.manifest import KINDS, read_manifest
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import open_store


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    root = tmp_path_factory.mktemp("tars") / "tars"
    root.mkdir()
    for number in range(7):
        name = f"test-{number}.tar" if number == 6 else f"train-{number}.tar"
        files = []
        for i in range(9):
            files += [(f"{i}.png", png(9 * number + i)), (f"{i}.cls", str((number + i) % 4).encode())]
        write_tar(root / name, files)
    return root


@pytest.fixture(scope="module")
def whole(tars, tmp_path_factory):
    root = shutil.copytree(tars, tmp_path_factory.mktemp("whole") / "tars")
    assert main(["index", str(root), "--old", "2"]) == 0
    return contents(root)


def test_tasks_index_as_one_does(tars, whole, tmp_path, capsys, monkeypatch):
    root = shutil.copytree(tars, tmp_path / "tars")
    run, walked, real = ["index", str(root), "--old", "2"], [], places.LocalPlace.tar
    monkeypatch.setattr(places.LocalPlace, "tar", lambda place, name: walked.append(name) or real(place, name))
    monkeypatch.setattr(commands, "LATE", 0.0)
    assert main([*run, "--finish"]) == 1
    assert "run the same command without --finish first" in capsys.readouterr().err
    for task in ("1/3", "0/3", "1/3"):
        assert main([*run, "--task", task]) == 0
    assert "5 of 7 shards are there" in capsys.readouterr().out
    assert main(["show", str(root)]) == 0
    assert re.search(r"tars\W+5\W+7\b", capsys.readouterr().out)
    assert main([*run, "--finish"]) == 1
    assert "lacks 2 of 7 shards, train-2.tar, train-5.tar" in capsys.readouterr().err
    assert main(["index", str(root), "--old", "2", "--seed", "1", "--task", "2/3"]) == 1
    assert "is indexed with other settings: --seed 0 there, 1 here" in capsys.readouterr().err
    assert main([*run, "--task", "2/3"]) == 0
    assert contents(root) == whole
    assert sorted(walked) == sorted(name for name in whole if name.endswith(".tar"))  # each once
    for late in (["--task", "0/3"], ["--finish"], []):
        assert main([*run, *late]) == 0
    assert len(walked) == 7


def test_lists_that_come_late(tars, whole, tmp_path, monkeypatch):
    root, hidden, real = shutil.copytree(tars, tmp_path / "tars"), set(), places.LocalPlace.read

    def late(place, name, most):
        if name.endswith(".members") and name not in hidden:
            return hidden.add(name)
        return real(place, name, most)

    assert main(["index", str(root), "--old", "2", "--task", "0/2"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(places.LocalPlace, "read", lambda *of: None if of[1].endswith("members") else real(*of))
        assert main(["index", str(root), "--old", "2", "--task", "1/2"]) == 0
    monkeypatch.setattr(places.LocalPlace, "read", late)
    monkeypatch.setattr(finish, "LOOK", 0.1)
    assert main(["index", str(root), "--old", "2", "--finish"]) == 0
    assert contents(root) == whole


def of_img2dataset(root, labels):
    """The layout that img2dataset 1.47 writes: numbered tars; parquet and stats beside them."""
    for number, told in enumerate(labels):
        files = []
        for i, label in enumerate(told):
            key = f"{number:05d}{i:04d}"
            facts = {"url": f"http://x/{i}.jpg", "key": key, "status": "success", "error_message": None, "width": 5,
                     "height": 5, "exif": "{}", "sha256": "0" * 64}  # fmt: skip
            facts |= {} if label == "no key" else {"label": label}
            files += [(f"{key}.jpg", png(50 * number + i)), (f"{key}.json", json.dumps(facts, indent=4).encode()),
                      (f"{key}.txt", b"a caption")]  # fmt: skip
        write_tar(root / f"{number:05d}.tar", files)
        (root / f"{number:05d}.parquet").write_bytes(b"PAR1")
        (root / f"{number:05d}_stats.json").write_text("{}")
    return root


def test_tars_of_img2dataset_are_taken_as_they_are(tmp_path, capsys):
    root = of_img2dataset(tmp_path, [["ant", "bee", None, "no key"], ["no key"] * 5, ["", "ant"]])
    assert main(["index", str(root), "--old", "1"]) == 1
    assert "has images without labels: all its classes are old, leave --old out" in capsys.readouterr().err
    for task in ("0/2", "1/2"):
        assert main(["index", str(root), "--task", task]) == 0
    manifest = read_manifest(root)
    assert [manifest.samples(kind) for kind in KINDS] == [3, 8, 0]
    assert (manifest.classes, manifest.unknown) == (["ant", "bee"], True)
    assert main(["verify", str(root), "--decode"]) == 0


def test_labels_everywhere_or_nowhere_in_tars_of_img2dataset(tmp_path, capsys):
    root = of_img2dataset(tmp_path, [[3, 1, 10], [1, 3, 10]])
    assert main(["index", str(root), "--old", "2"]) == 0
    assert read_manifest(root).classes == ["1", "3", "10"]
    for path in root.iterdir():
        path.unlink()
    of_img2dataset(tmp_path, [["no key"] * 3, ["no key"] * 3])
    before = sorted(os.listdir(root))
    assert main(["index", str(root)]) == 1
    assert "nor does any other .json (no key 'label'); is --json-key right?" in capsys.readouterr().err
    assert sorted(set(os.listdir(root)) - {"conversion"}) == before


def test_what_was_read_of_tars_stays_where_the_end_finds_something_wrong(tars, whole, tmp_path, capsys, monkeypatch):
    root = shutil.copytree(tars, tmp_path / "tars")
    walked, real = [], places.LocalPlace.tar
    monkeypatch.setattr(places.LocalPlace, "tar", lambda place, name: walked.append(name) or real(place, name))
    assert main(["index", str(root)]) == 1
    assert "has labels in all its tars: say by --old which are old" in capsys.readouterr().err
    assert len(walked) == 7
    os.utime(root / "train-1.tar", ns=(1, 1))  # written again since, of the same size
    assert main(["index", str(root), "--old", "2"]) == 0
    assert walked[7:] == ["train-1.tar"]
    assert contents(root) == whole


def test_a_task_whose_lists_another_has_cleaned_up_takes_its_manifest(tars, whole, tmp_path, monkeypatch):
    root = shutil.copytree(tars, tmp_path / "tars")
    write, quick = index._write, []

    def slow(*of):
        if not quick:
            quick.append(True)
            assert main(["index", str(root), "--old", "2"]) == 0  # and it removes the lists
        return write(*of)

    monkeypatch.setattr(index, "_write", slow)
    assert main(["index", str(root), "--old", "2"]) == 0
    assert contents(root) == whole


def test_tars_without_images_are_not_the_same_tar(tars, tmp_path, capsys):
    root = shutil.copytree(tars, tmp_path / "tars")
    for number in (8, 9):
        write_tar(root / f"train-{number}.tar", [("0.txt", b"a caption whose image was not there")])
    assert main(["index", str(root), "--old", "2"]) == 0
    assert "has no image" in capsys.readouterr().err


def test_a_task_that_finds_others_missing_reads_no_list(tars, tmp_path, monkeypatch):
    root = shutil.copytree(tars, tmp_path / "tars")
    read, real = [], index._summary
    monkeypatch.setattr(index, "_summary", lambda *of: read.append(of) or real(*of))
    assert main(["index", str(root), "--old", "2", "--task", "0/3"]) == 0
    assert read == []


def test_tars_behind_a_url(tars, whole, tmp_path, monkeypatch, capsys):
    """A real server of S3's protocol; a tar is fetched once, in order, and what is written goes beside it."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1"),
                            ("ENDPOINT_URL", f"http://{host}:{port}")):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        S3FileSystem.clear_instance_cache()
        files = S3FileSystem()
        files.mkdir("bucket")
        for path in tars.iterdir():
            files.put_file(str(path), f"bucket/tars/{path.name}")
        run = ["index", "s3://bucket/tars", "--old", "2"]
        assert main([*run, "--task", "0/2"]) == 0
        assert main(["index", "s3://bucket/tars", "--old", "1", "--task", "1/2"]) == 1
        assert "is indexed with other settings: --old 2 there, 1 here" in capsys.readouterr().err
        assert main([*run, "--task", "1/2"]) == 0
        assert main([*run, "--finish"]) == 0
        files.invalidate_cache()
        found = {name.rpartition("/")[2]: files.cat_file(name) for name in files.find("bucket/tars")}
        assert found == whole
        store = open_store(
            "s3://bucket/tars", cache=str(tmp_path / "cache"), cache_gb=1, attempts=1, timeout_s=20, options={}
        )
        reader = ShardReader(store, store.manifest.of_kind("test"))
        assert reader.read(0, 3).image == png(9 * 6 + 3)
        assert main(["index", "s3://nowhere/tars", "--old", "2"]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


def test_lists_of_other_labels_or_of_another_tar_are_made_again(tmp_path, capsys):
    """As the message says: manifest.json and conversion.json removed, and asked otherwise."""
    root = tmp_path / "tars"
    root.mkdir()
    for number in range(2):
        files = [(f"{i}.png", png(9 * number + i)) for i in range(4)]
        files += [(f"{i}.json", json.dumps({"class": f"c{i % 2}"}).encode()) for i in range(4)]
        write_tar(root / f"train-{number}.tar", files)
    for task in ("0/2", "1/2"):
        code = main(["index", str(root), "--old", "1", "--json-key", "label", "--task", task])
    assert code == 1
    assert "is --json-key right?" in capsys.readouterr().err
    (root / "conversion.json").unlink()
    for task in ("0/2", "1/2"):
        code = main(["index", str(root), "--old", "1", "--json-key", "class", "--task", task])
    assert code == 0
    assert read_manifest(root).classes == ["c0", "c1"]
