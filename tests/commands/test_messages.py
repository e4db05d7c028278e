"""What is told of names and URLs that hold control characters: all of it, and nothing that a terminal would obey."""

import pickle
import shutil

import pytest
from launching import ROOT

from sptnet.cli import main
from sptnet.data.format.faults import DatasetError

ODD = "a\x1b[2J\x07\u202eb"


@pytest.mark.parametrize(
    "command",
    [
        ["train", "configs/quickstart_simgcd.yaml", f"data.root=file://{ODD}"],
        ["train", "configs/quickstart_simgcd.yaml", f"data.root=memory://{ODD}"],
        ["train", "configs/quickstart_simgcd.yaml", f"data.root={ODD}"],
        ["train", ODD],
        ["eval", ODD],
        ["predict", "RUN", ODD, "--out", "out"],
        ["features", ODD, "--out", "out", "--run", "RUN"],
        ["kmeans", "DIGITS", "out", "--features", ODD],
        ["export", "RUN", f"/dev/null/{ODD}"],
        ["report", ODD],
    ],
)
def test_what_the_user_gave_is_told_and_does_nothing_to_the_terminal(
    command, untrained, digits, tmp_path, capsys, monkeypatch
):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(untrained), "DIGITS": str(digits)}
    assert main([places.get(argument, argument) for argument in command]) != 0
    errors = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error")]
    assert errors
    assert all(line.isprintable() for line in errors)
    assert "a\\x1b[2J\\x07\\u202eb" in errors[0]


def test_an_argument_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["report", "RUN", f"--{ODD}"])
    assert "a\\x1b[2J\\x07\\u202eb" in capsys.readouterr().err


def test_an_error_is_printable_for_whoever_catches_it():
    told = DatasetError(f"{ODD}\x85\ngone")
    assert str(told).split("\n") == ["a\\x1b[2J\\x07\\u202eb\\x85", "gone"]
    assert str(pickle.loads(pickle.dumps(told))) == str(told)
