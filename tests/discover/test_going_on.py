"""A journey that goes on: elsewhere, with other settings, on another number of processes, with other files."""

import json
import shutil

import pytest
from test_plan import made_for, request_for

from sptnet.data.format.manifest import read_manifest
from sptnet.discover.children import Children, StageError
from sptnet.discover.journey import BEGUN, _check_backbone
from sptnet.discover.pipeline import Pipeline
from sptnet.discover.plan import Length
from sptnet.discover.planning import _write_again
from sptnet.discover.recipe import batches_of, write_stage
from sptnet.discover.request import Request, RequestError
from sptnet.discover.saved_state import Choices, read_kept
from sptnet.discover.stages import Machine, checked, predict, shards
from sptnet.run.folder import open_run, read_config
from sptnet.run.parts import PartsError, begin_parts


def request_in(out, *overrides, backbone="vit_small_patch14_dinov2", weights="none", labelled="l"):
    return Request(out / labelled, out / "u", out, 7, None, backbone, weights, overrides, "sptnet")


@pytest.mark.parametrize(
    ("backbone", "weights", "told"),
    [("vit_nowhere", "none", "timm cannot build 'vit_nowhere'"),
     ("vit_small_patch14_dinov2", "file", "--weights .*file: .*is not a plain file of weights"),
     ("resnet50", "none", "--backbone resnet50 --weights none")],
)  # fmt: skip
def test_a_backbone_that_cannot_be_had_is_told_first_and_another_may_be_named(tmp_path, backbone, weights, told):
    (tmp_path / "file").write_bytes(b"x")
    request = request_in(tmp_path / "out", backbone=backbone, weights=weights.replace("file", str(tmp_path / "file")))
    begin_parts(request.out / BEGUN, request.says())
    with pytest.raises(RequestError, match=told):
        _check_backbone(request)
    right = request_in(tmp_path / "out", backbone="vit_tiny_patch16_224")
    begin_parts(right.out / BEGUN, right.says())
    _check_backbone(right)
    assert (right.out / BEGUN).exists()


def test_settings_that_decide_no_number_may_change(tmp_path):
    first = request_in(tmp_path / "out", "seed=3", "data.workers=4", "memory={micro_batches: 2}")
    begin_parts(first.out / BEGUN, first.says())
    begin_parts(first.out / BEGUN, request_in(tmp_path / "out", "seed=3", "data.workers=0", "trunk_cache=off").says())
    for others in (["seed=4"], [], ["seed=3", "data={workers: 0, augment: affine}"]):
        with pytest.raises(PartsError, match="overrides"):
            begin_parts(first.out / BEGUN, request_in(tmp_path / "out", *others).says())


def kept(digits, out, *overrides):
    """A journey whose plan was made, as its files have it."""
    out.mkdir(exist_ok=True)
    shutil.copytree(digits, out / "shards")
    dealt, made = batches_of(read_manifest(digits), (128, 4), 2), made_for(Length(50, 5), 112)
    for name in ("simgcd", "sptnet"):
        write_stage(name, request_in(out, *overrides), 7, 2, dealt, made)
    choices = {
        "precision": "no", "resize": None, "hours": 1, "plan": made._asdict(), "recipe": [100, 10],
        "batch": dealt.size, "device": "2 x cpu", "image_size": 112, "dealt": dealt,
    }  # fmt: skip
    (out / "plan.json").write_text(json.dumps(choices))
    return read_kept(out / "plan.json", Choices).model_dump(exclude_unset=True)


def journey_of(request, children, processes):
    return Pipeline(request, 1.0, Machine(processes, 2, "no", 3), children, 9)


def test_what_was_moved_trains_where_it_is_and_with_what_is_said_now(digits, tmp_path):
    kept(digits, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    choices = read_kept(tmp_path / "new" / "plan.json", Choices).model_dump(exclude_unset=True)
    request = request_in(tmp_path / "new", "data.workers=1", "memory.micro_batches=4")
    with Children(request.out) as children:
        _write_again(journey_of(request, children, 2), choices, 7)
    first, second = (read_config_of(request.out / f"{name}.yaml") for name in request.stages)
    assert (first.run, first.data.root) == (str(request.out / "simgcd"), str(request.out / "shards"))
    assert (second.init, second.memory.micro_batches) == (str(request.out / "simgcd"), 4)
    assert (first.data.batch_size, first.data.workers, first.schedule.epochs) == (choices["batch"], 1, 50)


def read_config_of(path):
    from sptnet.config_file import load_config

    return load_config(path)


def test_a_batch_that_cannot_be_dealt_names_a_number_that_it_can(digits, tmp_path):
    choices, request = kept(digits, tmp_path / "out"), request_in(tmp_path / "out")
    with Children(request.out) as children, pytest.raises(StageError, match=r"128 images.*: say --processes 2$"):
        _write_again(journey_of(request, children, 3), choices, 7)


@pytest.mark.parametrize("lacking", ["hours", "recipe", "batch", "device", "image_size", "plan"])
def test_a_plan_that_lacks_something_is_named(digits, tmp_path, lacking):
    kept(digits, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "plan.json").read_text())
    (tmp_path / "out" / "plan.json").write_text(json.dumps(told | {lacking: None}))
    with pytest.raises(StageError, match=f"plan.json cannot be used .*no {lacking}.*remove it"):
        read_kept(tmp_path / "out" / "plan.json", Choices)


def test_a_run_that_was_moved_with_its_dataset_finds_it(digits, tmp_path, monkeypatch):
    kept(digits, tmp_path / "old")
    config = read_config_of(tmp_path / "old" / "sptnet.yaml")
    for name in ("simgcd", "sptnet"):
        (tmp_path / "old" / name).mkdir()
    open_run(config, 0)
    there = read_config(tmp_path / "old" / "sptnet")
    assert (there.data.root, there.init) == (config.data.root, config.init)
    shutil.copytree(tmp_path / "old", tmp_path / "elsewhere" / "new")
    copied = read_config(tmp_path / "elsewhere" / "new" / "sptnet")
    assert copied.data.root == str(tmp_path / "old" / "shards")  # where it was, as long as that is there
    shutil.rmtree(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    moved = read_config(tmp_path / "elsewhere" / "new" / "sptnet")
    assert moved.data.root == str(tmp_path / "elsewhere" / "new" / "shards")
    assert moved.init == str(tmp_path / "elsewhere" / "new" / "simgcd")
    asked = read_config(tmp_path / "elsewhere" / "new" / "sptnet", ["data.root=/nowhere"])
    assert asked.data.root == "/nowhere"


def test_predictions_are_loaded_by_as_many_as_the_rest(tmp_path):
    machine = Machine(1, 4, "no", 3)
    for stage in (checked(request_for(tmp_path), "simgcd", machine), predict(request_for(tmp_path), machine)):
        assert stage.command[stage.command.index("--workers") + 1] == "3"


def test_a_folder_whose_name_no_dataset_can_have(tmp_path):
    for name, named in (("known", False), ("known [b]", True), ("x ", True)):
        (tmp_path / name).mkdir()
        assert ("--name" in shards(request_in(tmp_path, labelled=name), None).command) == named
