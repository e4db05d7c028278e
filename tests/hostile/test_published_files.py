"""Files that datasets of the field are published in: counts, MATLAB files, pickles that are never unpickled."""

import os
import pickle

import numpy as np
import pytest
from made import encoded, put, refused
from scipy.io import savemat
from sptnet_shards import published
from sptnet_shards.source import Source, SourceError
from sptnet_shards.sources import cifar


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


@pytest.mark.parametrize(
    ("counts", "told"), [((3, 2), "5 training images"), ((4, 0), "4 training images of class '0'")]
)
def test_one_image_too_many_or_a_class_that_is_too_large(counts, told, monkeypatch):
    monkeypatch.setitem(published.PARTS, "cub", (published.Part(4, 0, 3), published.Part(0, 0, 0)))

    def check(counts):
        whole = dict(zip("01", counts, strict=True)), {}
        published.check_published(Source("cub", ["a", "b"], 1, [], [], lambda where: b"", whole=whole))

    check((2, 2))
    with pytest.raises(SourceError, match=told):
        check(counts)


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
    from sptnet_shards.sources.arrays import unpickled

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
