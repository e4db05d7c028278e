"""Single files that cannot be had, where one is told to leave such out: the rest is converted."""

import os

import pytest
from made import accepted, encoded, photos, put, refused

from sptnet.data.format.files import LARGEST_IMAGE
from sptnet.data.format.manifest import read_manifest


def damaged_inside(kind="PNG") -> bytes:
    """An image of sound beginning and end."""
    whole = bytearray(encoded(kind, 40, 40))
    at = whole.index(b"IDAT") + 8
    whole[at : at + 8] = b"\xff" * 8
    return bytes(whole)


ODD = {
    "broken link": lambda path: path.symlink_to("nowhere"), "FIFO": lambda path: os.mkfifo(path),
    "link in a circle": lambda path: path.symlink_to(path.name),
    "too large": lambda path: (path.touch(), os.truncate(path, LARGEST_IMAGE + 1)),
    "damaged inside": lambda path: path.write_bytes(damaged_inside()),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_they_are_left_out_and_named(kind, tmp_path, capsys):
    named, pile = photos(tmp_path / "named"), photos(tmp_path / "pile", ("box",), 9)
    ODD[kind](pile / "box" / "x.png")
    run = ["discover", named, pile, tmp_path / "out"]
    if kind != "damaged inside":  # bytes that nobody decodes are taken as they are
        assert "x.png" in refused(capsys, *run)
    told = accepted(capsys, *run, "--on-error", "skip")
    assert "1 images were left out, the first is unlabelled/box/x.png" in told
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.samples("labelled"), manifest.samples("unlabelled")) == (12, 9)
    assert [entry["file"] for entry in manifest.skipped] == ["unlabelled/box/x.png"]


def test_a_file_that_is_gone_since_the_folder_was_listed(tmp_path, capsys):
    root = photos(tmp_path / "photos", each=12)
    run = ["imagefolder", root, tmp_path / "out", "--old", "1"]
    accepted(capsys, *run, "--task", "0/2")
    for path in root.glob("*/5.jpg"):
        path.unlink()
    told = refused(capsys, *run, "--task", "1/2")
    assert "5.jpg cannot be read: No such file or directory; --on-error skip leaves such images out" in told
    accepted(capsys, *run, "--task", "1/2", "--on-error", "skip")
    left_out = sorted(entry["file"] for entry in read_manifest(tmp_path / "out").skipped)
    assert left_out == ["ant/5.jpg", "bee/5.jpg", "cat/5.jpg"]


def test_where_the_folder_is_gone_too_nothing_is_left_out(tmp_path, capsys):
    root = photos(tmp_path / "photos", each=12)
    run = ["imagefolder", root, tmp_path / "out", "--old", "1", "--on-error", "skip"]
    accepted(capsys, *run, "--task", "0/2")
    (root / "bee").rename(tmp_path / "elsewhere")
    assert "cannot be read: No such file" in refused(capsys, *run, "--task", "1/2")


def test_hidden_folders_hold_no_images(tmp_path, capsys):
    named, pile = photos(tmp_path / "named"), photos(tmp_path / "pile", ("box",), 9)
    for place in (named / "ant" / ".thumbnails", pile / ".Trash-1000" / "files", pile / "box" / ".cache"):
        put(place / "x.jpg", encoded(value=99))
    put(named / ".x.jpg", encoded(value=98))
    told = accepted(capsys, "discover", named, pile, tmp_path / "out")
    assert "outside of class folders" not in told
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.samples("labelled"), manifest.samples("unlabelled")) == (12, 9)


@pytest.mark.parametrize("place", ["pile", "named/ant"])
def test_a_folder_of_other_files_only_is_told_which(place, tmp_path, capsys):
    named, pile = photos(tmp_path / "named"), photos(tmp_path / "pile", ("box",))
    for path in (tmp_path / place).rglob("*.jpg"):
        path.rename(path.with_suffix(".HEIC"))
    told = refused(capsys, "discover", named, pile, tmp_path / "out")
    assert "holds no image" in told
    assert "4 .heic; images are .bmp" in told
