"""What is told of a prediction, by hand; and that rows of two models or datasets are never in one table."""

import shutil

import numpy as np
import pytest
from read_tables import errors, rows
from sptnet_shards.make_shards import main as make_shards

import sptnet
from sptnet.cli import main
from sptnet.columns import Classes, prediction_columns
from sptnet.run import parts
from sptnet.trained import weights_digest


def test_of_one_image_by_hand():
    classes = Classes(["ant", "bee", "new-000"], 2)
    of_old = prediction_columns(np.array([[0.9, 0.1, -0.2]], np.float32), classes, 0.1, 3)
    shares = np.exp([9, 1, -2]) / np.exp([9, 1, -2]).sum()
    assert of_old["class_name"] == of_old["nearest_old_class"] == ["ant"]
    assert of_old["confidence"][0] == pytest.approx(shares[0])
    assert of_old["margin"][0] == pytest.approx(shares[0] - shares[1])
    assert of_old["top3_confidence"][0] == pytest.approx(shares[2])
    of_new = prediction_columns(np.array([[0.1, 0.2, 0.9]], np.float32), classes, 0.1, 1)
    assert (of_new["class_name"], of_new["is_new"].tolist()) == (["new-000"], [True])
    assert of_new["nearest_old_class"] == ["bee"]
    assert of_new["nearest_old_similarity"][0] == pytest.approx(0.2)


def test_the_prompt_is_part_of_what_computes_a_class_token(untrained):
    encoder = sptnet.load(untrained, "cpu").encoder
    told = {weights_digest(encoder.module, prompt) for prompt in (None, encoder.prompt, 2 * encoder.prompt)}
    assert len(told) == 3


def test_a_dataset_that_was_made_anew_in_its_place_is_another_one(untrained, tmp_path, capsys):
    arguments = ["predict", str(untrained), str(tmp_path / "shards"), "--out", str(tmp_path / "out")]
    assert make_shards(["digits", str(tmp_path / "shards")]) == 0
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "shards")
    assert make_shards(["digits", str(tmp_path / "shards"), "--seed", "1"]) == 0
    capsys.readouterr()
    assert main(arguments) == 1
    assert "holds results of something else (dataset: " in capsys.readouterr().err


def test_a_part_with_a_table_has_its_errors_and_embeddings(untrained, pile, predicted, tmp_path, monkeypatch):
    """Whatever is the last that was written: the table, by which a part counts as done, comes behind the others."""
    arguments = ["predict", str(untrained), str(pile), "--out", str(tmp_path / "out"), "--embeddings"]
    whole = parts.write_whole
    for number in range(6):
        left = [number]

        def until(path, content, left=left):
            if not left[0]:
                raise OSError(28, "No space left on device")
            left[0] -= 1
            whole(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(parts, "write_whole", until)
            assert main(arguments) == 1
        for table in (tmp_path / "out" / "predictions").glob("*.csv"):
            assert (tmp_path / "out" / "embeddings" / f"{table.stem}.npy").exists()
    assert main(arguments) == 0
    assert (rows(tmp_path / "out"), errors(tmp_path / "out")) == (rows(predicted), errors(predicted))
