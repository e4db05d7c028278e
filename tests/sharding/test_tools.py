"""verify, show and index, also on tars that were made to harm."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sptnet_shards.make_shards import main
from sptnet_shards.source import SourceError
from sptnet_shards.sources import imagenet
from sptnet_shards.tars.places import _state_of

from sptnet.data.format.manifest import KINDS, read_manifest
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import LocalStore


def png(value=0) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (5, 5), (value, value, value)).save(encoded, "PNG")
    return encoded.getvalue()


def write_tar(path: Path, files, prepare=None):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if prepare:
                prepare(info)
            tar.addfile(info, io.BytesIO(content))


def flip_byte(path: Path, at: int):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_verify_finds_every_kind_of_damage(digits, tmp_path, capsys):
    assert main(["verify", str(digits), "--decode", "--workers", "2"]) == 0
    assert "33 shards are what the manifest says" in capsys.readouterr().out

    root = Path(shutil.copytree(digits, tmp_path / "damaged"))
    store = LocalStore(root)
    image, label, index = store.manifest.of_kind("labelled")[:3]
    uid, _, offset, size = store.entries(image)[4].item()
    flip_byte(root / image.file, offset + size - 30)
    flip_byte(root / label.file, 512)  # the first sample's class
    shutil.copy(root / store.manifest.of_kind("labelled")[5].index, root / index.index)
    assert main(["verify", str(root), "--decode"]) == 1
    told = capsys.readouterr().err
    assert f"{root / image.file}: its sha256 is" in told
    assert f"{root / image.file}: sample {uid} does not decode" in told
    assert f"{root / label.file}: sample {store.entries(label)[0]['uid']} has target" in told
    assert f"{root / index.index} is not the index that the manifest means" in told
    (root / label.file).unlink()
    assert main(["verify", str(root)]) == 1
    assert "is missing" in capsys.readouterr().err


def test_verify_finds_a_uid_in_two_shards(digits, tmp_path, capsys):
    root = Path(shutil.copytree(digits, tmp_path / "doubled"))
    manifest = json.loads((root / "manifest.json").read_text())
    first, second = manifest["shards"][:2]
    twin = {**first, "file": second["file"], "index": second["index"]}
    for field in ("file", "index"):
        shutil.copy(root / first[field], root / second[field])
    manifest["shards"][1] = twin
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(root)]) == 1
    assert "uids are in two shards" in capsys.readouterr().err


def test_verify_by_shares_and_across_them(digits, tmp_path, capsys):
    for task in range(3):
        assert main(["verify", str(digits), "--task", f"{task}/3"]) == 0
    assert "11 of 33 shards are what the manifest says" in capsys.readouterr().out
    assert main(["verify", str(digits), "--finish"]) == 0
    assert "its 33 shards have every image once" in capsys.readouterr().out
    root = Path(shutil.copytree(digits, tmp_path / "damaged"))
    shards = read_manifest(root).shards
    flip_byte(root / shards[4].file, 700)
    assert [main(["verify", str(root), "--task", f"{task}/3"]) for task in range(3)] == [0, 1, 0]
    assert main(["verify", str(root), "--finish"]) == 0
    capsys.readouterr()
    manifest = json.loads((root / "manifest.json").read_text())
    for field in ("file", "index"):
        shutil.copy(root / manifest["shards"][0][field], root / manifest["shards"][1][field])
    told = {key: manifest["shards"][1][key] for key in ("file", "index", "paths", "paths_sha256")}
    manifest["shards"][1] = {**manifest["shards"][0], **told}
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(root), "--finish"]) == 1
    assert "uids are in two shards" in capsys.readouterr().err


def test_show(digits, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["show", str(digits), "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "labelled" in out
    assert "1,072" in out
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[0] % 10 == 0
    rows = np.split(pixels, 10)
    assert all(row.std() > 40 for row in rows)


@pytest.fixture
def others(tmp_path):
    """Tars as other tools write them: cls or json, names with folders, several tars."""
    for number in range(4):
        files = []
        for i in range(10):
            key, label = f"part{number}/{i:03d}", (number + i) % 3
            files.append((f"{key}.png", png(label)))
            if number % 2:
                files.append((f"{key}.json", json.dumps({"label": label, "text": "x"}).encode()))
            else:
                files.append((f"{key}.cls", str(label).encode()))
        write_tar(tmp_path / f"train-{number}.tar", files)
    write_tar(tmp_path / "test-0.tar", [("a.png", png(2)), ("a.cls", b"2"), ("b.png", png(0)), ("b.cls", b"0")])
    return tmp_path


def test_index_makes_others_tars_readable_without_touching_them(others, capsys):
    before = {path.name: path.read_bytes() for path in others.iterdir()}
    assert main(["index", str(others), "--old", "2"]) == 0
    store = LocalStore(others)
    manifest = store.manifest
    assert {name: (others / name).read_bytes() for name in before} == before
    assert (manifest.classes, manifest.num_old) == (["0", "1", "2"], 2)
    assert [manifest.samples(kind) for kind in KINDS] == [13, 27, 2]
    uids = []
    for kind in KINDS:
        reader = ShardReader(store, manifest.of_kind(kind))
        for number, shard in enumerate(reader.shards):
            for position in range(shard.samples):
                sample = reader.read(number, position)
                assert sample.image == png(sample.target)
                if kind != "test":
                    uids.append(sample.uid)
    assert sorted(uids) == list(range(40))
    assert main(["verify", str(others), "--decode"]) == 0
    assert main(["index", str(others), "--old", "2"]) == 0
    assert main(["index", str(others), "--old", "1"]) == 1
    assert "is indexed with other settings: --old 2 there, 1 here; remove" in capsys.readouterr().err
    (others / "conversion.json").unlink()  # as versions before left it
    assert main(["index", str(others), "--old", "2"]) == 1
    assert "has a manifest.json already" in capsys.readouterr().err


def test_index_draws_as_many_labels_as_it_is_told_and_by_the_seed(others, tmp_path_factory):
    drawn = {}
    for name, options in {"plain": (), "more": ("--labelled-fraction", "0.8"), "other": ("--seed", "1")}.items():
        root = shutil.copytree(others, tmp_path_factory.mktemp("index") / name)
        assert main(["index", str(root), "--old", "2", *options]) == 0
        store = LocalStore(root)
        drawn[name] = {int(uid) for s in store.manifest.of_kind("labelled") for uid in store.entries(s)["uid"]}
    assert len(drawn["plain"]) == len(drawn["other"]) == 13
    assert drawn["plain"] != drawn["other"]
    assert len(drawn["more"]) > 18


def test_a_remote_tar_that_was_written_again_at_the_same_size_is_another():
    one, other = ({"size": 1, "ETag": tag} for tag in ("a", "b"))
    assert _state_of(one) == _state_of(dict(one)) != _state_of(other)
    assert _state_of({"size": 1}) == ""


def test_index_says_what_is_wrong(others, capsys):
    def told(*options):
        assert main(["index", str(others), *options]) == 1
        return capsys.readouterr().err

    assert "--old 3 must leave" in told("--old", "3")
    assert "has no nothing*.tar" in told("--old", "2", "--train", "nothing*.tar")
    assert "is --json-key right?" in told("--old", "2", "--json-key", "target")
    write_tar(others / "train-9.tar", [("x.png", png()), ("y.png", png()), ("y.cls", b"0")])
    assert "image 'x' has neither .cls nor .json" in told("--old", "2")
    write_tar(others / "train-9.tar", [("x.png", png()), ("x.cls", b"7")])
    write_tar(others / "test-9.tar", [("y.png", png()), ("y.cls", b"8")])
    assert "has a class in test that is not in train: 8" in told("--old", "2")


def pax_header_of(size: int) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.USTAR_FORMAT)


class Harm:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


HOSTILE = ["traversal", "absolute", "link", "hard link", "device", "fifo", "huge header", "pickle", "code", "gzip"]


def hostile_tar(path: Path, kind: str, mark: Path):
    """A tar of ten sound samples, and one thing that has no place in it."""
    sound = [(f"{i}.{suffix}", png(i) if suffix == "png" else str(i % 3).encode())
             for i in range(10) for suffix in ("png", "cls")]  # fmt: skip
    harm = pickle.dumps(Harm(mark))
    named = {"traversal": f"../{mark.name}", "absolute": str(mark), "pickle": "10.pyd", "code": "__init__.py"}
    if kind in named:
        content = b"import os; os.mkdir(%r)" % str(mark) if kind == "code" else harm
        return write_tar(path, [*sound, (named[kind], content), ("11.pickle", harm)])
    if kind == "huge header":
        write_tar(path, sound)
        path.write_bytes(pax_header_of(2**26) + path.read_bytes())
        return os.truncate(path, 2**27)  # what it claims is there, so that nothing but a limit keeps it out of memory
    if kind == "gzip":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(__file__, "bomb.png")
        return None
    types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
    write_tar(path, sound)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("10.png")
        info.type, info.linkname = types[kind], "/etc/passwd"
        tar.addfile(info)
    return None


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tars_harm_no_reader(kind, digits, tmp_path, capsys):
    root, mark = tmp_path / "root", tmp_path / "mark"
    root.mkdir()
    hostile_tar(root / "train-0.tar", kind, mark)
    indexed = main(["index", str(root), "--old", "1"])
    told = capsys.readouterr().err
    if kind in ("traversal", "absolute", "pickle", "code"):
        # names and contents that nobody asked for are passed over
        assert indexed == 0
        assert sum(read_manifest(root).samples(k) for k in KINDS) == 10
        assert main(["verify", str(root), "--decode"]) == 0
    else:
        assert indexed == 1
        assert "train-0.tar" in told
        assert len(told.splitlines()) == 1
    # the same tar in the place of a shard: the loader finds no image, or another one than was meant
    shutil.copytree(digits, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    shard = manifest["shards"][0]
    shutil.copy(root / "train-0.tar", tmp_path / "copy" / shard["file"])
    shard["bytes"] = (root / "train-0.tar").stat().st_size
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(tmp_path / "copy")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    # and in the place of ImageNet's tar of tars
    (tmp_path / "imagenet").mkdir()
    shutil.copy(root / "train-0.tar", tmp_path / "imagenet" / imagenet.TRAIN_TAR)
    with pytest.raises(SourceError):
        imagenet.source("imagenet1k", tmp_path / "imagenet")
    assert not mark.exists()
    assert not (tmp_path / "passwd").exists()


def test_a_hostile_index_is_not_unpickled(digits, tmp_path):
    root, mark = Path(shutil.copytree(digits, tmp_path / "copy")), tmp_path / "mark"
    shard = read_manifest(root).shards[0]
    np.save(root / shard.index, np.array([Harm(mark)], object), allow_pickle=True)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = hashlib.sha256((root / shard.index).read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    store = LocalStore(root)
    with pytest.raises(ValueError, match=r"idx\.npy cannot be read .*allow_pickle"):
        store.entries(store.manifest.shards[0])
    assert not mark.exists()
