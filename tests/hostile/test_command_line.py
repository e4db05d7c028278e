"""What is asked of the sharding commands: options and paths that cannot be, pictures in the place of something else."""

import os

import pytest
from launching import loaded_by
from made import accepted, put, refused
from sptnet_shards.items import Item
from sptnet_shards.make_shards import main
from sptnet_shards.source import Source, SourceError


@pytest.mark.parametrize("option", [("--seed", "-1"), ("--seed", "4294967296"), ("--seed", "²"), ("--workers", "²"),
                                    ("--resize", "99999"), ("--shard-mb", "0"), ("--labelled-fraction", "nan")])  # fmt: skip
def test_options(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["digits", str(tmp_path / "out"), *option])
    assert len([line for line in capsys.readouterr().err.splitlines() if "error: " in line]) == 1


@pytest.mark.parametrize("argv", [["--help"], ["digits", "--help"], ["digits", "out", "--seed", "-1"], ["evil"]])
def test_help_and_mistakes_come_before_torch(argv):
    code, loaded = loaded_by("sptnet_shards.make_shards", argv)
    assert not loaded & {"torch", "scipy", "sklearn"}
    assert code == (0 if "--help" in argv else 2)


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


NO_SHEET = [".", "..", "/", "fifo", "link to it", "folder", "x/manifest.json", "x/test-000000.tar"]


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


def test_a_bug_of_ours_is_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("sptnet_shards.commands._show", lambda *_: [][0])
    with pytest.raises(IndexError):
        main(["show", str(tmp_path)])


def test_an_item_of_no_class_is_one_line():
    from sptnet_shards.conversion.checks import check_source

    source = Source("made", ["a", "b"], 1, [Item("a", "1", 1), Item("c", "2", 1)], [], lambda where: b"")
    with pytest.raises(SourceError, match="of class 'c', which training does not have"):
        check_source(source)
