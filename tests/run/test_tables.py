"""Tables of runs."""

import json

import pytest

from sptnet.cli import main


def run(folder, *shares, method="simgcd", samples=100):
    """A folder with an evaluation; `shares`: All, Old, New."""
    folder.mkdir()
    result = dict(zip(("all", "old", "new"), shares, strict=True)) | {
        "samples": samples, "classes": 4, "classes_used": 4, "effective_classes": 3.9,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps({"method": method, "unlabelled": result, "test": result}))
    return str(folder)


def test_over_seeds_a_method_has_a_mean_and_the_deviation_of_a_sample(tmp_path, capsys):
    three = [run(tmp_path / f"s{i}", share, 0.5, 0.25) for i, share in enumerate((0.7, 0.71, 0.75))]
    alone = run(tmp_path / "alone", 0.9, 0.8, 1.0, method="sptnet")
    assert main(["report", "--over-seeds", *three, alone, three[0]]) == 0  # one that is named twice counts once
    lines = capsys.readouterr().out.splitlines()
    (simgcd,) = [line for line in lines if "simgcd" in line]
    assert "│ 3 " in simgcd
    assert simgcd.count("72.0 ± 2.6 / 50.0 ± 0.0 / 25.0 ± 0.0") == 2
    (sptnet,) = [line for line in lines if "sptnet" in line]
    assert sptnet.count("90.0 / 80.0 / 100.0") == 2
    assert "±" not in sptnet


@pytest.mark.parametrize("content", ["{", '{"method": "simgcd", "unlabelled": {"all": 7}}', None])
def test_a_run_without_an_evaluation_is_one_line(tmp_path, capsys, content):
    folder = run(tmp_path / "run", 0.7, 0.5, 0.25)
    path = tmp_path / "run" / "metrics.json"
    path.unlink() if content is None else path.write_text(content)
    assert main(["report", "--over-seeds", folder]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"sptnet eval {folder}" in line
