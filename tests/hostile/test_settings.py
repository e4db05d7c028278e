"""Configurations that cost more than they say, values of odd types, and arguments that are no numbers."""

import os
import time

import pytest

from sptnet.cli import main
from sptnet.config import ConfigError
from sptnet.config_file import load_config
from sptnet.yaml_text import parse_yaml

MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))
TEXTS = {
    "merges in merges": MERGES, "one merge": "a: &a {x: 1}\nb: {<<: *a}", "no truth": "seed: !!bool maybe",
    "no number": 'seed: !!int ""', "a dash": "seed: !!int '-'", "no fraction": 'seed: !!float ""',
    "no date": "seed: !!timestamp x", "bytes": "a: !!binary /9g=", "a set": "a: !!set {x}",
    "half of a character": 'a: "foo\\ud800"', "a key that is a number": "1: 2",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_yaml(name):
    begin = time.process_time()
    with pytest.raises(ConfigError) as refused:
        parse_yaml(TEXTS[name], "x.yaml")
    assert str(refused.value).startswith("x.yaml: ")
    assert "\n" not in str(refused.value)
    assert time.process_time() - begin < 5


def test_text_that_yaml_of_20_years_ago_took_for_a_number_or_a_date():
    parts = ":".join(["1"] * 60_000)
    assert parse_yaml(f"a: {parts}\nb: 1:30\nc: 2024-01-01\nd: 089\ne: 1e-3", "x") == {
        "a": parts, "b": "1:30", "c": "2024-01-01", "d": "089", "e": "1e-3",
    }  # fmt: skip


@pytest.mark.parametrize(
    "override",
    ["run=~nobody-has-this-name/x", "data.root" + ".a" * 3000 + "=1", "data.remote.options={a: !!binary /9g=}"],
)
def test_overrides(override):
    with pytest.raises(ConfigError) as refused:
        load_config("cub", [override])
    assert len(str(refused.value)) < 400


def test_a_home_that_is_not_there():
    with pytest.raises(ConfigError, match="home"):
        load_config("~nobody-has-this-name/x.yaml")


@pytest.mark.parametrize(
    "argv",
    [["features", "d", "--out", "o", "--workers", "-1"], ["features", "d", "--out", "o", "--workers", "99999"],
     ["predict", "r", "d", "--out", "o", "--workers", "-1"], ["predict", "r", "d", "--out", "o", "--top", "0"],
     ["kmeans", "d", "o", "--image-size", "-3"], ["kmeans", "d", "o", "--image-size", "0"],
     ["kmeans", "d", "o", "--image-size", "100000"], ["kmeans", "d", "o", "--num-classes", "0"],
     ["kmeans", "d", "o", "--num-classes", "99999999"], ["kmeans", "d", "o", "--pca", "0"],
     ["estimate-k", "d", "--seed", "-1"], ["estimate-k", "d", "--max-classes", "-1"],
     ["discover", "a", "b", "c", "--processes", "1000000"]],
    ids=" ".join,
)  # fmt: skip
def test_numbers(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "error: " in line]) == 1


@pytest.mark.parametrize(
    "override",
    [" run=/elsewhere", "data={root: /x}", " model.num_new=7", "model={num_new: 7}", "model={backbone: x}",
     "data.workers.x=1", "model=5", "model={image_size: 0}", "nothing=1"],
)  # fmt: skip
def test_what_follows_from_the_arguments_of_discover_is_not_overridden(override, tmp_path, capsys):
    for name in ("named/a", "named/b", "named/c", "pile"):
        (tmp_path / name).mkdir(parents=True)
    folders = [str(tmp_path / name) for name in ("named", "pile", "out")]
    assert main(["discover", *folders, "--new", "2", override]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sections_given_whole_are_read_key_by_key():
    from pathlib import Path

    from sptnet.discover.request import Request

    given = ("model={image_size: 112, backbone_options: {depth: 2}}", "seed=3", "model.image_size=98")
    request = Request(Path("a"), Path("b"), Path("c"), 2, None, "x", "none", given, "sptnet")
    assert request.chosen() == {"model.image_size": 98, "model.backbone_options": {"depth": 2}, "seed": 3}


def test_a_run_whose_configuration_is_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "config.yaml")
    assert main(["eval", str(tmp_path)]) != 0
    assert "is no regular file" in capsys.readouterr().err
