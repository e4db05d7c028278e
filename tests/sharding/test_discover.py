"""Images whose classes nobody knows: how they are sharded, and what is kept of where they came from."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from sptnet_shards.make_shards import main

from sptnet.data.format.manifest import UNKNOWN, read_manifest
from sptnet.data.format.paths import paths_name
from sptnet.data.storage.store import LocalStore

DRAWS = np.random.default_rng(0)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DRAWS.integers(0, 256, (9, 8, 3), np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path):
    """Two named classes, a pile of ten images at several depths, and three classes to measure on."""
    for number in range(3):
        for name in ("ant", "bee"):
            image(tmp_path / "named" / name / f"{number}.png")
        for name in ("ant", "bee", "cow"):
            image(tmp_path / "measured" / name / f"{number}.png")
    for number in range(8):
        image(tmp_path / "pile" / f"{number}.png")
    image(tmp_path / "pile" / "a b" / "c" / 'line\nfeed, "quoted".png')
    image(tmp_path / "pile" / "a b" / "Ä.PNG")
    return tmp_path


def discover(folders, *more):
    return main(["discover", *(str(folders / name) for name in ("named", "pile", "out")), *more])


def test_all_named_images_are_labelled_and_the_others_unknown(folders, capsys):
    assert discover(folders) == 0
    assert "how many new classes there are is not known yet" in capsys.readouterr().err
    store = LocalStore(folders / "out")
    manifest = store.manifest
    assert (manifest.classes, manifest.num_old, manifest.unknown, manifest.new_classes()) == (
        ["ant", "bee"],
        2,
        True,
        None,
    )
    assert (manifest.samples("labelled"), manifest.samples("unlabelled"), manifest.samples("test")) == (6, 10, 0)
    paths = {}
    for kind in ("labelled", "unlabelled"):
        for shard in manifest.of_kind(kind):
            entries = store.entries(shard)
            told = store.paths(shard)
            for (_, target, offset, size), path in zip(entries.tolist(), told, strict=True):
                paths[path] = target
                with open(folders / "out" / shard.file, "rb") as tar:
                    tar.seek(offset)
                    part, _, below = path.partition("/")
                    original = folders / {"labelled": "named", "unlabelled": "pile"}[part] / below
                    assert tar.read(size) == original.read_bytes()
            with tarfile.open(folders / "out" / shard.file) as tar:
                suffixes = {name.rpartition(".")[2] for name in tar.getnames()}
            assert suffixes == ({"png", "cls"} if kind == "labelled" else {"png"})
    assert paths['unlabelled/a b/c/line\nfeed, "quoted".png'] == UNKNOWN
    assert {target for path, target in paths.items() if path.startswith("labelled/bee/")} == {1}
    assert main(["verify", str(folders / "out"), "--decode"]) == 0
    assert main(["show", str(folders / "out")]) == 0
    assert "an unknown number of new ones" in capsys.readouterr().out


def test_how_many_new_classes_may_be_said_and_test_images_may_be_of_new_ones(folders):
    assert discover(folders, "--new", "4", "--test", str(folders / "measured")) == 0
    manifest = read_manifest(folders / "out")
    assert (manifest.classes, manifest.num_old, manifest.new_classes()) == (["ant", "bee", "cow"], 2, 4)


def test_a_csv_may_leave_the_class_empty(folders, capsys):
    rows = ["image,class", "named/ant/0.png,ant", "named/bee/1.png,bee", *(f"pile/{n}.png," for n in range(8))]
    (folders / "list.csv").write_text("\n".join(rows))
    assert main(["csv", str(folders / "list.csv"), str(folders / "out"), "--new", "1"]) == 0
    manifest = read_manifest(folders / "out")
    assert (manifest.unknown, manifest.samples("unlabelled"), manifest.new_classes()) == (True, 8, 1)
    assert main(["csv", str(folders / "list.csv"), str(folders / "other"), "--old", "1"]) == 1
    assert "has images without a class: all its classes are old" in capsys.readouterr().err


def test_old_classes_by_name(folders):
    for told in ("cow,ant", str(folders / "old.txt")):
        (folders / "old.txt").write_text("cow\nant\n")
        out = folders / f"out-{len(told)}"
        assert main(["imagefolder", str(folders / "measured"), str(out), "--old-classes", told]) == 0
        manifest = read_manifest(out)
        assert (manifest.classes, manifest.num_old, manifest.unknown) == (["ant", "cow", "bee"], 2, False)


def test_a_list_of_old_classes_may_be_longer_than_any_path(folders):
    names = [f"a class with a long name {n:03d}" for n in range(300)]
    assert len(",".join(names)) > 4096
    for count in (20, 300):  # longer than a file's name may be, and than a path
        for name in [*names[:count], "zebra"]:
            image(folders / f"many{count}" / name / "0.png")
            image(folders / f"many{count}" / name / "1.png")
        out = folders / f"out{count}"
        told = ",".join(names[:count])
        assert main(["imagefolder", str(folders / f"many{count}"), str(out), "--old-classes", told]) == 0
        assert read_manifest(out).num_old == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["discover", "named", "empty", "out"], "holds no image: there is nothing to be sorted"),
        (["discover", "empty", "pile", "out"], "has no class folders"),
        (["discover", "named", "named/ant", "out"], "lies inside of"),
        (["discover", "named", "named", "out"], "lies inside of"),
        (["discover", "gone", "pile", "out"], "is missing or not a folder"),
        (["discover", "named", "pile", "out", "--test", "gone"], "is missing or not a folder"),
        (["discover", "named", "pile", "out", "--new", "0"], "is not a whole number above 0"),
        (["discover", "named", "pile", "out", "--new", "1", "--test", "wide"], "test images alone have 2 classes"),
        (["discover", "named", "pile", "pile/out"], "lies among the images of"),
        (["imagefolder", "measured", "out", "--old-classes", "ant,dog"], "has no class of that name"),
        (["imagefolder", "measured", "out", "--old-classes", "ant,bee,cow"], "must leave old and new classes"),
        (["imagefolder", "measured", "out", "--old-classes", "ant,ant"], "names a class twice"),
    ],
)
def test_mistakes_are_one_line(folders, capsys, monkeypatch, arguments, words):
    (folders / "empty").mkdir()
    for name in ("dog", "eel"):
        image(folders / "wide" / name / "0.png")
    monkeypatch.chdir(folders)
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse
        code = left.code
    assert code != 0
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not (folders / "out").exists()


def test_damaged_paths_are_noticed(folders, capsys):
    assert discover(folders, "--new", "2") == 0
    shard = read_manifest(folders / "out").of_kind("unlabelled")[0]
    assert shard.paths == paths_name(shard.file)
    (folders / "out" / shard.paths).write_text(json.dumps("pile/0.png") + "\n")
    assert main(["verify", str(folders / "out")]) == 1
    assert "is not the file that the manifest means (sha256)" in "".join(capsys.readouterr())


def test_what_is_left_out_is_counted(folders, capsys):
    image(folders / "named" / "loose.png")
    (folders / "pile" / "a.heic").touch()
    (folders / "pile" / "Thumbs.db").touch()
    assert discover(folders, "--new", "2") == 0
    told = capsys.readouterr().err
    assert "has 1 images outside of class folders" in told
    assert "left out for their suffix: 1 .heic" in told


def tar(path, labels):
    """A WebDataset tar of an image for each label; None: without one."""
    with tarfile.open(path, "w") as out:
        for number, label in enumerate(labels):
            content = io.BytesIO()
            Image.fromarray(DRAWS.integers(0, 256, (8, 8, 3), np.uint8)).save(content, "PNG")
            members = {"png": content.getvalue()} | ({} if label is None else {"cls": str(label).encode()})
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{path.stem}-{number}.{suffix}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))


def test_tars_without_labels_beside_labelled_ones(tmp_path, capsys):
    tar(tmp_path / "train-0.tar", [2, 10, 2, 10])
    tar(tmp_path / "train-1.tar", [None] * 5)
    tar(tmp_path / "test-0.tar", [2, 11])
    assert main(["index", str(tmp_path), "--old", "1"]) == 1
    assert "has images without labels: all its classes are old, leave --old out" in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--new", "3"]) == 0
    manifest = read_manifest(tmp_path)
    assert (manifest.classes, manifest.num_old, manifest.new_classes()) == (["2", "10", "11"], 2, 3)
    assert (manifest.samples("labelled"), manifest.samples("unlabelled")) == (4, 5)
    (shard,) = manifest.of_kind("unlabelled")
    assert set(LocalStore(tmp_path).entries(shard)["target"].tolist()) == {UNKNOWN}
    assert main(["verify", str(tmp_path), "--decode"]) == 0


def test_an_image_that_lost_its_label_among_others_is_an_error(tmp_path, capsys):
    tar(tmp_path / "train-0.tar", [0, 1, None, 1])
    assert main(["index", str(tmp_path), "--old", "1"]) == 1
    assert "has neither .cls nor .json" in capsys.readouterr().err
