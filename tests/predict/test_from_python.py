"""A trained run for who has images in Python, and away from its dataset."""

import re
import shutil

import numpy as np
import pytest
import yaml
from launching import ROOT
from PIL import Image

import sptnet
from sptnet.cli import main
from sptnet.run.model_file import ModelFacts, save_model


def test_from_python_paths_images_and_arrays_are_the_same(untrained, pile):
    paths = sorted(pile.rglob("00[12]*.png"))[:9]
    run = sptnet.load(untrained)
    tokens = run.features(paths)
    assert (tokens.shape, tokens.dtype) == ((9, 48), np.float32)
    images = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in images]
    assert np.array_equal(run.features(images), tokens)
    assert np.array_equal(run.features(arrays), tokens)
    table = run.predict([str(path) for path in paths], top=3)
    assert table["path"] == [str(path) for path in paths]
    assert all(len(column) == 9 for column in table.values())
    assert run.predict(arrays)["class_name"] == table["class_name"]
    assert all(len(column) == 0 for column in run.predict([]).values())
    with pytest.raises(sptnet.trained.ImageError, match=r"image 1, gone.png, cannot be read: No such file"):
        run.predict([paths[0], "gone.png"])
    with pytest.raises(sptnet.trained.ImageError, match=r"image 1, a ndarray, cannot be read: .* longer than 1000"):
        run.predict([arrays[0], np.zeros((1, 5000), np.uint8)])
    with pytest.raises(ValueError, match="is an array of float64"):
        run.features([np.zeros((4, 4, 3))])


def test_an_image_of_pillow_s_is_what_its_path_is(tmp_path):
    """Photographs that lie on their side, and 16 bits of grey: paths were turned and scaled, images were not."""
    draws = np.random.default_rng(0)
    photo, scan = tmp_path / "photo.jpg", tmp_path / "scan.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draws.integers(0, 256, (40, 80, 3), np.uint8)).save(photo, exif=exif)
    Image.fromarray(draws.integers(0, 2**16, (30, 20), np.uint16)).save(scan)
    for path, shape in ((photo, (3, 80, 40)), (scan, (3, 30, 20))):
        by_path, by_image = (sptnet.trained._pixels(image, 0) for image in (path, Image.open(path)))
        assert by_path.shape == shape
        assert (by_path.int() - by_image.int()).abs().max() <= 1  # two readers of JPEG


def test_a_run_that_was_taken_along_needs_no_dataset(untrained, pile, tmp_path, capsys):
    taken = tmp_path / "taken"
    shutil.copytree(untrained, taken)
    config = yaml.safe_load((taken / "config.yaml").read_text())
    config["data"]["root"] = str(tmp_path / "gone")
    (taken / "config.yaml").write_text(yaml.safe_dump(config))
    path = sorted(pile.rglob("00[12]*.png"))[0]
    told, wanted = (sptnet.load(folder, "cpu").predict([path]) for folder in (taken, untrained))
    assert {k: list(v) for k, v in told.items()} == {k: list(v) for k, v in wanted.items()}
    # a model file of before has no classes: then the manifest is asked
    run = sptnet.load(untrained, "cpu")
    save_model(taken, run.encoder.module.state_dict(), None, ModelFacts(1))
    assert main(["predict", str(taken), str(pile), "--out", str(tmp_path / "out")]) == 1
    assert "manifest.json cannot be read" in capsys.readouterr().err


def test_the_snippets_of_the_docs_run(untrained, pile, predicted, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    text = "".join((ROOT / file).read_text() for file in ("README.md", "docs/discover.md"))
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 3
    monkeypatch.chdir(tmp_path)
    for run in ("photos/continued", "runs/photos/sptnet"):
        (tmp_path / run).parent.mkdir(parents=True)
        (tmp_path / run).symlink_to(untrained)
    shutil.copytree(predicted, tmp_path / "sorted")
    for name, path in zip(("a.jpg", "b.jpg"), sorted(pile.rglob("00[12]*.png")), strict=False):
        shutil.copy(path, tmp_path / name)
    assert main(["export", "runs/photos/sptnet", "FOLDER"]) == 0
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)  # as a reader would, one after the other
    assert len(namespace["table"]["class_name"]) == 2
    assert namespace["logits"].shape == (1, 10)
