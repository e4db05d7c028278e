"""Lists of images that lie, or lead outside of their folder: CSV, and the lists of CUB."""

import pytest
from made import encoded, put, refused
from sptnet_shards.make_shards import main

from sptnet.data.format.manifest import read_manifest

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


def test_a_line_is_told_as_editors_count_them(tmp_path, capsys):
    root = tmp_path / "data"
    put(root / "a.jpg", encoded())
    (root / "list.csv").write_text('image,class,note\na.jpg,ant,"of two\nlines"\na.jpg,ant,x\n,bee,y\n')
    assert main(["csv", str(root / "list.csv"), str(tmp_path / "out"), "--old", "1"]) != 0
    assert "list.csv, line 5: needs an image" in capsys.readouterr().err
