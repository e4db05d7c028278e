"""Datasets that are damaged, mistaken or made to harm: refused with one line, or said to be odd."""

import multiprocessing
import os
import pickle
import signal
import sys
import time

import numpy as np
import pytest
from made import accepted, encoded, photos, put, refused
from scipy.io import savemat
from sptnet_shards import cifar, published, workers
from sptnet_shards.items import Item
from sptnet_shards.make_shards import main
from sptnet_shards.source import Source, SourceError

from sptnet.data.files import LARGEST_IMAGE
from sptnet.data.manifest import read_manifest

FOLDER = {
    "FIFO": lambda path: os.mkfifo(path), "device": lambda path: path.symlink_to("/dev/zero"),
    "broken link": lambda path: path.symlink_to("nowhere"), "link in a circle": lambda path: path.symlink_to(path.name),
    "folder": lambda path: (path.with_name("d").mkdir(), path.with_name("d.jpg").symlink_to("d")),
    "link to a folder": lambda path: path.with_name("d").symlink_to(".."), "text": lambda path: path.write_text("x"),
    "too large": lambda path: (path.touch(), os.truncate(path, LARGEST_IMAGE + 1)),
    "not UTF-8": lambda path: os.rename(put(path, encoded()), os.fsencode(path.parent) + b"/\xff.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDER)
def test_a_file_among_images_that_is_none(kind, tmp_path, capsys):
    root = photos(tmp_path / "photos")
    FOLDER[kind](root / "bee" / "x.jpg")
    assert "bee" in refused(capsys, "imagefolder", root, tmp_path / "out", "--old", "1")
    assert not (tmp_path / "out" / "manifest.json").exists()


NAMES = ["ant ", " ant", "a\nb", "a\x1b[2J", "[red]a", "a\u202eb", "\u00e9 and e\u0301"]


@pytest.mark.parametrize("name", NAMES)
def test_class_names_that_cannot_be_told_apart_or_shown(name, tmp_path, capsys):
    root = photos(tmp_path / "photos", ("ant", "bee", *name.split(" and ")))
    assert "rename" in refused(capsys, "imagefolder", root, tmp_path / "out", "--old", "1")


@pytest.mark.parametrize("names", [("training", "testing"), ("validation", "ant"), ("Train", "Test"), ("ant", "val")])
def test_parts_that_are_taken_for_classes(names, tmp_path, capsys):
    assert "train and test" in refused(
        capsys, "imagefolder", photos(tmp_path / "p", names), tmp_path / "o", "--old", "1"
    )


def test_what_is_odd_is_said(tmp_path, capsys):
    root = tmp_path / "photos"
    photos(root / "train", ("ant", "bee", "Bee"))
    photos(root / "test", ("ant", "bee", "Bee"), 1)
    photos(root / "val", ("ant",))
    put(root / "train" / "loose.jpg", encoded())
    for name in ("a.heic", "b.HEIC", "c.avif", "IMG_1", "Thumbs.db", ".hidden"):
        put(root / "train" / "bee" / name, b"x")
    put(root / "train" / "bee" / "copy.jpg", (root / "train" / "ant" / "2.jpg").read_bytes())
    told = accepted(capsys, "imagefolder", root, tmp_path / "out", "--old", "1")
    for part in (
        "outside of class folders",
        "val is left out with its 4 images",
        "left out for their suffix: 1 without one, 1 .avif, 2 .heic",
        "'Bee' and 'bee' differ",
        "in training and in test",
        "in two classes",
    ):
        assert part in told


def test_another_folder_for_testing(tmp_path, capsys):
    root = tmp_path / "photos"
    photos(root / "train")
    photos(root / "validation", each=2)
    run = ["imagefolder", root, tmp_path / "out", "--old", "1", "--test"]
    for wrong in ("test", "train", "..", "validation/ant", ""):
        assert "must be a folder beside" in refused(capsys, *run, wrong)
    accepted(capsys, *run, "validation")
    assert read_manifest(tmp_path / "out").samples("test") == 6


@pytest.mark.parametrize("out", ["", "ant/shards", "shards"])
def test_shards_among_the_images(out, tmp_path, capsys):
    """Run again, the same command would take them for a class."""
    root = photos(tmp_path / "photos")
    told = refused(capsys, "imagefolder", root, root / out, "--old", "1")
    assert ("is not empty" if out == "" else "choose a folder outside") in told
    photos(root / "train")
    told = refused(capsys, "imagefolder", root, root / "train" / out, "--old", "1")
    assert ("is not empty" if out == "" else "choose a folder outside") in told
    accepted(capsys, "imagefolder", root, root / "made", "--old", "1")


def test_suffixes_are_those_of_formats_that_are_read():
    from PIL import Image
    from sptnet_shards.source import IMAGE_SUFFIXES

    from sptnet.data.image import FORMATS

    assert {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES} == set(FORMATS)


@pytest.mark.parametrize("bad", [("ant",), ("bee", "cat"), ("ant", "bee", "cat")])
def test_a_part_of_which_every_image_is_bad(bad, tmp_path, capsys):
    root = photos(tmp_path / "photos")
    for path in root.glob("*/*.jpg"):
        if path.parent.name in bad:
            path.write_bytes(b"no image")
    run = ["imagefolder", root, tmp_path / "out", "--old", "1", "--on-error", "skip", "--labelled-fraction", "1"]
    assert "labelled image: all of them are bad" in refused(capsys, *run)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_name_is_none(tmp_path, capsys):
    root = photos(tmp_path / "photos")
    assert "give another one with --name" in refused(
        capsys, "imagefolder", root, tmp_path / "out", "--old", "1", "--name", ""
    )


CSV = {
    "empty": "",
    "header only": "image,class\n",
    "no column": "image\na.jpg\n",
    "NUL in a path": "image,class\na\0.jpg,ant\n",
    "column twice": "image,image,class\na.jpg,a.jpg,ant\n",
    "too many": "image,class\na.jpg,ant,x\n",
    "too few": "image,class\na.jpg\n",
    "quote left open": 'image,class\n"a.jpg,ant\n',
    "outside": "image,class\n../a.jpg,ant\n",
    "absolute": "image,class\n/etc/passwd,ant\n",
    "listed twice": "image,class\na.jpg,ant\na.jpg,bee\n",
    "twice by a dot": "image,class\na.jpg,ant\n./a.jpg,bee\nb.jpg,bee\n",
    "twice by a slash": "image,class\nd/c.jpg,ant\nd//c.jpg,ant\na.jpg,bee\nb.jpg,bee\n",
    "link outside": "image,class\nlink.jpg,ant\n",
    "folder link": "image,class\nout/x.jpg,ant\n",
    "folder": "image,class\n.,ant\n",
    "split": "image,class,split\na.jpg,ant,val\n",
    "class with space": "image,class\na.jpg,ant\nb.jpg,ant \n",
    "not UTF-8": b"image,class\n\xff.jpg,ant\n",
    "binary": bytes(range(256)),
    "huge field": "image,class\n" + "x" * 200_000 + ",a\n",
    "one class": "image,class\na.jpg,ant\n",
    "missing": "image,class\nz.jpg,ant\n",
    "UTF-16": "image,class\n".encode("utf-16"),
}


@pytest.mark.parametrize("kind", CSV)
def test_lists(kind, tmp_path, capsys):
    put(tmp_path / "outside" / "x.jpg", encoded())
    root = tmp_path / "data"
    for name in ("a", "b", "d/c"):
        put(root / f"{name}.jpg", encoded(value=ord(name[-1])))
    (root / "link.jpg").symlink_to("../outside/x.jpg")
    (root / "out").symlink_to("../outside")
    refused(capsys, "csv", put(root / "list.csv", CSV[kind]), tmp_path / "shards", "--old", "1")


def cub(root, **files):
    """A small CUB of published layout; `files` replaces a list's content."""
    lines = [(i + 1, f"{i + 1:03d}.Bird/{i}.jpg", i + 1, i % 2) for i in range(200)]
    for _, path, _, _ in lines:
        put(root / "images" / path, encoded())
    for name, column in (("images", 1), ("image_class_labels", 2), ("train_test_split", 3)):
        put(root / f"{name}.txt", files.get(name) or "".join(f"{line[0]} {line[column]}\n" for line in lines))
    return root


LISTS = {
    "outside": ("images", "1 ../../x.jpg"),
    "absolute": ("images", "1 /etc/passwd"),
    "label": ("image_class_labels", "1 ²"),
    "label 0": ("image_class_labels", "1 0"),
    "label 201": ("image_class_labels", "1 201"),
    "part": ("train_test_split", "1 2"),
    "one column": ("train_test_split", "1"),
    "negative": ("image_class_labels", "1 -1"),
    "huge": ("image_class_labels", "1 " + "9" * 5000),
    "another image": ("images", "9999 001.Bird/0.jpg"),
    "twice": ("images", "2 001.Bird/0.jpg"),
    "text": ("image_class_labels", "1 one"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_cub(kind, tmp_path, capsys):
    file, line = LISTS[kind]
    root = cub(tmp_path / "cub")
    lines = (root / f"{file}.txt").read_text().splitlines()
    (root / f"{file}.txt").write_text("\n".join([line, *lines[1:]]) + "\n")
    refused(capsys, "cub", root, tmp_path / "out", "--unofficial")


def test_what_is_not_the_published_dataset_must_be_forced_by_name(tmp_path, capsys):
    root = cub(tmp_path / "cub")
    assert "published are 5,994: complete the source, or" in refused(capsys, "cub", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = ["cub", str(root), str(tmp_path / "out")]
    assert main([*run, "--unofficial"]) == 0
    assert read_manifest(tmp_path / "out").protocol["unofficial"] is True


@pytest.mark.parametrize("name", published.PARTS)
def test_one_image_too_few_or_in_another_class(name):
    train, test = published.PARTS[name]

    def counts(part, classes):
        found = dict.fromkeys(map(str, range(classes)), part.images // classes)
        for i in range(part.images % classes):
            found[str(i)] += 1
        return found

    classes = {"cifar10": 10, "cifar100": 100, "cub": 200, "scars": 196, "aircraft": 100, "herbarium_19": 683}.get(
        name, 1000
    )
    whole = counts(train, classes), counts(test, classes)
    source = Source(name, ["a", "b"], 1, [], [], lambda where: b"", whole=whole)
    published.check_published(source)
    for part in (0, 1):
        whole[part]["0"] -= 1
        with pytest.raises(SourceError, match="published are"):
            published.check_published(source)
        whole[part]["0"] += 1
        if (train, test)[part].least == (train, test)[part].most:
            whole[part]["0"], whole[part]["1"] = whole[part]["0"] - 1, whole[part]["1"] + 1
            with pytest.raises(SourceError, match="published are"):
                published.check_published(source)
            whole[part]["0"], whole[part]["1"] = whole[part]["0"] + 1, whole[part]["1"] - 1


def scars(root, first=1, annotations=None):
    names = np.array([f"car {i}" for i in range(196)], object)
    rows = [(i + first, f"{i:05d}.jpg") for i in range(196)]
    table = np.array(rows, [("class", object), ("fname", object)]) if annotations is None else annotations
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for file in ("cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        savemat(root / "devkit" / file, {"annotations": table})
    for i in range(196):
        for part in ("cars_train", "cars_test"):
            put(root / part / f"{i:05d}.jpg", encoded(value=i))
    return root


def test_labels_of_cars_that_count_from_0(tmp_path, capsys):
    told = refused(capsys, "scars", scars(tmp_path / "cars", first=0), tmp_path / "out", "--unofficial")
    assert "says '0' where a number from 1 to 196 belongs" in told


def nested_mat(depth):
    """A MATLAB file of cells in cells: each level is a matrix element with the next inside, compressed."""
    import struct
    import zlib

    def element(kind, content):
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    inner = b""
    head = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, b"annotations")
    for _ in range(depth):
        inner = struct.pack("<II", 14, len(head) + len(inner)) + head + inner
    return (
        b"MATLAB 5.0 MAT-file".ljust(124)
        + b"\x00\x01IM"
        + element(15, zlib.compress(inner))[: 8 + len(zlib.compress(inner))]
    )


@pytest.mark.parametrize("row", [(1.5, "00000.jpg"), (-1, "00000.jpg"), (1, "../x.jpg"), (1, 7), (np.nan, "00000.jpg")])
def test_annotations_of_one_row(row, tmp_path, capsys):
    """Which scipy makes a scalar of."""
    one = np.array([row], [("class", object), ("fname", object)])
    refused(capsys, "scars", scars(tmp_path / "cars", annotations=one), tmp_path / "out", "--unofficial")


@pytest.mark.parametrize("kind", ["deep", "cut", "text", "empty", "huge"])
def test_mat_files_that_crash_their_reader(kind, tmp_path, capsys):
    root = scars(tmp_path / "cars")
    path = root / "devkit" / "cars_train_annos.mat"
    whole = path.read_bytes()
    content = {
        "deep": nested_mat(20_000),
        "cut": whole[: len(whole) // 2],
        "text": b"x" * 500,
        "empty": b"",
        "huge": bytes(2**24 + 1),
    }
    put(path, content[kind])
    assert "cars_train_annos.mat" in refused(capsys, "scars", root, tmp_path / "out", "--unofficial")


GLOBAL = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
PICKLES = {
    "object dtype": pickle.dumps({"data": np.array([{}, 1], object), "labels": [0]}, 2),
    "float dtype": pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, 2), "runs": b"cos\nsystem\n(S'touch harm'\ntR.",
    "shape": pickle.dumps({"data": np.zeros((1, 99), np.uint8), "labels": [0]}, 2), "text": b"x", "empty": b"", "list": b"]q\x00.",
    "labels": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["0"]}, 2), "cut": GLOBAL,
    "label 10": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, 2), "no data": pickle.dumps({"labels": [0]}, 2),
    "state": GLOBAL + b"(K\x01K\x02tb.", "memo": b"\x80\x02" + b"r\xff\xff\xff\x7f" + b".", "bytearray": b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.",
    "builtins": b"cbuiltins\neval\n(S'1'\ntR.", "numpy.load": b"cnumpy\nload\n(S'/etc/passwd'\ntR.",
    "forged dtype": b"\x80\x02}U\x04datacnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftbs.",
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(kind, tmp_path, capsys):
    folder = tmp_path / cifar.FOLDERS["cifar10"]
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
    for file in (*cifar.TRAIN["cifar10"], cifar.TEST["cifar10"]):
        put(folder / file, pickle.dumps(batch, 2))
    put(folder / "batches.meta", pickle.dumps({"label_names": list("abcdefghij")}))
    assert "md5 is not the published one" in refused(capsys, "cifar10", tmp_path, tmp_path / "out")
    assert len(cifar.source("cifar10", tmp_path, unofficial=True).train) == 50
    put(folder / "data_batch_3", PICKLES[kind])
    told = refused(capsys, "cifar10", tmp_path, tmp_path / "out", "--unofficial")
    assert "data_batch_3" in told
    assert not os.path.exists("harm")


def test_arrays_are_those_that_numpy_would_build(tmp_path):
    from sptnet_shards.arrays import unpickled

    for protocol in (2, 3, 4, 5):
        for array in (
            np.arange(6, dtype=np.uint8).reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        ):
            assert np.array_equal(unpickled(pickle.dumps({"data": array}, protocol))["data"].array(), array)
    # as Python 2 wrote them: bytes as text
    text = GLOBAL + (b"(K\x01K\x02K\x02\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
                     b"K\x00tb\x89U\x04\x00\x7f\x80\xfftb.")  # fmt: skip
    made = unpickled(b"\x80\x02}U\x04data" + text[2:-1] + b"s.")["data"].array()
    assert made.tolist() == [[0, 127], [128, 255]]


@pytest.mark.parametrize("option", [("--seed", "-1"), ("--seed", "4294967296"), ("--seed", "²"), ("--workers", "²"),
                                    ("--resize", "99999"), ("--shard-mb", "0"), ("--labelled-fraction", "nan")])  # fmt: skip
def test_options(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["digits", str(tmp_path / "out"), *option])
    assert len([line for line in capsys.readouterr().err.splitlines() if "error: " in line]) == 1


@pytest.mark.parametrize("argv", [["imagefolder", "a\0b", "out", "--old", "1"], ["show", "a\0b"], ["verify", "/dev/null"],
                                  ["show", "/dev/null"], ["index", "/nowhere", "--old", "1"], ["digits", "/dev/null/x"]])  # fmt: skip
def test_paths(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *argv)


def test_show_shows_what_is_bad_and_writes_through_no_link(digits, tmp_path, capsys):
    import shutil

    root = shutil.copytree(digits, tmp_path / "copy")
    for tar in root.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    victim = put(tmp_path / "victim", b"precious")
    (root / "contact_sheet.png").symlink_to(victim)
    assert "images are shown as a cross, the first: " in accepted(capsys, "show", root)
    assert victim.read_bytes() == b"precious"
    assert (root / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    refused(capsys, "show", root, "--sheet", tmp_path / "nowhere" / "sheet.png")


NO_SHEET = ["", ".", "..", "/", "fifo", "link to it", "folder", "x/manifest.json", "x/test-000000.tar"]


@pytest.mark.parametrize("sheet", NO_SHEET)
def test_a_picture_takes_the_place_of_nothing_else(sheet, digits, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.mkdir("folder")
    os.symlink("fifo", "link to it")
    shutil.copytree(digits, "x")
    refused(capsys, "show", "x", "--sheet", sheet)
    assert {path.name: path.read_bytes() for path in digits.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()
    }
    assert not os.path.isfile("fifo")


def test_a_shard_that_is_called_as_the_picture_is(digits, tmp_path, capsys):
    import json
    import shutil

    root = shutil.copytree(digits, tmp_path / "copy")
    raw = json.loads((root / "manifest.json").read_text())
    (root / raw["shards"][0]["file"]).rename(root / "contact_sheet.png")
    raw["shards"][0]["file"] = "contact_sheet.png"
    (root / "manifest.json").write_text(json.dumps(raw))
    assert "is a file of the dataset" in refused(capsys, "show", root)
    accepted(capsys, "verify", root)


def _converting(argv, told):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a process of its own has it while it imports torch
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
    for path in [*sorted(out.glob("*.tar"))[:3], *sorted(out.glob("*.npy"))[3:5]]:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    accepted(capsys, "imagefolder", root, out, "--old", "2")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_the_advice_to_skip_goes_on_where_it_stopped(tmp_path, capsys):
    root, out = photos(tmp_path / "photos", each=12), tmp_path / "out"
    put(root / "cat" / "5.jpg", b"\xff\xd8\xff no image")
    assert "--on-error skip leaves such images out" in refused(
        capsys, "imagefolder", root, out, "--old", "2", "--workers", "1"
    )
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
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


def test_workers_are_no_more_than_cores_that_may_be_used_or_shards(monkeypatch):
    assert workers.cores() == len(os.sched_getaffinity(0))
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


def test_a_bug_of_ours_is_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("sptnet_shards.make_shards._show", lambda *_: [][0])
    with pytest.raises(IndexError):
        main(["show", str(tmp_path)])


def test_an_item_of_no_class_is_one_line():
    from sptnet_shards.checks import check_source

    source = Source("made", ["a", "b"], 1, [Item("a", "1", 1), Item("c", "2", 1)], [], lambda where: b"")
    with pytest.raises(SourceError, match="of class 'c', which training does not have"):
        check_source(source)
