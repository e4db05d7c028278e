"""Configuration: what it inherits, and one line for each mistake."""

import json
from pathlib import Path

import pytest
import yaml

from sptnet.build import build_data
from sptnet.cli import main
from sptnet.config import ConfigError
from sptnet.config_file import load_config

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch_sise=64", "data.batch_sise is not a known key"),
        ("data.batch_size=many", "data.batch_size is 'many', it should be a valid integer"),
        ("data.batch_size=100", "data.batch_size 100 is not a multiple of 2 x data.streams = 8"),
        ("schedule.epochs=0", "schedule.epochs is 0"),
        ("method=sptnot", "method is 'sptnot'"),
        ("data", "should be section.key=value"),
    ],
)
def test_config_mistakes_are_one_clear_line(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "quickstart_simgcd.yaml", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_streams_than_shards_and_missing_shards(digits, tmp_path):
    config = load_config(CONFIGS / "quickstart_simgcd.yaml", [f"data.root={digits}", "data.streams=32"])
    with pytest.raises(ConfigError, match="16 labelled shards: use at most 16"):
        build_data(config)
    config = load_config(CONFIGS / "quickstart_simgcd.yaml", [f"data.root={tmp_path}"])
    with pytest.raises(ValueError, match="holds no dataset"):
        build_data(config)


def test_where_to_continue_and_what_may_differ_add_up():
    for overrides in (["resume=there", "resume.allow=[seed]"], ["resume.allow=[seed]", "resume=there"]):
        resume = load_config(CONFIGS / "quickstart_simgcd.yaml", overrides).resume
        assert (resume.source, resume.allow) == ("there", ("seed",))


def test_configs_inherit_and_read_numbers_as_people_write_them(tmp_path):
    (tmp_path / "top.yaml").write_text(f"base: {CONFIGS / 'quickstart_simgcd.yaml'}\noptimizer: {{lr: 1e-3}}\n")
    config = load_config(tmp_path / "top.yaml", ["seed=3"])
    assert (config.optimizer.lr, config.optimizer.name, config.seed) == (1e-3, "adamw", 3)
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(ConfigError, match="leads back"):
        load_config(tmp_path / "loop.yaml")


def keys_of(schema, part):
    """Dotted keys that a schema takes, sections gone through."""
    part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    if "properties" not in part:
        return {""}
    assert part["additionalProperties"] is False
    return {f"{name}.{key}".rstrip(".") for name, below in part["properties"].items() for key in keys_of(schema, below)}


def test_the_schema_takes_what_is_taken_and_no_key_more(capsys):
    """Editors read it."""
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    keys = keys_of(schema, schema)
    assert {"run", "data.batch_size", "model.backbone", "data.remote.cache_gb"} <= keys
    for path in CONFIGS.glob("*.yaml"):
        for name, value in yaml.safe_load(path.read_text()).items():
            below = value if isinstance(value, dict) else {"": value}
            assert name == "base" or {f"{name}.{key}".rstrip(".") for key in below} <= keys, path


@pytest.mark.parametrize(
    ("of_file", "overrides", "where", "told"),
    [("data: {workers: -1}", ["data.batch_size=64"], "file", "data.workers is -1"),
     ("data: {batch_size: 64}", ["data.workers=-1"], "override 'data.workers=-1'", "data.workers is -1"),
     ("data: {batch_size: 30, streams: 4}", [], "file", "data.batch_size 30 is not a multiple"),
     ("data: {batch_size: 30}", ["data.streams=4"], "override 'data.streams=4'", "data.batch_size"),
     ("seed: 1", ["trunk_cache=/x"], "override 'trunk_cache=/x'", "trunk_cache is /x, and data.views is null")],
)  # fmt: skip
def test_an_override_is_blamed_for_what_it_says_and_the_file_for_the_rest(tmp_path, of_file, overrides, where, told):
    path = tmp_path / "my.yaml"
    path.write_text(f"base: {CONFIGS / 'published_sptnet.yaml'}\n{of_file}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, ["run=x", "data.root=x", *overrides])
    assert str(raised.value).startswith(f"{path if where == 'file' else where}: {told}")


@pytest.mark.parametrize("key", ["run", "trunk_cache", "data.remote.cache"])
def test_what_is_written_to_is_on_a_disk(key):
    """`s3://bucket/run` was a local folder of that name."""
    with pytest.raises(ConfigError, match=rf"override '{key}=s3://bucket/x': is a URL: name a folder on a disk"):
        load_config("cub", ["data.root=s3://bucket/cub", "data.views=4", f"{key}=s3://bucket/x"])


def test_a_folder_does_not_hide_a_configuration_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "cub").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("cub", ["data.root=cub"]).data.root == "cub"
