"""What is unknown stays unknown: training never looks at it, and no accuracy is made of it."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import yaml

import sptnet
from sptnet.cli import main
from sptnet.columns import named
from sptnet.data.format.manifest import UNKNOWN, read_manifest
from sptnet.data.format.shard_index import INDEX_DTYPE


def with_targets(root, draw):
    """Overwrite the targets of unlabelled samples in indexes and manifest; `draw(n)` gives them."""
    manifest = json.loads((root / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["kind"] == "unlabelled":
            path = root / shard["index"]
            content = bytearray(path.read_bytes())
            begin = len(content) - shard["samples"] * INDEX_DTYPE.itemsize
            entries = np.frombuffer(content[begin:], INDEX_DTYPE).copy()
            entries["target"] = draw(len(entries))
            path.write_bytes(content[:begin] + entries.tobytes())
            shard["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return manifest


@pytest.mark.parametrize("method", ["simgcd", "sptnet"])
def test_the_weights_are_the_same_bit_for_bit_whatever_unlabelled_targets_say(before, method):
    config = yaml.safe_load((before / method / "config.yaml").read_text())
    config |= {"init": None, "schedule": config["schedule"] | {"epochs": 1}}
    noise = np.random.default_rng(0)
    written = []
    for name, draw in (("truth", None), ("noise", lambda n: noise.integers(0, 6, n)), ("unknown", lambda n: UNKNOWN)):
        if draw is not None:
            manifest = with_targets(before / "data", draw)
            if name == "unknown":
                manifest |= {"schema": "sptnet-shards/3", "unknown": True, "num_new": 3}
            (before / "data" / "manifest.json").write_text(json.dumps(manifest))
        (before / "c.yaml").write_text(yaml.safe_dump(config | {"run": name}))
        assert main(["train", "c.yaml"]) == 0
        written.append((before / name / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    metrics = json.loads((before / "unknown" / "metrics.json").read_text())
    assert metrics["unlabelled"]["all"] is None
    assert sum(metrics["unlabelled"]["sizes"]) == metrics["unlabelled"]["unknown"] == 81
    assert metrics["test"]["all"] is not None
    assert main(["report", "unknown", "truth"]) == 0
    assert main(["eval", "unknown"]) == 0


def test_a_number_of_classes_that_nobody_said_is_one_line(before, capsys):
    manifest = with_targets(before / "data", lambda n: UNKNOWN)
    manifest |= {"schema": "sptnet-shards/3", "unknown": True, "classes": manifest["classes"][:3], "num_old": 3}
    (before / "data" / "manifest.json").write_text(json.dumps(manifest))
    with open(before / "data" / "manifest.json") as file:
        manifest = json.load(file)
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["kind"] != "test"]
    manifest["protocol"] = {}
    (before / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(before / "data").new_classes() is None
    config = yaml.safe_load((before / "simgcd" / "config.yaml").read_text())
    (before / "c.yaml").write_text(yaml.safe_dump(config | {"run": "fresh"}))
    assert main(["train", "c.yaml"]) == 2
    assert "nobody has said how many new classes" in capsys.readouterr().err
    assert main(["train", "c.yaml", "model.num_new=4"]) == 0
    assert json.loads((before / "fresh" / "metrics.json").read_text())["unlabelled"]["classes"] == 7


def test_a_run_whose_dataset_said_how_many_classes_are_new_can_be_used(before, capsys):
    """Neither its configuration nor the names that its model file has tell the number."""
    manifest = with_targets(before / "data", lambda n: UNKNOWN)
    manifest |= {"schema": "sptnet-shards/3", "unknown": True, "classes": manifest["classes"][:3], "num_old": 3}
    manifest |= {"num_new": 4, "protocol": {}}
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["kind"] != "test"]
    (before / "data" / "manifest.json").write_text(json.dumps(manifest))
    config = yaml.safe_load((before / "simgcd" / "config.yaml").read_text())
    assert config["model"].get("num_new") is None
    (before / "c.yaml").write_text(yaml.safe_dump(config | {"run": "told"}))
    assert main(["train", "c.yaml"]) == 0
    assert sptnet.load("told").classes.names == [*manifest["classes"], "new-000", "new-001", "new-002", "new-003"]
    assert main(["predict", "told", "data", "--splits", "unlabelled", "--out", "sorted"]) == 0


def test_a_new_class_never_has_the_name_of_an_old_one():
    """Folders named after what was discovered are the old classes of the next round."""
    classes = named(["new-000", "rose", "new-002"], 3, 6)
    assert classes.names == ["new-000", "rose", "new-002", "new-001", "new-003", "new-004"]


@pytest.mark.parametrize("now", ["method: simgcd\nmodel: {num_new: 99, image_size: 12}\n", "{", None])
def test_a_finished_run_does_not_depend_on_the_one_that_it_began_from(before, now):
    config = yaml.safe_load((before / "sptnet" / "config.yaml").read_text())
    (before / "sptnet" / "config.yaml").write_text(yaml.safe_dump(config | {"init": "simgcd"}))
    if now is None:
        shutil.rmtree(before / "simgcd")
    else:
        (before / "simgcd" / "config.yaml").write_text(now)
    assert main(["eval", "sptnet"]) == 0


def test_more_classes_than_can_be_matched_are_told_before_anything_begins(before, capsys):
    config = yaml.safe_load((before / "simgcd" / "config.yaml").read_text())
    (before / "c.yaml").write_text(yaml.safe_dump(config | {"run": "huge"}))
    assert main(["train", "c.yaml", "model.num_new=100000"]) == 2
    assert "100000 new classes are more than the 32768 that can be matched" in capsys.readouterr().err
    assert not (before / "huge").exists()
    assert main(["kmeans", "data", "k", "--num-classes", "100000"]) == 1
    assert "100000 classes are more than the 32768" in capsys.readouterr().err


def test_a_run_that_is_named_twice_is_one_run(before, capsys):
    assert main(["report", "--over-seeds", "simgcd", "simgcd/"]) == 0
    assert "±" not in capsys.readouterr().out
