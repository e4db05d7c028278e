"""Every source, on small copies of the published layouts made of real files."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from sptnet_shards.arguments import SOURCES
from sptnet_shards.make_shards import main
from sptnet_shards.protocol import class_split
from sptnet_shards.source import SourceError
from sptnet_shards.sources import aircraft, cifar, csv_list, cub, herbarium_19, imagenet, scars


def jpeg(value: int = 0) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value % 256, np.uint8)).save(encoded, "JPEG")
    return encoded.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def check(source, train, test, classes, num_old):
    assert (len(source.train), len(source.test), len(source.classes), source.num_old) == (train, test, classes, num_old)
    assert len(set(source.classes)) == classes
    for item in (*source.train[:3], *source.test[-3:]):
        assert item.class_name in source.classes
        assert Image.open(io.BytesIO(source.read(item.where))).size[0] > 0


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path):
    folder, count = tmp_path / cifar.FOLDERS[name], 10 if name == "cifar10" else 100
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), np.uint8)
    for file in (*cifar.TRAIN[name], cifar.TEST[name]):
        batch = {"data": pixels, cifar.LABELS[name]: list(range(count))}
        put(folder / file, pickle.dumps(batch, protocol=2))
    put(folder / cifar.NAMES[name][0], pickle.dumps({cifar.NAMES[name][1]: [f"c{i}" for i in range(count)]}))
    source = cifar.source(name, tmp_path, unofficial=True)
    check(source, count * len(cifar.TRAIN[name]), count, count, {"cifar10": 5, "cifar100": 80}[name])
    decoded = np.asarray(Image.open(io.BytesIO(source.read("train:3"))))
    assert np.array_equal(decoded, pixels[3].reshape(3, 32, 32).transpose(1, 2, 0))
    put(folder / cifar.TEST[name], b"")
    with pytest.raises(SourceError, match=f"{cifar.TEST[name]} is not CIFAR's file"):
        cifar.source(name, tmp_path, unofficial=True)


def test_cifar_runs_nothing_that_a_file_names(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    folder = tmp_path / cifar.FOLDERS["cifar10"]
    put(folder / "batches.meta", pickle.dumps({"label_names": Hostile()}))
    with pytest.raises(SourceError, match=r"batches\.meta is not CIFAR's file .*has no place in CIFAR"):
        cifar.source("cifar10", tmp_path, unofficial=True)
    assert not (tmp_path / "harm").exists()


def test_cub(tmp_path):
    names = [f"{i + 1:03d}.Bird_{i}" for i in range(200)]
    lines = [(2 * i + k + 1, f"{name}/{k}.jpg", i + 1, 1 - k) for i, name in enumerate(names) for k in (0, 1)]
    for _, path, _, _ in lines:
        put(tmp_path / "images" / path, jpeg())
    put(tmp_path / "images.txt", "".join(f"{n} {path}\n" for n, path, _, _ in lines))
    put(tmp_path / "image_class_labels.txt", "".join(f"{n} {label}\n" for n, _, label, _ in lines))
    put(tmp_path / "train_test_split.txt", "".join(f"{n} {train}\n" for n, _, _, train in lines))
    source = cub.source(tmp_path)
    check(source, 200, 200, 200, 100)
    old, new = class_split("cub")
    assert source.classes == [names[i] for i in old + new]
    assert [item.class_name for item in source.train] == names
    (tmp_path / "images" / lines[7][1]).unlink()
    with pytest.raises(SourceError, match=f"{lines[7][1]} cannot be read"):
        cub.source(tmp_path)
    (tmp_path / "train_test_split.txt").unlink()
    with pytest.raises(SourceError, match=r"train_test_split\.txt is missing"):
        cub.source(tmp_path)


def test_scars(tmp_path):
    names = np.array([f"car {i}" for i in range(196)], object)
    annotations = np.array([(i + 1, f"{i:05d}.jpg") for i in range(196)], [("class", object), ("fname", object)])
    (tmp_path / "devkit").mkdir()
    savemat(tmp_path / "devkit" / "cars_meta.mat", {"class_names": names})
    savemat(tmp_path / "devkit" / "cars_train_annos.mat", {"annotations": annotations})
    for i in range(196):
        put(tmp_path / "cars_train" / f"{i:05d}.jpg", jpeg(i))
        put(tmp_path / "cars_test" / f"{i:05d}.jpg", jpeg(i))
    with pytest.raises(SourceError, match=r"withlabels\.mat is missing: the test labels are no longer distributed"):
        scars.source(tmp_path)
    savemat(tmp_path / "devkit" / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    source = scars.source(tmp_path)
    check(source, 196, 196, 196, 98)
    assert source.classes[0] == f"car {class_split('scars')[0][0]}"
    assert source.train[5].class_name == "car 5"


def test_aircraft(tmp_path):
    names = [f"Plane {i:03d}/B" for i in range(100)]
    put(tmp_path / "data" / "variants.txt", "\n".join(names[::-1]) + "\n")
    for part, start in (("trainval", 0), ("test", 100)):
        rows = [f"{start + i:07d} {name}" for i, name in enumerate(names)]
        put(tmp_path / "data" / f"images_variant_{part}.txt", "\n".join(rows) + "\n")
        for row in rows:
            put(tmp_path / "data" / "images" / f"{row[:7]}.jpg", jpeg())
    source = aircraft.source(tmp_path)
    check(source, 100, 100, 100, 50)
    assert source.classes[:2] == [names[i] for i in class_split("aircraft")[0][:2]]


def test_herbarium_counts_classes_as_strings(tmp_path):
    for i in range(683):
        put(tmp_path / "small-train" / str(i) / "a.jpg", jpeg())
        put(tmp_path / "small-validation" / str(i) / "b.jpg", jpeg())
    source = herbarium_19.source(tmp_path)
    check(source, 683, 683, 683, 341)
    assert source.classes[0] == sorted(map(str, range(683)))[class_split("herbarium_19")[0][0]]


def wnids(count):
    return [f"n{i:08d}" for i in range(count)]


def tar_of(files) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return written.getvalue()


def test_imagenet_tars_are_read_where_they_are_and_equal_the_tree(tmp_path):
    names = wnids(502)
    tree, tars = tmp_path / "tree", tmp_path / "tars"
    images = {name: [(f"{name}_{k}.JPEG", jpeg(i + k)) for k in (1, 0)] for i, name in enumerate(names)}
    val = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(i)) for i in range(502)]
    for name in names:
        for file, content in images[name]:
            put(tree / "train" / name / file, content)
    for file, content in val:
        put(tree / "val" / file, content)
    put(tars / imagenet.TRAIN_TAR, tar_of([(f"{name}.tar", tar_of(images[name])) for name in reversed(names)]))
    put(tars / imagenet.VAL_TAR, tar_of(val))
    synsets = np.array([(i + 1, name) for i, name in enumerate(names)], [("ILSVRC2012_ID", object), ("WNID", object)])
    for root in (tree, tars):
        (root / imagenet.DEVKIT).mkdir(parents=True)
        savemat(root / imagenet.DEVKIT / "meta.mat", {"synsets": synsets})
        put(root / imagenet.DEVKIT / imagenet.GROUND_TRUTH, "".join(f"{502 - i}\n" for i in range(502)))
    one, other = imagenet.source("imagenet1k", tree), imagenet.source("imagenet1k", tars)
    check(one, 1004, 502, 502, 500)
    check(other, 1004, 502, 502, 500)
    assert one.classes == other.classes == names
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert [item.class_name for item in mine] == [item.class_name for item in theirs]
        for i in (0, 7, len(mine) - 1):
            assert one.read(mine[i].where) == other.read(theirs[i].where)
    assert one.test[0].class_name == names[501]
    with pytest.raises(SourceError, match="chosen from ImageNet's 1,000"):
        imagenet.source("imagenet100", tree)
    (tars / imagenet.TRAIN_TAR).write_bytes((tars / imagenet.TRAIN_TAR).read_bytes()[:20_000])
    with pytest.raises(SourceError, match=r"img_train\.tar cannot be read as a tar"):
        imagenet.source("imagenet1k", tars)


def test_imagenet_100(tmp_path):
    for name in wnids(1000):
        put(tmp_path / "train" / name / "a.JPEG", jpeg())
        put(tmp_path / "val" / name / "b.JPEG", jpeg())
    source = imagenet.source("imagenet100", tmp_path)
    check(source, 100, 100, 100, 50)
    assert source.classes[:3] == [wnids(1000)[i] for i in (1, 14, 27)]


def test_csv(tmp_path):
    rows = ["image,class,split", "b.jpg,cat,train", "a.jpg,ant,", "sub/c.jpg,bee,train", "a.jpg,bee,test"]
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        put(tmp_path / name, jpeg())
    put(tmp_path / "list.csv", "\n".join(rows))
    source = csv_list.source(tmp_path / "list.csv", 2)
    check(source, 3, 1, 3, 2)
    assert [item.where for item in source.train] == ["b.jpg", "a.jpg", "sub/c.jpg"]
    assert source.classes == ["ant", "bee", "cat"]
    for bad, told in (
        ("../a.jpg,ant,", "line 6: ../a.jpg is not a path below"),
        ("d.jpg,ant,", "d.jpg cannot be read"),
        ("a.jpg,ant,val", "line 6: needs an image"),
        ("a.jpg,dog,test", "not in train: dog"),
    ):
        put(tmp_path / "bad.csv", "\n".join([*rows, bad]))
        with pytest.raises(SourceError, match=told):
            csv_list.source(tmp_path / "bad.csv", 2)
    put(tmp_path / "bad.csv", "file,class\na.jpg,ant")
    with pytest.raises(SourceError, match="no column 'image'"):
        csv_list.source(tmp_path / "bad.csv", 1)


@pytest.mark.parametrize("name", [source.name for source in SOURCES])
def test_every_source_has_help_and_one_line_for_a_missing_folder(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert len(capsys.readouterr().out) > 200
    if name == "digits":
        return
    extra = {"imagefolder": ["--old", "1"], "csv": ["--old", "1"], "discover": [str(tmp_path / "out")]}.get(name, [])
    assert main([name, str(tmp_path / "nowhere"), str(tmp_path / "out"), *extra]) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert str(tmp_path / "nowhere") in told[0]
    assert not (tmp_path / "out").exists()
