"""What was taken, left out or counted without a word: outputs, links, rows, samples, shards that others replaced."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import ROOT
from made import accepted, encoded, photos, put, refused, told
from PIL import Image
from safetensors.torch import load_file
from sptnet_shards.make_shards import main as shards
from sptnet_shards.tars.members import label_of

from sptnet.cli import main
from sptnet.config import ConfigError
from sptnet.config_file import load_config
from sptnet.data.features import FeatureFolder
from sptnet.data.format.files import folders_in
from sptnet.data.format.manifest import MANIFEST, read_manifest
from sptnet.discover.children import StageError
from sptnet.discover.closing import changed_classes
from sptnet.discover.request import Request
from sptnet.discover.stages import check_shards
from sptnet.run.folder import RunError, check_unfinished
from sptnet.run.model_file import load_prompt, read_facts, save_model
from sptnet.yaml_text import parse_yaml


@pytest.fixture
def copied(digits, tmp_path):
    return Path(shutil.copytree(digits, tmp_path / "copied"))


def changed_manifest(root, change):
    told = json.loads((root / MANIFEST).read_text())
    change(told)
    (root / MANIFEST).write_text(json.dumps(told, indent=1))


def test_outputs_that_are_not_finite_are_no_class(run, digits, tmp_path, capsys):
    """Finite weights whose outputs overflow: class 0 by a table, a traceback or a class in an evaluation."""
    state, facts = load_file(run / "model.safetensors"), read_facts(run)
    config = load_config(run / "config.yaml")
    model = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    model["backbone.blocks.1.mlp.fc2.weight"] *= 1e38
    save_model(run, model, load_prompt(run, config.prompts, config.model.image_size), facts)
    assert main(["eval", str(run)]) == 1
    assert "of 1072 samples, 1072 with outputs that are not finite (uid " in told(capsys)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    assert main(["predict", str(run), str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 1
    assert "the model's outputs of 1 of 1 images are not finite" in told(capsys)


def test_a_sample_that_is_in_two_shards_is_not_evaluated(run, copied, capsys):

    def twice(told):
        (entry,) = [dict(entry) for entry in told["shards"] if entry["kind"] == "test"]
        for key in ("file", "index", "paths"):
            if key in entry:
                name = entry[key].replace("000000", "000001")
                shutil.copy(copied / entry[key], copied / name)
                entry[key] = name
        told["shards"].append(entry)
        told["protocol"] = {}

    changed_manifest(copied, twice)
    assert main(["eval", str(run), f"data.root={copied}"]) == 1
    assert "of 718 samples, 359 there more than once (uid " in told(capsys)


def request(tmp_path, **changes):
    folders = {"labelled": tmp_path / "named", "unlabelled": tmp_path / "pile", "out": tmp_path / "out", "test": None}
    asked = {"new": None, "backbone": "x", "weights": "none", "overrides": (), "then": "sptnet"}
    return Request(**(folders | asked | changes))


def discovered(tmp_path, capsys, *more):
    photos(tmp_path / "named", ("ant", "bee", "cow"))
    for number in range(3):
        put(tmp_path / "pile" / f"{number}.png", encoded("PNG", value=200 + number))
    accepted(capsys, "discover", tmp_path / "named", tmp_path / "pile", tmp_path / "out" / "shards", *more)
    return read_manifest(tmp_path / "out" / "shards")


def test_results_of_other_shards_are_not_gone_on_with(tmp_path, capsys):
    """Shards that were made again of other images number them anew; predictions are joined by these numbers."""
    manifest, asked = discovered(tmp_path, capsys), request(tmp_path)
    check_shards(asked, manifest)
    kept = ["estimate_k/estimate_k.json", "simgcd/metrics.json", "checks/sptnet/predict.json", "features/features.json"]
    for name in kept:
        put(tmp_path / "out" / name, json.dumps({"dataset": manifest.digest()}))
    check_shards(asked, manifest)
    for name in kept:
        put(tmp_path / "out" / name, json.dumps({"dataset": "0" * 64}))
        where = name if name.endswith("metrics.json") else os.path.dirname(name)
        with pytest.raises(StageError, match=rf"{where}: made of other shards than \S+shards has now"):
            check_shards(asked, manifest)
        put(tmp_path / "out" / name, json.dumps({"dataset": manifest.digest()}))


@pytest.mark.parametrize("change", ["class gone", "class new", "image gone", "image new", "moved"])
def test_classes_that_changed_since_are_told(tmp_path, capsys, change):
    photos(tmp_path / "measured", ("ant", "bee"), 1)
    (tmp_path / "named" / "ant").mkdir(parents=True)
    (tmp_path / "named" / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    measured = ("--test", tmp_path / "measured", "--on-error", "skip")
    manifest = discovered(tmp_path, capsys, *measured)
    assert manifest.skipped
    asked = request(tmp_path, test=tmp_path / "measured")
    assert changed_classes(asked, manifest) == []
    named = tmp_path / "named"
    first = sorted((named / "bee").iterdir())[0]
    {
        "class gone": lambda: shutil.rmtree(named / "cow"), "image gone": first.unlink,
        "class new": lambda: photos(named, ("dog",)), "image new": lambda: shutil.copy(first, named / "bee" / "z.jpg"),
        "moved": lambda: first.rename(named / "cow" / "moved.jpg"),
    }[change]()  # fmt: skip
    assert changed_classes(asked, manifest) == [named]
    shutil.rmtree(tmp_path / "measured" / "bee")
    assert changed_classes(asked, manifest) == [named, tmp_path / "measured"]


@pytest.mark.parametrize("target", ["/mnt/nowhere/dog", "dog"])
def test_a_class_behind_a_link_that_leads_nowhere_is_not_left_out(tmp_path, capsys, target):
    root = photos(tmp_path / "photos", ("ant", "bee"))
    (root / "cat.png").mkdir()
    put(root / "cat.png" / "a.jpg", encoded(value=99))
    assert folders_in(root) == ["ant", "bee", "cat.png"]
    (root / "dog").symlink_to(target)
    assert f"{root / 'dog'} cannot be listed" in refused(capsys, "imagefolder", root, tmp_path / "out", "--old", "1")
    (tmp_path / "pile").mkdir()
    assert f"{root / 'dog'} cannot be listed" in refused(capsys, "discover", root, tmp_path / "pile", tmp_path / "out")
    assert main(["discover", str(root), str(tmp_path / "pile"), str(tmp_path / "out")]) != 0
    assert f"{root / 'dog'} cannot be listed" in told(capsys)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_behind_a_link_that_leads_nowhere_is_not_none(tmp_path, capsys, part):
    root = tmp_path / "photos"
    photos(root / "train" if part == "test" else root, ("ant", "bee"))
    (root / part).symlink_to("/mnt/nowhere")
    assert f"{root / part} cannot be listed" in refused(capsys, "imagefolder", root, tmp_path / "out", "--old", "1")


def test_a_tar_behind_a_link_that_leads_nowhere_is_not_left_out(tmp_path, capsys):
    (tmp_path / "train-9.tar").symlink_to("/mnt/nowhere.tar")
    line = refused(capsys, "index", tmp_path, "--old", "1")
    assert "train-9.tar cannot be opened (No such file or directory): is its disk there?" in line


def test_a_row_that_is_cut_off_is_named(tmp_path, capsys):
    for number, name in enumerate("abc"):
        put(tmp_path / f"{name}.jpg", encoded(value=number))
    put(tmp_path / "list.csv", "image,class\na.jpg,ant\nb.jpg,bee\nc.jpg\n")
    line = refused(capsys, "csv", tmp_path / "list.csv", tmp_path / "out", "--old", "1")
    assert "list.csv, line 4 has fewer columns than the first line" in line


@pytest.mark.parametrize("command", [["eval", "loop"], ["export", "loop", "o"], ["report", "--over-seeds", "loop"],
                                     ["train", "loop/x.yaml"], ["discover", "L", "U", "loop"]])  # fmt: skip
def test_a_link_that_leads_back_to_itself_is_one_line(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "L", ("ant", "bee", "cow"))
    photos(tmp_path / "U", ("x",))
    (tmp_path / "loop").symlink_to("loop")
    assert main(command) != 0
    assert "loop" in told(capsys)


def test_features_of_a_dataset_without_a_test_image_are_whole(run, copied, tmp_path):
    (test,) = read_manifest(copied).of_kind("test")
    index = np.load(copied / test.index)[:0]
    np.save(copied / test.index, index)

    def emptied(told):
        for entry in told["shards"]:
            if entry["kind"] == "test":
                entry["samples"] = 0
                entry["index_sha256"] = hashlib.sha256((copied / test.index).read_bytes()).hexdigest()
                entry.pop("paths", None), entry.pop("paths_sha256", None)
        told["protocol"] = {}

    changed_manifest(copied, emptied)
    assert main(["features", str(copied), "--out", str(tmp_path / "features"), "--run", str(run)]) == 0
    FeatureFolder(tmp_path / "features", read_manifest(copied))


def test_numbers_are_not_read_as_octal_ones():
    with pytest.raises(ConfigError, match="010 begins with 0, which YAML takes for octal"):
        load_config("quickstart", ["seed=010"])
    assert load_config("quickstart", ["seed=10", "optimizer.lr=0.5"]).seed == 10


def test_values_that_are_nested_too_deeply_are_one_line():
    with pytest.raises(ConfigError, match="nested more than 20 deep"):
        parse_yaml("a: " + "[" * 300 + "]" * 300, "x")
    assert parse_yaml("a: [[1]]", "x") == {"a": [[1]]}


def test_unknown_classes_are_only_where_the_manifest_says_so(run, copied, capsys):
    shard = read_manifest(copied).of_kind("unlabelled")[0]
    index = np.load(copied / shard.index)
    index["target"][:3] = -1
    np.save(copied / shard.index, index)

    def digest(told):
        for entry in told["shards"]:
            if entry["index"] == shard.index:
                entry["index_sha256"] = hashlib.sha256((copied / shard.index).read_bytes()).hexdigest()

    changed_manifest(copied, digest)
    assert main(["eval", str(run), f"data.root={copied}"]) == 1
    assert "has a target that is none of 0 to 9, as unlabelled shards have here" in told(capsys)


@pytest.mark.parametrize(
    ("text", "suffix"), [(b"-1\n", "cls"), (b'{"label": -1}', "json"), (b'{"label": "-1"}', "json")]
)
def test_minus_one_is_no_class_of_a_tar(text, suffix):
    with pytest.raises(ValueError, match="-1 is no class"):
        label_of(text, suffix, "label")
    assert label_of(text.replace(b"-1", b"1"), suffix, "label") == "1"


@pytest.mark.parametrize("module", ["sptnet", "sptnet_shards.make_shards"])
def test_a_working_folder_that_was_removed_is_told(tmp_path, module):
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && exec {sys.executable} -m {module} digits x"
    ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("error: the working folder cannot be found")


def test_a_run_is_not_written_into_a_dataset(digits):
    with pytest.raises(RunError, match="holds a dataset: choose a folder of its own"):
        check_unfinished(load_config("quickstart", ["init=null", f"run={digits}", f"data.root={digits}"]))


def test_a_contact_sheet_takes_no_other_file_s_place(digits, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is there, and no PNG" in refused(capsys, "show", digits, "--sheet", tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for _ in range(2):
        assert shards(["show", str(digits), "--sheet", str(tmp_path / "sheet.png")]) == 0


def test_a_list_of_old_classes_may_begin_with_a_mark_of_its_bytes(tmp_path, capsys):
    root = photos(tmp_path / "photos", ("ant", "bee"))
    (tmp_path / "old.txt").write_bytes(b"\xef\xbb\xbfbee\r\n")
    accepted(capsys, "imagefolder", root, tmp_path / "out", "--old-classes", tmp_path / "old.txt")
    assert read_manifest(tmp_path / "out").classes[0] == "bee"


@pytest.mark.parametrize("command", [["predict", "RUN", "", "--out", "o"], ["eval", ""], ["train", ""]])
def test_an_empty_path_is_not_the_current_folder(command, capsys):
    with pytest.raises(SystemExit):
        main(command)
    assert "the path is empty" in capsys.readouterr().err


def test_a_configuration_may_be_written_by_other_editors(tmp_path):
    sound = yaml.safe_dump({"base": str(ROOT / "configs" / "quickstart.yaml"), "seed": 7}).replace("\n", "\r\n")
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + sound.encode())
    assert load_config(tmp_path / "mine.yaml").seed == 7
