"""What stands between two commands, damaged, swapped or of something else: told, made again, and never used."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from made import told
from PIL import Image
from safetensors.numpy import load_file, save_file

from sptnet.cli import main
from sptnet.config import ConfigError
from sptnet.config_file import load_config, read_override
from sptnet.data.features import Part, encode_part, fingerprint_digest, part_path
from sptnet.data.format.manifest import KINDS
from sptnet.data.storage.store import LocalStore
from sptnet.data.tokens import PartWriter, TokenPart, TokenShape
from sptnet.discover.saved_state import plan_of, read_kept
from sptnet.features import _stored
from sptnet.run.checkpoint import CheckpointError, checkpoints, read_facts
from sptnet.run.folder import RunError, check_unfinished, writing
from sptnet.run.model_file import ModelFacts, load_model, save_model
from sptnet.run.model_file import read_facts as facts_of
from sptnet.run.parts import PartsError, writing_parts
from sptnet.run.provenance import read_starts
from sptnet.trained import TrainedRun

SHAPE = TokenShape(2, 3, 4, "float32")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(draws.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"\x89PNG")
    return folder


def test_a_path_that_no_configuration_can_name_is_refused_before_the_first_step(tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"\xffx")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(RunError, match=r"is not UTF-8, in which config.yaml names it: rename the folder"):
        check_unfinished(load_config("quickstart", ["init=null", "run=run", "data.root=/data"]))


def test_a_model_with_a_prompt_is_of_no_run_without(run, tmp_path, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"method": "simgcd"}
    del config["prompts"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (["eval", str(run)], ["predict", str(run), str(tmp_path), "--out", str(tmp_path / "out")]):
        assert main(command) == 1
        assert "was trained with prompts, and config.yaml beside it says simgcd: they are of two runs" in told(capsys)
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("facts", "why"),
    [(ModelFacts(1, classes=("a", "b", "a"), num_old=1), "a class is named twice"),
     (ModelFacts(1, classes=("a", "b"), num_old=3), "3 old classes"), (ModelFacts(1, num_old=0), "0 old classes")],
)  # fmt: skip
def test_classes_that_cannot_be_are_no_model_s(run, facts, why):
    module = TrainedRun(run, "cpu").encoder.module
    save_model(run, module.state_dict(), None, facts)
    for read in (facts_of, lambda folder: load_model(folder, module, None)):
        with pytest.raises(RunError, match=f"its metadata is not what a run writes: {why}"):
            read(run)


def test_a_checkpoint_is_of_the_step_that_it_is_named_by(tmp_path):
    facts = {"schema": "sptnet-checkpoint/1", "step": 5, "numbers": {}, "backbone": {"sha256": "x"}, "written_by": {},
             "counters": {}, "parts": []}  # fmt: skip
    for name in ("step-000000005", "step-000000099", "step-000000005-old"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text(json.dumps(facts))
    found = checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-000000005", "step-000000099"]  # a copy is nobody's
    assert read_facts(found[0]).step == 5
    with pytest.raises(
        CheckpointError, match=r"step-000000099 holds step 5, and its name says otherwise: rename it to step-000000005"
    ):
        read_facts(found[1])


@pytest.mark.parametrize("how", ["dangling", "file"])
def test_a_run_whose_checkpoints_cannot_be_seen_is_not_begun_anew(digits, tmp_path, capsys, how):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    if how == "dangling":
        (run / "checkpoints").symlink_to("/not/mounted")
    else:
        (run / "checkpoints").write_text("")
    for resume in ("auto", "none"):
        assert main(["train", "quickstart_simgcd", f"run={run}", f"data.root={digits}", f"resume={resume}"]) == 1
        assert "checkpoints is not a folder, or a broken link: is its disk mounted?" in told(capsys)
    assert (run / "metrics.jsonl").exists()


def token_part(folder, name, targets):
    path = folder / f"{name}.safetensors"
    with PartWriter(path, SHAPE, SHAPE.rows_of("labelled")) as writer:
        for uid, target in enumerate(targets):
            writer.add(np.full((2, 3, 4), uid, np.float32), uid, target, "")
        writer.finish()
    return path


def test_tokens_of_another_part_or_with_other_classes_are_made_again(tmp_path):
    (tmp_path / "0a").mkdir()
    first, second = (token_part(tmp_path / "0a", f"labelled-{n:06d}", [n, 1 - n]) for n in range(2))
    assert TokenPart(first, SHAPE, "labelled", 2).target.tolist() == [0, 1]
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(Exception, match=r"it is another part, or its columns are not what was written.; it is removed"):
        TokenPart(first, SHAPE, "labelled", 2)
    assert not first.exists()
    columns = load_file(second)
    save_file(
        columns | {"target": columns["target"] + 1}, second, {"part": '{"absent": {}, "of": "0a/labelled-000001 0"}'}
    )
    with pytest.raises(Exception, match="it is another part"):
        TokenPart(second, SHAPE, "labelled", 2)
    before = token_part(tmp_path / "0a", "labelled-000002", [1])  # of a version that did not say it
    save_file(load_file(before), before, {"absent": "{}"})
    assert len(TokenPart(before, SHAPE, "labelled", 1).uid) == 1
    assert swapped
    folder = tmp_path / "0a" / "labelled-000003.safetensors"
    folder.mkdir()
    with pytest.raises(Exception, match=r"remove it, which cannot be done here \(Is a directory\)"):
        TokenPart(folder, SHAPE, "labelled", 1)


@pytest.mark.parametrize("what", ["empty", "half", "folder", "embeddings", "errors gone", "errors empty", "long cell"])
def test_a_part_of_predictions_that_is_not_whole_is_made_again(untrained, images, tmp_path, what, capsys):
    out = tmp_path / "out"
    arguments = ["predict", str(untrained), str(images), "--out", str(out), "--embeddings"]
    assert main(arguments) == 0
    table, embeddings, errors = (
        out / name for name in
        ("predictions/part-000000.csv", "embeddings/part-000000.npy", "errors/part-000000.csv")
    )  # fmt: skip
    sound = [path.read_bytes() for path in (table, embeddings, errors)]
    damage = {
        "empty": lambda: table.write_bytes(b""), "half": lambda: table.write_bytes(sound[0][: len(sound[0]) // 2]),
        "folder": table.unlink, "embeddings": lambda: embeddings.write_bytes(sound[1][:50]),
        "errors gone": errors.unlink, "errors empty": lambda: errors.write_bytes(b""),
        "long cell": lambda: errors.write_bytes(b'path,error\na,"' + b"x" * 200_000 + b'"\n'),
    }  # fmt: skip
    damage[what]()
    capsys.readouterr()
    assert main(arguments) == 0
    assert [path.read_bytes() for path in (table, embeddings, errors)] == sound
    assert "5 images in" in (said := "".join(capsys.readouterr()))
    assert "1 cannot be read" in said


def test_a_listing_of_other_lengths_is_refused(untrained, images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["predict", str(untrained), str(images), "--out", str(out)]
    assert main(arguments) == 0
    listing = out / "listing.bin"
    listing.write_bytes(listing.read_bytes().replace(b"\0", b"x", 1))
    (out / "predictions" / "part-000000.csv").unlink()
    assert main(arguments) == 1
    assert "listing.bin is damaged, it lists 5 images of part 0, not 6: remove the folder" in told(capsys)


def test_a_page_of_predictions_that_its_metrics_do_not_tell_of_is_refused(run, tmp_path, capsys):
    assert main(["eval", str(run)]) == 0
    sound = dict(np.load(run / "predictions.npz"))
    capsys.readouterr()
    cases = [
        {key: value[:40] for key, value in sound.items()},
        {key: np.zeros_like(value) if "prediction" in key else value for key, value in sound.items()},
        {key.replace("unlabelled", "labelled").replace("test", "labelled"): value for key, value in sound.items()},
    ]
    for arrays in cases:
        np.savez(run / "predictions.npz", **arrays)
        assert main(["report", str(run), "--html", str(tmp_path / "page.html")]) == 1
        assert "`sptnet eval" in told(capsys)
        assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("text", ["runs/a #1", "a\nb", "1 # one"])
def test_an_override_that_yaml_cuts_off_is_refused(text):
    with pytest.raises(ConfigError, match="YAML would cut the value at ' #' or a line break: quote it"):
        read_override(f"run={text}")


def test_a_folder_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    with pytest.raises(ConfigError, match="is a folder: name a configuration in it, or one of these: "):
        load_config("mine")


def test_an_override_that_is_quoted_is_taken_whole():
    assert read_override('run="runs/a #1"') == ("run", "runs/a #1")
    assert read_override("run=runs/a#1") == ("run", "runs/a#1")
    assert read_override("data.remote.options={anon: true, x: ' # '}")[1] == {"anon": True, "x": " # "}


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path, digits):
    run = tmp_path / "run"
    arguments = ["train", "quickstart_simgcd", f"run={run}", f"data.root={digits}", "schedule.epochs=1", "trackers=[]",
                 "data.workers=0", "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 1, num_heads: 3}"]  # fmt: skip
    run.mkdir()
    (run / "starts.jsonl").write_text('{"step": 0, "command": ["a"]}\n{"step": 7, "comm')
    assert main(arguments) == 0
    starts = read_starts(run)
    assert [start["step"] for start in starts] == [0, 0]
    assert (run / "starts.jsonl").read_text().count("\n") == 3


def test_kmeans_replaces_its_own_results_only(digits, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.json").write_text('{"mine": 1}')
    for out, why in ((tmp_path / "mine", "holds a metrics.json that is not of k-means"), (digits, "of a dataset")):
        assert main(["kmeans", str(digits), str(out)]) == 1
        assert why in told(capsys)
    assert (tmp_path / "mine" / "metrics.json").read_text() == '{"mine": 1}'
    for _ in range(2):
        assert main(["kmeans", str(digits), str(tmp_path / "own")]) == 0


@pytest.fixture
def features(digits, tmp_path):
    """`features(change)`: a folder of random features, of which one part was changed."""
    store = LocalStore(digits)
    says = {"schema": "sptnet-features/1", "name": "digits", "dataset": store.manifest.digest()}

    def made(kind=None, **changes):
        shutil.rmtree(tmp_path / "features", ignore_errors=True)
        (tmp_path / "features").mkdir()
        (tmp_path / "features" / "features.json").write_text(json.dumps(says))
        draws = np.random.default_rng(0)
        for of in KINDS:
            for number, shard in enumerate(store.manifest.of_kind(of)):
                entries = store.entries(shard)
                arrays = [draws.normal(size=(len(entries), 8)).astype("f4"), entries["uid"], entries["target"]]
                if (of, number) == (kind, 0):
                    for place, change in changes.items():
                        i = ("features", "uid", "target").index(place)
                        arrays[i] = change(arrays[i].copy())
                part_path(tmp_path / "features", of, number).write_bytes(encode_part(*arrays, says))
        return tmp_path / "features"

    return made


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("unlabelled", {"features": lambda a: a * np.nan}), ("labelled", {"features": lambda a: a / 0.0}),
     ("unlabelled", {"features": lambda a: a[:, :5].copy()}), ("labelled", {"target": lambda a: a + 90}),
     ("labelled", {"target": lambda a: a * 0 - 1}), ("unlabelled", {"target": lambda a: a + 90})],
    ids=["nan", "inf", "narrow", "99", "unknown", "unlabelled 99"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_features_that_cannot_be_are_named(digits, tmp_path, features, capsys, kind, changes):
    made = features(kind, **changes)
    for command in (["kmeans", str(digits), str(tmp_path / "k")], ["estimate-k", str(digits), "--out", str(tmp_path)]):
        assert main([*command, "--features", str(made)]) == 1
        assert "remove it and make it again" in told(capsys)


def test_features_without_a_width_are_none(tmp_path):
    says = {"schema": "x"}
    (tmp_path / "part").write_bytes(encode_part(np.zeros((3, 0), "f4"), np.arange(3), np.arange(3), says))
    with pytest.raises(ValueError, match="does not hold the 3 samples"):
        Part(tmp_path / "part", 3, fingerprint_digest(says))


def test_class_tokens_that_cannot_be_kept_are_one_line():
    assert _stored(np.ones((2, 3), np.float32), "float16").dtype == np.float16
    with pytest.raises(PartsError, match=r"class tokens reach 3e\+05, more than float16 holds: use --dtype float32"):
        _stored(np.full((2, 3), 3e5, np.float32), "float16")
    assert _stored(np.full((2, 3), 3e5, np.float32), "float32").max() == np.float32(3e5)
    with pytest.raises(PartsError, match="not finite: its weights are damaged"):
        _stored(np.full((2, 3), np.nan, np.float32), "float32")


@pytest.mark.parametrize(("writes", "raised"), [(writing, RunError), (writing_parts, PartsError)])
def test_the_file_that_is_in_the_way_is_named(tmp_path, writes, raised):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(raised, match=r"metrics\.json cannot be written: Is a directory"), writes(tmp_path):
        (tmp_path / "metrics.json").write_text("")
    with pytest.raises(raised, match="cannot be written: odd"), writes(tmp_path):
        raise OSError("odd")


def test_a_plan_of_no_time_is_none(tmp_path):
    from sptnet.discover.children import StageError
    from sptnet.discover.saved_state import Choices

    plan = {"image_size": 112, "length": [50, 12], "first_memory": ["none", 1], "second_memory": ["none", 1],
            "checkpoint_every": [9, 9], "seconds": [1.0, 1.0, 1.0], "whole": 9.0, "fits": True}  # fmt: skip
    beside = {"precision": "no", "resize": None, "image_size": 112, "hours": 1.0, "recipe": [100, 10], "batch": 128,
              "device": "cpu"}  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(beside | {"plan": plan}))
    assert plan_of(read_kept(path, Choices).plan).image_size == 112
    for change in (
        {"seconds": [float("nan"), 1, 1]},
        {"whole": float("inf")},
        {"image_size": 0},
        {"seconds": [-1, 1, 1]},
    ):
        path.write_text(json.dumps(beside | {"plan": plan | change}))
        with pytest.raises(StageError, match=r"plan\.json cannot be used"):
            read_kept(path, Choices)
