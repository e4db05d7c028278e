"""What `sptnet predict` is told wrong, and what changed since its folder was begun: one line."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from read_tables import rows
from safetensors import safe_open
from safetensors.torch import save_file

import sptnet
from sptnet.cli import main


def test_mistakes_are_one_line(untrained, pile, predicted, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "manifest.json").write_text("[]")
    (tmp_path / "no_column.csv").write_text("file\na.png\n")
    (tmp_path / "semicolons.csv").write_text("id;image\n1;a.png\n")
    (tmp_path / "no_path.csv").write_text("image,x\n,1\n")
    (tmp_path / "full").symlink_to("/dev/full")
    no_model = Path(shutil.copytree(untrained, tmp_path / "no_model"))
    (no_model / "model.safetensors").unlink()
    cases = {
        ("nowhere", str(pile), "o1"): "nowhere is not a run",
        (str(no_model), str(pile), "o2"): "has the run been trained?",
        (str(untrained), str(tmp_path / "empty"), "o3"): "empty holds no image",
        (str(untrained), str(tmp_path / "fetched"), "o2b"): "and its manifest.json is none of shards",
        (str(untrained), "nowhere", "o4"): "nowhere is neither a folder of images",
        (str(untrained), str(tmp_path / "no_column.csv"), "o5"): "has no column 'image'",
        (str(untrained), str(tmp_path / "semicolons.csv"), "o5b"): "its first line has 'id;image'",
        (str(untrained), str(next(pile.rglob("*.png"))), "o5c"): "is an image: name the folder",
        (str(untrained), str(tmp_path / "no_path.csv"), "o6"): "line 2: the column image holds no path",
        (str(untrained), str(pile), "/dev/null/o"): "/dev/null/o cannot be written: Not a directory",
        (str(untrained), str(pile), str(predicted)): "holds results of something else (embeddings: True there",
    }
    for (run, images, out), told in cases.items():
        out = out if out.startswith("/") else str(tmp_path / out)
        assert main(["predict", run, images, "--out", out]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        assert told in lines[0]
    assert main(["predict", str(untrained), str(pile), "--out", str(tmp_path / "o7"), "--splits", "test"]) == 2
    assert "--splits is for shards, and" in capsys.readouterr().err
    assert not (tmp_path / "o4").exists()  # the right path is not compared with the wrong one


def test_images_that_came_since_are_told_of(untrained, pile, tmp_path, monkeypatch, capsys):
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted(pile.rglob("00[12]*.png"))[:9]:
        shutil.copy(path, some)
    (some / "a.HEIC").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", str(untrained), "some", "--out", "sorted"]
    assert main(arguments) == 0
    assert "some has files that are left out for their suffix: 1 .heic; images are .bmp" in capsys.readouterr().err
    monkeypatch.chdir(some)  # the same folder, and the same model, by other names
    again = ["predict", os.path.relpath(untrained), str(some), "--out", "../sorted"]
    assert main(again) == 0
    assert "warning" not in capsys.readouterr().err
    about = json.loads((tmp_path / "sorted" / "predict.json").read_text())
    (tmp_path / "sorted" / "predict.json").write_text(json.dumps(about | {"images": "some"}))  # of a version before
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    monkeypatch.chdir(some)
    assert main(again) == 1
    assert "images: some there" in capsys.readouterr().err
    (tmp_path / "sorted" / "predict.json").write_text(json.dumps(about))
    shutil.copy(some / sorted(os.listdir(some))[0], some / "new.png")
    assert main(again) == 0
    told = capsys.readouterr().err
    assert re.search(r"warning: \S+some has changed since ../sorted was begun: .* another --out", told)
    assert len(rows(tmp_path / "sorted")) == 9
    shutil.rmtree(some)  # and where they are gone nothing is compared
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0


def test_another_head_over_the_same_backbone_is_another_model(untrained, pile, tmp_path, capsys):
    other = Path(shutil.copytree(untrained, tmp_path / "other"))
    with safe_open(other / "model.safetensors", "pt") as opened:
        facts = json.loads(opened.metadata()["facts"]) | {"sha256": None}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    state["model.head.prototypes"] = state["model.head.prototypes"].flip(0)
    save_file(state, other / "model.safetensors", {"facts": json.dumps(facts)})
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(sorted(pile.rglob("00[12]*.png"))[0], some)
    assert main(["predict", str(untrained), str(some), "--out", str(tmp_path / "o")]) == 0
    assert main(["predict", str(other), str(some), "--out", str(tmp_path / "o")]) == 1
    assert "holds results of something else (head: " in capsys.readouterr().err


def test_a_link_to_a_folder_is_refused_as_a_conversion_does(untrained, pile, tmp_path, capsys):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "more").symlink_to(pile)
    assert main(["predict", str(untrained), str(tmp_path / "some"), "--out", str(tmp_path / "o")]) == 1
    assert "more is a link to a folder, which is not followed: put the folder there" in capsys.readouterr().err


def test_a_model_that_is_not_trained_to_its_end_says_so(untrained, pile, tmp_path, capsys):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    (run / "finished").unlink()
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(sorted(pile.rglob("00[12]*.png"))[0], some)
    assert main(["predict", str(run), str(some), "--out", str(tmp_path / "out")]) == 0
    assert f"warning: {run} is not finished: its model.safetensors is of step 1" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="is not finished"):
        sptnet.load(run, "cpu")


def test_images_that_became_others_are_told_of(untrained, pile, tmp_path, capsys):
    """A camera that writes the same name again had the table of its first picture."""
    some, (first, second) = tmp_path / "some", sorted(pile.rglob("00[12]*.png"))[:2]
    some.mkdir()
    shutil.copy(first, some / "cam.png")
    arguments = ["predict", str(untrained), str(some), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "warning" not in capsys.readouterr().err
    shutil.copy2(second, some / "new.png")  # with its own, older time
    os.replace(some / "new.png", some / "cam.png")
    assert main(arguments) == 0
    assert "has changed since" in capsys.readouterr().err


def test_a_table_without_a_row_is_a_failure(untrained, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("image\nsub\\a.jpg\n")
    assert main(["predict", str(untrained), str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]) == 1
    assert "error: none of the images can be read" in capsys.readouterr().err
