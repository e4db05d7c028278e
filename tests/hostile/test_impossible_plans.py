"""What is asked of `sptnet plan`: arguments and configurations that cannot be, something else in a file's place."""

import pytest

from sptnet.cli import main

NO_CONFIG = ["/dev/null", "/nowhere", "a\0b", ".", "binary", "list.yaml", "cubs", "folder"]
ARGUMENTS = [
    ["--gpus", "1000000"], ["--gpus", "0"], ["--gpus", "-1"], ["--gpus", "²"], ["--gpus", "999983"], ["--nodes", "1e3"],
    ["--nodes", "99999"], ["--strategy", "single"], ["--strategy", "hsdp"], ["--strategy", "ddp,fsdp2"], ["--strategy", ""],
    ["--gpus", "1", "--strategy", "ddp"], ["--gpus", "1", "--strategy", "fsdp2"], ["--gpus", "1", "--strategy", "zero3"],
    ["--nodes", "2", "--gpus", "1", "--strategy", "hsdp"], ["--gpu", "abacus"], ["--gpu", "\x1b[31m"], ["--precision", "fp8"],
    ["--network", "nan"], ["--network", "inf"], ["--network", "-1"], ["--network", "0"], ["--network", "ten"],
    ["--price", "nan"], ["--price", "inf"], ["--price", "-1"], ["--calibrate", "0"],
    ["--images", "-1,2,3", "--classes", "1,2"], ["--images=-1,2,3", "--classes=1,2"], ["--images", "1,2,3"],
    ["--images", "9999999999999,1,1", "--classes", "1,2"], ["--images", "0,0,0", "--classes", "1,1"],
    ["--images", "0,1000,0", "--classes", "1,1"], ["--images", "1000,1000,0", "--classes", "0,0"],
    ["--images", "1000,1000,0", "--classes", "999999999999,1"], ["--images", "1000,1000,0", "--classes", "1"],
]  # fmt: skip
OVERRIDES = [
    "data.batch_size=0", "data.batch_size=-8", "data.batch_size=100", "data.batch_size=12", "data.batch_size=1e9",
    "data.batch_size=8388608", "model.image_size=225", "model.image_size=1", "model.image_size=0", "model.image_size=-224",
    "model.backbone=vit_huge", "model.backbone=resnet50", "model.backbone=", "model.backbone=../x", "nothing=1", "a",
    "memory.micro_batches=1000", "prompts.frame=1000", "data.root=elsewhere",
]  # fmt: skip


def refused(capsys, *argv):
    try:
        code = main(["plan", *argv])
    except SystemExit as error:
        code = error.code
    out, error = capsys.readouterr()
    assert code in (1, 2)
    assert out == ""
    assert len([line for line in error.splitlines() if "error: " in line]) == 1, error
    assert "Traceback" not in error
    assert "\x1b" not in error


@pytest.mark.parametrize("config", NO_CONFIG)
def test_something_else_in_a_configurations_place(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 99)
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    (tmp_path / "folder").mkdir()
    refused(capsys, config)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_arguments(arguments, capsys):
    refused(capsys, "cub", *arguments)


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides(override, capsys):
    refused(capsys, "cub", override)


def test_as_many_ranks_as_images_of_a_batch(capsys):
    refused(capsys, "imagenet1k", "data.batch_size=800000", "--nodes", "100000", "--gpus", "8")
