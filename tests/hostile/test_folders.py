"""Folders of images as they are found: what is none, what cannot be told apart, what is left out."""

import os

import pytest
from made import accepted, encoded, photos, put, refused
from sptnet_shards.make_shards import main

from sptnet.build import build_data
from sptnet.config import ConfigError
from sptnet.config_file import load_config
from sptnet.data.format.files import LARGEST_IMAGE
from sptnet.data.format.manifest import read_manifest
from sptnet.data.format.paths import parse_paths, paths_name
from sptnet.discover.recipe import batches_of

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

    from sptnet.data.format.files import IMAGE_SUFFIXES
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


def test_a_shard_without_an_image_is_no_stream(tmp_path):
    """Four labelled images, one of which does not decode: four shards, three of them with an image."""
    root = photos(tmp_path / "photos", classes=("ant", "bee"), each=8)
    out, config = tmp_path / "shards", ["init=null", "data.workers=0", "data.batch_size=8", "data.streams=4"]
    sharded = ["imagefolder", str(root), str(out), "--old", "1", "--on-error", "skip"]
    assert main(sharded) == 0
    manifest = read_manifest(out)
    image = next(_labelled(out, manifest))
    (root / image).write_bytes(b"no image")
    assert main([*sharded[:2], str(tmp_path / "again"), *sharded[3:]]) == 0
    manifest = read_manifest(tmp_path / "again")
    assert manifest.of_kind("labelled").samples.tolist().count(0) == 1
    assert batches_of(manifest, (8, 4), 1).streams == 3
    with pytest.raises(ConfigError, match="has 3 labelled images: use at most 3"):
        build_data(load_config("quickstart", [f"data.root={tmp_path / 'again'}", *config]))


def _labelled(root, manifest):
    for shard in manifest.of_kind("labelled"):
        yield from parse_paths((root / paths_name(shard.file)).read_bytes(), shard, "paths")
